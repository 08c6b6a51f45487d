"""Checkpoints: bit-exact, bounded in number, and intact after a full disk or a kill."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sif_jax.config import KeepBestConfig
from sif_jax.errors import InputError
from sif_jax.training import checkpoint
from sif_jax.training.checkpoint import Checkpoints
from sif_jax.training.checksums import WRITTEN_LATER, write_checksums
from sif_jax.training.retention import MeanScore

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def checkpoints(tmp_path):
    store = Checkpoints(tmp_path / "checkpoints", keep=2)
    yield store
    store.close()


def arrays(seed: int = 0):
    """An nnx.State, an optax state, bfloat16, a scalar, a NumPy array and awkward floats."""
    params = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(seed)))
    odd = jnp.array([np.nan, -0.0, np.inf, 1e-45, 1 / 3], jnp.float32)
    return {
        "params": params,
        "opt": optax.adam(1e-3).init(params),
        "half": odd.astype(jnp.bfloat16),
        "odd": odd,
        "visits": np.arange(5),
    }


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_what_is_restored_is_what_was_saved_bit_for_bit(checkpoints):
    saved = arrays(0)
    checkpoints.save(3, arrays=saved, host={"previous_means": {"row-1": 0.1}, "epoch": 2})
    step, restored, host = checkpoints.restore(None, arrays(1))
    assert step == 3
    assert host == {"previous_means": {"row-1": 0.1}, "epoch": 2}
    assert isinstance(restored["params"], nnx.State)
    assert isinstance(restored["visits"], np.ndarray)
    assert_same_bits(restored, saved)


def test_shapes_alone_are_enough_to_restore_and_carry_the_sharding(checkpoints):
    saved = {"w": jnp.arange(8.0)}
    checkpoints.save(0, arrays=saved, host={})
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    like = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
    _, restored, _ = checkpoints.restore(0, like)
    assert restored["w"].sharding == sharding
    assert_same_bits(restored, saved)
    assert_same_bits(checkpoints.restore(0, {"w": jax.ShapeDtypeStruct((8,), jnp.float32)})[1], saved)


def test_only_the_newest_checkpoints_are_kept(tmp_path, checkpoints):
    assert checkpoints.latest() is None
    for step in (1, 2, 5):
        checkpoints.save(step, arrays={"w": jnp.full(3, step)}, host={"step": step})
    assert checkpoints.latest() == 5
    checkpoints.finish()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "5"]
    step, restored, host = checkpoints.restore(2, {"w": jnp.zeros(3, int)})
    assert (step, int(restored["w"][0]), host["step"]) == (2, 2, 2)


def test_a_new_process_restores_before_it_ever_saves(tmp_path, checkpoints):
    checkpoints.save(4, arrays={"w": jnp.ones(3)}, host={"epoch": 1})
    checkpoints.finish()
    again = Checkpoints(tmp_path / "checkpoints", keep=2)
    step, restored, host = again.restore(None, {"w": jnp.zeros(3)})
    assert (step, host) == (4, {"epoch": 1})
    assert_same_bits(restored, {"w": jnp.ones(3)})
    again.close()


@pytest.mark.parametrize(
    ("like", "told"),
    [
        ({"w": jnp.ones(3), "extra": {"b": jnp.ones(1)}}, "the tensor extra.b is not in this checkpoint"),
        ({}, "the tensor w is not in this model"),
        ({"w": jnp.ones(4)}, "the tensor w differs; got 'float32[3]'; expected float32[4]"),
        ({"w": jnp.ones(3, jnp.bfloat16)}, "the tensor w differs; got 'float32[3]'; expected bfloat16[3]"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_the_tensors_name(checkpoints, like, told):
    checkpoints.save(1, arrays={"w": jnp.ones(3)}, host={})
    with pytest.raises(InputError) as caught:
        checkpoints.restore(1, like)
    assert told in str(caught.value)
    assert "fix: " in str(caught.value)


def test_a_missing_step_is_refused_with_those_that_exist(checkpoints):
    with pytest.raises(InputError, match="no such checkpoint"):
        checkpoints.restore(None, {})
    checkpoints.save(2, arrays={"w": jnp.ones(3)}, host={})
    with pytest.raises(InputError, match=r"got 7; expected one of the saved steps \[2\]"):
        checkpoints.restore(7, {"w": jnp.ones(3)})


def test_a_damaged_checkpoint_is_refused_by_its_directory(tmp_path, checkpoints):
    checkpoints.save(2, arrays={"w": jnp.ones(3)}, host={})
    checkpoints.finish()
    shutil.rmtree(tmp_path / "checkpoints/2/arrays")
    with pytest.raises(InputError, match=r"checkpoints/2/arrays/.*: this checkpoint is damaged: .*; fix: delete"):
        checkpoints.restore(None, {"w": jnp.ones(3)})


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, checkpoints, monkeypatch):
    checkpoints.save(1, arrays={"w": jnp.ones(300)}, host={})
    checkpoints.finish()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6, 1199))
    with pytest.raises(InputError, match=r"checkpoints: cannot write a checkpoint \(No space left on device\)"):
        checkpoints.save(2, arrays={"w": jnp.zeros(300)}, host={})
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    checkpoints.save(2, arrays={"w": jnp.zeros(300)}, host={})
    assert checkpoints.latest() == 2


def run_python(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


REFUSED_WRITE = """
import resource, sys
import jax.numpy as jnp, numpy as np
from sif_jax.errors import InputError
from sif_jax.training.checkpoint import Checkpoints
store = Checkpoints(sys.argv[1], keep=2)
big = {"w": jnp.asarray(np.random.default_rng(0).normal(size=50_000))}
store.save(1, arrays=big, host={})
store.finish()
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1))
store.save(2, arrays=big, host={})
try:
    store.finish()
