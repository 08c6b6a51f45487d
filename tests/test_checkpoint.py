"""Checkpoints: bit-exact, bounded in number, and intact after a full disk or a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sif_jax.errors import InputError
from sif_jax.training.checkpoint import Checkpoints

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
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "5"]
    step, restored, host = checkpoints.restore(2, {"w": jnp.zeros(3, int)})
    assert (step, int(restored["w"][0]), host["step"]) == (2, 2, 2)


def test_a_new_process_restores_before_it_ever_saves(tmp_path, checkpoints):
    checkpoints.save(4, arrays={"w": jnp.ones(3)}, host={"epoch": 1})
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
    shutil.rmtree(tmp_path / "checkpoints/2/arrays")
    with pytest.raises(InputError, match="checkpoints/2: this checkpoint is damaged; fix: delete"):
        checkpoints.restore(None, {"w": jnp.ones(3)})


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, checkpoints, monkeypatch):
    checkpoints.save(1, arrays={"w": jnp.ones(300)}, host={})
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
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1))
try:
    store.save(2, arrays=big, host={})
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
    assert all(name.isdigit() for name in os.listdir(tmp_path / "c"))
    store.close()


def test_a_part_is_read_alone(checkpoints):
    saved = arrays(0)
    checkpoints.save(3, arrays=saved, host={})
    _, restored, _ = checkpoints.restore(3, {"params": arrays(1)["params"]}, partial=True)
    assert_same_bits(restored["params"], saved["params"])
    with pytest.raises(InputError, match="the tensor other is not in this checkpoint"):
        checkpoints.restore(3, {"other": jnp.zeros(1)}, partial=True)
