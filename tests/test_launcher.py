"""The GPU launcher sets what XLA reads before jax is imported, and leaves the user's settings alone."""

import os
import subprocess
import sys

import pytest

from gpu_compat.launcher import main, set_environment


def test_settings_of_the_user_win():
    environment = {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/x"}
    set_environment(environment)
    assert environment["XLA_FLAGS"] == "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/x"
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"


def test_it_refuses_to_start_after_jax_was_imported():
    assert "jax" in sys.modules
    with pytest.raises(RuntimeError, match="jax is imported already"):
        main()


def test_the_command_line_runs_under_it_and_xla_knows_its_flags():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "gpu_compat.launcher", "--version"]
    assert "version" in subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    set_environment(environment)
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, check=True)
