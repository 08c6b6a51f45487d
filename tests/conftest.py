"""Test-wide settings: CPU, float32 matmuls at full precision, a persistent compilation cache, runtime shape checks."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import pytest
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_captured_constants_warn_bytes", 2**20)  # an array that a program closed over is compiled into it

install_import_hook("sif_jax", "beartype.beartype")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real annotation files that may stand beside the checkout; their licences keep them out of it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real annotation files in {SHARED_DATA}; their licences keep them out of the project")
    return SHARED_DATA


@pytest.fixture
def measured(record_property):
    """Hold a figure to its tolerance, and put both in the table that `make parity` prints."""

    def check(claim: str, value: float, *, at_most: float) -> None:
        record_property("measured", (claim, float(value), float(at_most)))
        assert value <= at_most, f"{claim}: {value:.3g}, at most {at_most:.3g}"

    return check


def pytest_addoption(parser):
    parser.addoption("--measured", action="store_true", help="print every figure that a test holds to a tolerance")


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("measured"):
        return
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    rows = [value for report in reports for name, value in report.user_properties if name == "measured"]
    terminalreporter.write_line("| what is compared | measured | at most |\n|---|---:|---:|")
    for claim, value, at_most in sorted(map(tuple, rows)):
        terminalreporter.write_line(f"| {claim} | {value:.2g} | {at_most:.2g} |")
