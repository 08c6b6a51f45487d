"""The environment of a GPU run: filled in before jax is imported, never over what the user set."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_compat.environment import set_environment

ROOT = Path(__file__).resolve().parents[1]


def test_an_empty_environment_gets_memory_flags_nccl_and_a_compilation_cache():
    environment = {"HOME": "/home/me"}
    set_environment(environment)
    assert environment == {
        "HOME": "/home/me",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=true",
        "NCCL_DEBUG": "WARN",
        "JAX_COMPILATION_CACHE_DIR": "/home/me/.cache/sif_jax/xla",
    }


@pytest.mark.parametrize(
    "given",
    [
        {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"},
        {"NCCL_DEBUG": "INFO"},
        {"JAX_COMPILATION_CACHE_DIR": "/scratch/xla"},
        {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false"},
    ],
)
def test_what_the_user_set_wins(given):
    environment = dict(given)
    set_environment(environment)
    assert environment | given == environment


def test_the_new_name_of_the_memory_fraction_is_respected_as_xla_refuses_both():
    environment = {"XLA_CLIENT_MEM_FRACTION": "0.7"}
    set_environment(environment)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environment


def test_the_cache_goes_where_the_user_keeps_caches():
    environment = {"HOME": "/home/me", "XDG_CACHE_HOME": "/fast"}
    set_environment(environment)
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "/fast/sif_jax/xla"


def test_setting_it_twice_changes_nothing():
    once = {"XLA_FLAGS": "--xla_dump_to=/x"}
    set_environment(once)
    twice = dict(once)
    set_environment(twice)
    assert twice == once


def test_the_launcher_does_not_import_jax_before_it_set_the_environment():
    check = "import sys, gpu_compat.launcher; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_sif_jax_never_imports_gpu_compat():
    for path in (ROOT / "sif_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[0] == "gpu_compat" for name in names), path