except InputError as error:
    print(error)
print(store.latest())
"""


def test_a_write_that_fails_half_way_leaves_the_previous_checkpoint_and_no_remains(tmp_path):
    process = run_python(REFUSED_WRITE, str(tmp_path / "c"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"{tmp_path / 'c'}: cannot write a checkpoint (File too large); the earlier ones are intact; fix: " in out
    assert out.splitlines()[-1] == "1"
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]


KILLED = """
import os, sys
import jax.numpy as jnp
from sif_jax.training.checkpoint import Checkpoints
store = Checkpoints(sys.argv[1], keep=2)
for step in range(1, 10_000):
    store.save(step, arrays={"w": jnp.full(200_000, step)}, host={"step": step})
"""


def test_a_kill_while_saving_leaves_a_usable_checkpoint(tmp_path):
    process = run_python(KILLED, str(tmp_path / "c"))
    deadline = time.monotonic() + 60
    while not (tmp_path / "c" / "3").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    store = Checkpoints(tmp_path / "c", keep=2)
    step, restored, host = store.restore(None, {"w": jnp.zeros(200_000, int)})
    assert step == host["step"] >= 3
    assert np.unique(restored["w"]).tolist() == [step]
    store.save(step + 1, arrays=restored, host=json.loads(json.dumps(host)))
    store.finish()
    assert all(name.isdigit() for name in os.listdir(tmp_path / "c"))
    store.close()


def test_a_part_is_read_alone(checkpoints):
    saved = arrays(0)
    checkpoints.save(3, arrays=saved, host={})
    _, restored, _ = checkpoints.restore(3, {"params": arrays(1)["params"]}, partial=True)
    assert_same_bits(restored["params"], saved["params"])
    with pytest.raises(InputError, match="the tensor other is not in this checkpoint"):
        checkpoints.restore(3, {"other": jnp.zeros(1)}, partial=True)


def test_training_goes_on_while_the_files_are_written(tmp_path, checkpoints, monkeypatch):
    may_end = threading.Event()

    def slow(directory):
        assert may_end.wait(60)
        write_checksums(directory)

    monkeypatch.setattr(checkpoint, "write_checksums", slow)
    step = jax.jit(lambda w: w + 1, donate_argnums=0)
    w, kept = jnp.zeros(50_000), np.arange(3)
    checkpoints.save(1, arrays={"w": w, "kept": kept}, host={})
    for _ in range(10):
        w = step(w)  # in the memory that is being saved
    kept[:] = 7
    assert float(w[0]) == 10
    assert not (tmp_path / "checkpoints/1").exists()
    may_end.set()
    _, restored, _ = checkpoints.restore(1, {"w": jnp.ones(50_000), "kept": kept})
    assert_same_bits(restored, {"w": jnp.zeros(50_000), "kept": np.arange(3)})


def test_the_best_checkpoints_outlive_the_newest_ones_and_a_restart(tmp_path):
    best = KeepBestConfig(metric="loss", mode="min", count=1)
    for step, score in [(1, 0.9), (2, 0.1), (3, 0.5), (4, None), (5, 0.1), (6, 0.8)]:
        with Checkpoints(tmp_path, keep=1, best=best) as store:
            store.save(step, arrays={"w": jnp.full(3, step)}, host={}, score=score)
        names = {int(path.name) for path in tmp_path.iterdir()}
        assert names == {1: {1}, 2: {2}, 3: {2, 3}, 4: {2, 4}, 5: {5}, 6: {5, 6}}[step]


def test_the_score_of_a_checkpoint_is_the_mean_since_the_one_before():
    mean = MeanScore(KeepBestConfig(metric="loss", mode="min"))
    assert mean.value is None
    for loss in (1.0, 2.0):
        mean.add({"loss": loss, "other": 9.0})
    again = MeanScore(KeepBestConfig(metric="loss", mode="min"))
    again.set_state(json.loads(json.dumps(mean.get_state())))
    again.add({"other": 9.0})
    again.add({"loss": 6.0})
    assert again.take() == 3
    assert again.value is None


def saved_files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


DAMAGES = {
    "a byte changed": flip,
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_found_and_named_and_the_checkpoint_before_is_whole(tmp_path, checkpoints, damage):
    saved = {"w": jnp.arange(5000.0), "v": jnp.zeros(10)}
    for step in (1, 2):
        checkpoints.save(step, arrays=saved, host={"loader": 12345})
    checkpoints.finish()
    latest, like = tmp_path / "checkpoints/2", jax.tree.map(jnp.ones_like, saved)
    files = [file for file in saved_files(latest) if str(file.relative_to(latest)) not in WRITTEN_LATER]
    assert len(files) > 8
    for file in files:
        shutil.copytree(latest, tmp_path / "copy")
        DAMAGES[damage](file)
        with pytest.raises(InputError) as caught:
            checkpoints.restore(None, like)
        named = f"{file}: " if file.name != "checksums.json" else ""  # itself it names the file that it wrongs
        assert f"{named}this checkpoint is damaged: " in str(caught.value)
        assert f"fix: delete {latest} to resume from the one before" in str(caught.value)
        shutil.rmtree(latest)
        shutil.move(tmp_path / "copy", latest)
    shutil.rmtree(latest)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as again:
        step, restored, host = again.restore(None, like)
    assert (step, host) == (1, {"loader": 12345})
    assert_same_bits(restored, saved)


def test_what_orbax_writes_last_is_not_needed(tmp_path, checkpoints):
    checkpoints.save(1, arrays={"w": jnp.arange(3.0)}, host={})
    checkpoints.finish()
    for name in WRITTEN_LATER:
        (tmp_path / "checkpoints/1" / name).write_text("{")
    with Checkpoints(tmp_path / "checkpoints", keep=2) as again:
        assert_same_bits(again.restore(None, {"w": jnp.zeros(3)})[1], {"w": jnp.arange(3.0)})


def test_a_failure_in_the_background_is_told_at_the_next_save(tmp_path, checkpoints, monkeypatch):
    checkpoints.save(1, arrays={"w": jnp.ones(3)}, host={})
    checkpoints.finish()

    def full(directory):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_checksums", full)
    checkpoints.save(2, arrays={"w": jnp.ones(3)}, host={})
    with pytest.raises(InputError, match=r"cannot write a checkpoint \(No space left on device\); the earlier ones"):
        checkpoints.save(3, arrays={"w": jnp.ones(3)}, host={})
    assert checkpoints.latest() == 1
    assert os.listdir(tmp_path / "checkpoints") == ["1"]


def test_a_run_that_fails_lets_the_write_end(tmp_path):
    def run():
        with Checkpoints(tmp_path, keep=1) as store:
            store.save(1, arrays={"w": jnp.ones(300_000)}, host={})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert os.listdir(tmp_path) == ["1"]
