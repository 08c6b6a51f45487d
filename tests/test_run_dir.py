"""Run directories: made once, resumed only with the same config."""

import pytest

from sif_jax.config import SftConfig, load_config
from sif_jax.errors import InputError
from sif_jax.training.run_dir import open_run


@pytest.fixture
def make(tmp_path):
    fixed = ["run.name=x", f"run.root={tmp_path}", "model.path=m", "data.path=d", "optimizer.learning_rate=1e-4"]
    return lambda *overrides: load_config(SftConfig, None, [*fixed, *overrides])


def test_a_new_run_holds_its_config(make, tmp_path):
    config = make()
    assert open_run(config) == tmp_path / "x"
    assert load_config(SftConfig, tmp_path / "x" / "config.yaml") == config


def test_a_run_resumes_with_the_same_config_and_may_change_how_it_is_watched(make):
    directory = open_run(make())
    assert open_run(make()) == directory
    assert open_run(make("model.attention=xla", "run.samples_every=null")) == directory
    assert open_run(make("run.log_every=5", "run.keep=1", "run.resume=must", "model.remat=none")) == directory


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "optimizer.learning_rate=2e-4",
            "another optimizer.learning_rate; got '0.0002'; expected 0.0001; fix: set optimizer",
        ),
        ("run.seed=1", "another run.seed; got '1'; expected 0; fix: set run.seed=0 to resume"),
        ("lora.rank=4", "another lora; got 'absent'; expected null; fix: set lora=null"),
        ("data.buckets.tokens=[8, 16]", "another data.buckets.tokens; got '[8, 16]'; expected [1024, 2048]"),
        ("epochs=4", "or choose another run.name"),
    ],
)
def test_another_config_is_refused_by_key_old_and_new_value(make, override, told):
    directory = open_run(make())
    before = (directory / "config.yaml").read_text()
    with pytest.raises(InputError) as caught:
        open_run(make(override))
    assert str(caught.value).startswith(f"{directory / 'config.yaml'}: this run was started with ")
    assert told in str(caught.value)
    assert (directory / "config.yaml").read_text() == before


def test_a_run_that_exists_is_refused_when_it_must_not_resume(make):
    open_run(make("run.resume=never"))
    with pytest.raises(InputError, match=r"this run exists; got 'run.resume=never'; fix: another run.name"):
        open_run(make("run.resume=never"))


def test_a_run_that_is_missing_is_refused_when_it_must_resume(make, tmp_path):
    with pytest.raises(InputError, match="no run to resume"):
        open_run(make("run.resume=must"))
    assert not (tmp_path / "x").exists()


def test_a_directory_left_by_a_kill_before_the_config_is_a_new_run(make, tmp_path):
    (tmp_path / "x").mkdir()
    open_run(make("run.resume=never"))


def test_a_place_that_cannot_be_written_is_told(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot create the run \(Not a directory\); fix: set run.root"):
        open_run(make(f"run.root={tmp_path / 'file'}"))
