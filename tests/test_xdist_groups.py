"""Tests that share a slow fixture are marked as a group, and pytest-xdist runs a group in one process."""

import subprocess
import sys

TESTS = """
import os, pathlib, pytest

pytestmark = pytest.mark.xdist_group("together")


@pytest.mark.parametrize("number", range(6))
def test_where_am_i(number):
    with pathlib.Path("workers").open("a") as file:
        print(os.environ["PYTEST_XDIST_WORKER"], file=file)
"""


def test_a_group_of_tests_runs_in_one_process(tmp_path):
    (tmp_path / "test_group.py").write_text(TESTS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "2",
        "--dist",
        "loadgroup",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
    ]
    subprocess.run([*command, "--rootdir", tmp_path, "test_group.py"], cwd=tmp_path, check=True)
    workers = (tmp_path / "workers").read_text().split()
    assert len(workers) == 6
    assert len(set(workers)) == 1
