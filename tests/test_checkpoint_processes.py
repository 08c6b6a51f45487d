"""Checkpoints of several processes: restored on other meshes and other numbers of processes; an error of one reaches all."""

import re

import pytest

from tests.resumable_run import start_together

MODULE = "tests.checkpoint_processes"


def run(root, save: str, *restore_on: str, count: int, devices: int, timeout: float = 200) -> list[str]:
    processes = start_together(MODULE, [[str(root), save, *restore_on]] * count, devices)
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(output[-3000:] for output in outputs)
    return outputs


def test_what_two_processes_saved_is_the_same_on_other_meshes_and_numbers_of_processes_and_back(tmp_path):
    run(tmp_path, "1,2x4", count=2, devices=4)
    (alone,) = run(tmp_path, "2,4x2", "1x8", "4x2", "1x1", count=1, devices=8)
    assert re.findall(r"restored (\d) on (\w+)", alone) == [("1", "1x8"), ("1", "4x2"), ("1", "1x1"), ("2", "4x2")]
    for output in run(tmp_path, "3,8x1", "2x4", count=2, devices=4):
        assert re.findall(r"restored (\d) on (\w+)", output) == [("2", "2x4"), ("3", "8x1")]


@pytest.mark.parametrize(
    ("failing", "told"),
    [
        ("write,1", r"cannot write a checkpoint \(File too large\); the earlier ones are intact"),
        ("commit,0", r"cannot write a checkpoint \(No space left on device\); the earlier ones are intact"),
        ("restore,1", r"this checkpoint is damaged: it cannot be read"),
    ],
)
def test_where_one_process_fails_all_tell_the_same_reason_at_once(tmp_path, failing, told):
    run(tmp_path, "1,2x1", count=2, devices=1)
    outputs = run(tmp_path, f"2,2x1,{failing}", count=2, devices=1)
    errors = [re.findall(r"^error: .*$", output, re.MULTILINE) for output in outputs]
    assert errors[0] == errors[1]
    assert re.search(told, errors[0][0])
    assert all(float(re.findall(r"told after ([\d.]+) s", output)[0]) < 30 for output in outputs)
    intact = ["1", "2"] if failing.startswith("restore") else ["1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == intact
