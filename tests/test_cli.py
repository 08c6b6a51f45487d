"""The command line: help, configs, exit codes, one line per mistake."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from sif_jax import __version__
from sif_jax.cli import main
from sif_jax.config import GenerateConfig, SftConfig, describe, load_config
from sif_jax.errors import InputError
from tests.conftest import ROOT

COMMANDS = [
    *("demo", "sft", "grpo", "eval", "generate", "export", "ablate", "plan", "data build", "data check"),
    *("bench remat", "bench precision", "bench rewards", "bench hacks", "bench decode"),
]
SFT = ["run.name=x", "model.path=m", "data.path=d", "optimizer.learning_rate=1e-4"]
TRACE = (
    '<think><area>[{"bbox_2d":[0.000,0.000,1.000,1.000],"depth":0.500}]</area><text>all</text></think>'
    "<answer>red</answer>"
)


def invoke(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def python(*arguments: str, **options):
    code = "from sif_jax.cli import main; main(prog_name='sif-jax')"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, **options)


@pytest.fixture
def implementation(monkeypatch):
    """Stands in for a module that a command calls."""

    def install(module: str, name: str, function) -> None:
        fake = types.ModuleType(module)
        setattr(fake, name, function)
        monkeypatch.setitem(sys.modules, module, fake)

    return install


@pytest.fixture
def records(tmp_path) -> Path:
    """A records file of two sound rows."""
    for name in ("image.png", "depth.png"):
        Image.new("L", (32, 24), 90).save(tmp_path / name)
    row = {
        "dataset": "test",
        "image": "image.png",
        "depth_image": "depth.png",
        "problem": "What colour?",
        "normalized_solution_round": {"bbox_3d": [[0.1, 0.1, 0.5, 0.5]], "illegal_content": False},
        "response": "red",
        "messages": [{"content": "What colour?", "role": "user"}, {"content": TRACE, "role": "assistant"}],
        "images": ["image.png", "depth.png"],
    }
    (tmp_path / "rows.json").write_text(json.dumps([row, row]))
    return tmp_path / "rows.json"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"Example: sif-jax {command}" in result.output


def test_help_lists_every_key_with_its_unit_and_default():
    output = " ".join(invoke("sft", "--help").output.split())
    for row in describe(SftConfig):
        assert f"{row.key} {row.description}" in output
    assert "longest" in " ".join(invoke("grpo", "--help").output.split())


def test_no_command_prints_the_commands():
    assert set(invoke().output.split()) >= {"demo", "sft", "grpo", "eval", "generate", "data"}


def test_help_is_there_within_a_second_without_importing_jax():
    code = "import sys, sif_jax.cli; print([name for name in ('jax', 'torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
    began = time.monotonic()
    assert python("sft", "--help").returncode == 0
    assert time.monotonic() - began < 3, "well under a second on an idle machine; the margin is for a busy one"


@pytest.mark.parametrize("module", ["sif_jax", "sif_jax.cli"])
def test_the_commands_run_as_a_module_whose_version_needs_no_installed_package(module):
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split()[-1] == __version__


def test_print_config_is_the_whole_resolved_config():
    config = str(ROOT / "configs/paper/sft.yaml")
    result = invoke("sft", config, "--print-config", "run.seed=9", "lora.rank=32")
    printed = yaml.safe_load(result.output)
    assert (printed["run"]["seed"], printed["lora"]["rank"], printed["optimizer"]["b1"]) == (9, 32, 0.9)
    assert printed == load_config(SftConfig, config, ["run.seed=9", "lora.rank=32"]).model_dump(mode="json")


@pytest.mark.parametrize("command", ["sft", "grpo"])
def test_a_training_command_hands_its_config_over_and_prints_the_runs_directory(command, implementation):
    seen = []
    implementation(f"sif_jax.training.{command}", "train", lambda config: seen.append(config) or Path("runs/x"))
    result = invoke(command, *SFT, "epochs=2")
    assert (result.exit_code, result.output) == (0, "runs/x\n")
    assert (seen[0].epochs, seen[0].run.name) == (2, "x")


def test_eval_and_demo_hand_their_configs_over(implementation):
    implementation("sif_jax.evals.evaluate", "evaluate", lambda config: Path(config.data.path))
    implementation("sif_jax.demo", "run", lambda config: Path(config.root))
    assert invoke("eval", *SFT[:3]).output == "d\n"
    assert invoke("demo", "root=here").output == "here\n"


def test_generate_asks_in_the_prompt_of_the_config_and_draws_the_trace(implementation, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.chdir(tmp_path)
    for name, size in (("i.png", (60, 40)), ("d.png", (60, 40))):
        Image.new("RGB", size, "white").save(name)

    def generate(messages, **sampling):
        seen.update(messages=messages, sampling=sampling)
        return [types.SimpleNamespace(text=TRACE)] * sampling["num_samples"]

    implementation("sif_jax.api", "load", lambda path, **options: types.SimpleNamespace(generate=generate))
    asked = ["model.path=m", "image=i.png", "depth=d.png", "question=Which: near?", "sampling.seed=3"]
    result = invoke("generate", *asked)
    assert (result.stdout, result.stderr) == (f"{TRACE}\n", "drawn: i-trace.png\n"), result.exception
    with Image.open("i-trace.png") as picture:
        assert picture.width > 2 * 60, "the image and the depth map"
    parts = seen["messages"][0]["content"]
    assert [part["image"] for part in parts if part["type"] == "image"] == ["i.png", "d.png"]
    assert any("Which: near? " in part["text"] for part in parts if part["type"] == "text")
    assert seen["sampling"] == load_config(GenerateConfig, None, asked).sampling.model_dump()

    result = invoke("generate", "--depth", "none", "--overlay", "o.png", *asked[:2], asked[3], "sampling.num_samples=2")
    assert result.stderr == "drawn: o-1.png\ndrawn: o-2.png\n"
    parts = seen["messages"][0]["content"]
    assert [part["image"] for part in parts if part["type"] == "image"] == ["i.png"]
    assert not any("Depth image" in part["text"] for part in parts if part["type"] == "text")
    assert invoke("generate", "--depth", "none", "--overlay", "none", *asked[:2], asked[3]).stderr == ""
    refused = invoke("generate", "--depth", "none", "--overlay", "nowhere/o.png", *asked[:2], asked[3])
    assert refused.exit_code == 2
    assert "nowhere/o.png: cannot write the picture" in refused.stderr


def test_bad_input_is_one_line_on_stderr_and_exit_code_2(implementation):
    def refuse(config):
        raise InputError("too hot", value=3, fix="cool it")

    implementation("sif_jax.training.sft", "train", refuse)
    result = invoke("sft", *SFT)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: too hot; got 3; fix: cool it\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["sft"],
        ["sft", "none.yaml"],
        ["sft", "a.yaml", "b.yaml"],
        ["sft", *SFT, "epoch=3"],
        ["grpo", "configs/paper/sft.yaml"],
        ["sft", *SFT, "--dry-run"],
        ["data", "check", "none.json"],
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_exit_code_2(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_the_process_exits_with_2_and_no_traceback():
    done = python("sft", "configs/paper/sft.yaml", "run.nme=y")
    assert done.returncode == 2
    assert done.stderr == "error: command line: unknown key run.nme; got 'y'; fix: did you mean run.name?\n"


def test_an_interrupt_exits_with_130(implementation):
    def interrupted(config):
        raise KeyboardInterrupt

    implementation("sif_jax.training.sft", "train", interrupted)
    result = invoke("sft", *SFT)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_control_c_ends_the_process_with_130():
    code = (
        "import signal, sys, time, types\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job starts without it
        "fake = types.ModuleType('fake'); sys.modules['sif_jax.training.sft'] = fake\n"
        "fake.train = lambda config: (print('training', flush=True), time.sleep(60))\n"
        "from sif_jax.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "sft", *SFT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, "interrupted\n")


def test_a_bug_is_not_dressed_up_as_bad_input(implementation):
    def broken(config):
        raise RuntimeError("a bug")

    implementation("sif_jax.training.sft", "train", broken)
    assert isinstance(invoke("sft", *SFT).exception, RuntimeError)


def test_a_dry_run_reads_the_data_and_counts_the_steps(records, implementation):
    given = [*SFT, f"data.path={records}", f"model.path={records.parent}", "epochs=10", "batch_size=3"]
    result = invoke("sft", *given, "accumulation=2", "--dry-run")
    assert result.exit_code == 0, result.output
    assert f"run    {Path('runs/x')} (new)" in result.output
    assert "(found)" in result.output
    assert "2 records, 0 rows skipped" in result.output
    assert "steps  3 of 6 records" in result.output  # 20 rows
    assert "steps  2 of" in invoke("grpo", *given[:-1], "prompts_per_step=6", "max_steps=2", "--dry-run").output
    assert "steps" not in invoke("eval", *SFT[:2], f"data.path={records}", "--dry-run").output


def test_a_sound_records_file_passes_the_check(records):
    result = invoke("data", "check", str(records))
    assert result.exit_code == 0, result.output
    assert result.output == "2 rows, 2 depth images, 2 gold boxes, 2 chains of thought, 0 problems\n"


def test_the_check_lists_every_problem_by_row_and_exits_with_2(records):
    good = json.loads(records.read_text())[0]
    box = good | {"normalized_solution_round": {"bbox_3d": [[0.5, 0.1, 0.1, 0.5]], "illegal_content": False}}
    chain = good | {"messages": [good["messages"][0], {"content": "so: " + TRACE, "role": "assistant"}]}
    Image.new("L", (10, 10), 90).save(records.parent / "small.png")
    small = good | {"depth_image": "small.png", "images": ["image.png", "small.png"]}
    missing = good | {"image": "gone.png", "images": ["gone.png", "depth.png"]}
    records.write_text(json.dumps([good, box, chain, small, missing]))
    result = invoke("data", "check", str(records))
    assert result.exit_code == 2
    summary, *problems = result.output.splitlines()
    assert summary == "5 rows, 4 depth images, 4 gold boxes, 4 chains of thought, 4 problems"
    assert [problem.split(": ")[1] for problem in problems] == ["row 2", "row 3", "row 4", "row 5"]
    assert "inverted" in problems[0]
    assert "text outside the tags (character 0)" in problems[1]
    assert "small.png" in problems[2]
    assert "gone.png: no such image" in problems[3]


def test_built_scenes_pass_the_check(tmp_path):
    built = invoke("data", "build", f"out={tmp_path}", "splits={train: 2, test: 1}", "families=[counting]")
    assert built.exit_code == 0, built.output
    for path in (tmp_path / "train.json", tmp_path / "test.json"):
        assert str(path) in built.output
        checked = invoke("data", "check", str(path))
        assert checked.exit_code == 0, checked.output
