"""The smoke check: what it measures here, on the CPU, and what it says of machines that are not well."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gpu_compat import parity, versions
from gpu_compat.cards import CARDS
from gpu_compat.diagnosis import GRADIENT_TOLERANCE, Measured, diagnose
from gpu_compat.measure import Sizes, matmul_tflops, memory_gbps
from gpu_compat.smoke import as_dict, as_text, prepare
from gpu_compat.versions import Versions
from tests.launch_targets import fake_command

H20 = CARDS["h20"]
GOOD = Versions(
    "0.10.2", "0.10.2", {"jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.10.2"}, "570.86", "12.8", "9.8.0"
)
WELL = Measured(
    devices=(H20.name,) * 8,
    cuda="12.9",
    memory_gbps=3400.0,
    matmul_tflops={"bfloat16": 130.0},
    all_reduce_gbps=380.0,
    gradient_error=1e-5,
    attention="cudnn",
)


def problems(found: Versions = GOOD, measured: Measured = WELL, platform: str = "gpu") -> list[str]:
    return [str(problem) for problem in diagnose(platform, found, measured)]


def test_a_machine_that_is_well_has_no_problem():
    assert problems() == []
    assert as_text("gpu", GOOD, WELL, []).endswith("\nready")
    assert "memory, GB/s                3400.0 (data sheet 4000)" in as_text("gpu", GOOD, WELL, [])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"plugins": {}}, "jax has no CUDA plugin; fix: pip install"),
        (
            {"plugins": {"jax-cuda12-plugin": "0.9.0"}},
            "jax-cuda12-plugin is 0.9.0, but jaxlib is 0.10.2; fix: pip install jax-cuda12-plugin==0.10.2",
        ),
        (
            {"plugins": {"jax-cuda12-plugin": "0.10.2", "jax-cuda13-plugin": "0.10.2"}, "driver": "590.1"},
            "two CUDA plugins are installed, cuda12 and cuda13; fix: pip uninstall jax-cuda12-plugin",
        ),
        ({"cudnn": None}, "cuDNN 9 is missing; fix: pip install -c constraints.txt -e '.[cuda12]'"),
        (
            {"cudnn": None, "plugins": {"jax-cuda13-plugin": "0.10.2"}, "driver": "590.1"},
            "cuDNN 9 is missing; fix: pip install -c constraints.txt -e '.[cuda13]'",
        ),
        ({"driver": None}, "there is no NVIDIA driver; fix: install it"),
        ({"driver": "515.105.01"}, "driver 515.105.01 is older than 525; fix: update the driver"),
        (
            {"plugins": {"jax-cuda13-plugin": "0.10.2"}},
            "driver 570.86 is older than 580; fix: update the driver or use '.[cuda12]'",
        ),
    ],
)
def test_a_wrong_installation_is_told_with_its_fix(changes, says):
    (problem,) = problems(GOOD._replace(**changes))
    assert problem.startswith(says)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"failure": "no CUDA-capable device is detected", "devices": ()},
            "no GPU can be used: no CUDA-capable device",
        ),
        ({"devices": (H20.name, "NVIDIA L40S")}, "the devices differ: NVIDIA H20, NVIDIA L40S; fix"),
        ({"memory_gbps": 2000.0}, "memory bandwidth in GB/s is 2000, 50% of the data sheet's 4000; fix: nvidia-smi"),
        (
            {"matmul_tflops": {"bfloat16": 37.0}},
            "bfloat16 matrix rate in TFLOP/s is 37, 25% of the data sheet's 148; fix",
        ),
        (
            {"all_reduce_gbps": 20.0},
            "all-reduce bandwidth in GB/s is 20, 4% of the data sheet's 450; fix: nvidia-smi topo",
        ),
        (
            {"gradient_error": 0.02},
            "a gradient is off by 0.02 of its largest value, at most 0.001; fix: unset XLA_FLAGS",
        ),
        ({"gradient_error": float("inf")}, "a gradient is off by inf of its largest value"),
        ({"attention_problem": "cudnn attention is off by 0.5"}, "cudnn attention is off by 0.5; fix: update cuDNN"),
    ],
)
def test_a_machine_that_is_not_well_is_told_what_and_how_to_mend_it(changes, says):
    measured = WELL._replace(**changes)
    (problem,) = problems(measured=measured)
    assert problem.startswith(says)
    found = diagnose("gpu", GOOD, measured)
    assert as_text("gpu", GOOD, measured, found).endswith(f"problem: {problem}\nnot ready")
    assert as_dict("gpu", GOOD, measured, found)["ok"] is False


def test_rates_of_a_card_without_a_data_sheet_are_shown_and_not_judged():
    measured = WELL._replace(devices=("NVIDIA B200",), memory_gbps=1.0)
    assert problems(measured=measured) == []
    assert "no data sheet here" in as_text("gpu", GOOD, measured, [])


def test_the_gradient_check_agrees_here_and_finds_a_wrong_gradient(monkeypatch):
    device = jax.devices()[0]
    assert 0 < parity.gradient_error(device) < 1e-4
    right = parity._gradients
    monkeypatch.setattr(parity, "_gradients", lambda device, remat: _spoilt(right(device, "none"), remat))
    assert parity.gradient_error(device) == pytest.approx(0.01, rel=0.01)


def _spoilt(found, remat):
    gradients, sums = found
    return jax.tree.map(lambda x: x * 1.01 if remat == "none" else x, gradients), sums


@pytest.mark.parametrize(
    ("platform", "given", "then"),
    [("gpu", "cuda", "cuda,cpu"), ("gpu", "cuda,cpu", "cuda,cpu"), ("gpu", "", ""), ("cpu", "cuda", "cpu")],
)
def test_the_cpu_is_there_to_compare_with(platform, given, then):
    environment = {"JAX_PLATFORMS": given}
    prepare(platform, environment)
    assert environment["JAX_PLATFORMS"] == then


def test_an_error_that_is_not_a_number_is_infinite():
    assert parity.relative_error(np.array([np.nan, 1.0]), np.array([1.0, 1.0])) == float("inf")
    assert parity.relative_error(np.array([1.0, 2.2]), np.array([1.0, 2.0])) == pytest.approx(0.1)


def test_rates_are_bytes_and_operations_over_time(monkeypatch):
    monkeypatch.setattr("gpu_compat.measure.seconds_per_call", lambda step, start: float(step(start).size) * 0 + 0.5)
    sizes = Sizes(4 * 10**6, 100, 0)
    assert memory_gbps(jax.devices()[0], sizes) == pytest.approx(2 * 4e6 / 0.5 / 1e9)
    assert matmul_tflops(jax.devices()[0], sizes, "float32") == pytest.approx(2e6 / 0.5 / 1e12)


def test_the_driver_and_its_cuda_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    table = "| NVIDIA-SMI 570.86.10   Driver Version: 570.86.10   CUDA Version: 12.8     |"
    fake_command(tmp_path, "nvidia-smi", f"#!/bin/bash\necho '{table}'\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert versions._driver() == ("570.86.10", "12.8")
    fake_command(tmp_path, "nvidia-smi", "#!/bin/bash\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert versions._driver() == (None, None)


@pytest.mark.parametrize("folder", ["cudnn", "cu13"])
def test_the_library_is_found_in_the_wheels_of_either_cuda(folder, tmp_path, monkeypatch):
    path = tmp_path / "nvidia" / folder / "lib" / "libof_a_test.so.9"
    path.parent.mkdir(parents=True)
    path.touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert versions._in_wheels("libof_a_test.so.9") == [str(path)]


def test_versions_are_those_of_the_installed_packages():
    found = versions.read_versions()
    assert found.jax == jax.__version__
    assert found.jaxlib == jax.lib.__version__


def smoke(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gpu_compat.smoke", *arguments]
    root = Path(__file__).resolve().parents[1]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(root / ".cache" / "jax")}
    return subprocess.run(command, cwd=root, env=os.environ | cache | env, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_measures_two_simulated_cpu_devices():
    done = smoke("--platform", "cpu", "--json", XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["ok"], found["problems"], found["devices"], found["attention"]) == (True, [], ["cpu", "cpu"], "flash")
    rates = [found["memory_gbps"], found["all_reduce_gbps"], *found["matmul_tflops"].values()]
    assert len(rates) == 5
    assert min(rates) > 0
    assert 0 < found["gradient_error"] < GRADIENT_TOLERANCE


def test_a_machine_without_a_gpu_is_not_ready_and_says_so(tmp_path):
    done = smoke(JAX_PLATFORMS="", PATH=str(tmp_path), CUDA_VISIBLE_DEVICES="")  # none is seen where there is one
    assert done.returncode == 1
    assert "problem: no GPU can be used: " in done.stdout
    assert "problem: there is no NVIDIA driver; fix: install it" in done.stdout
    assert done.stdout.endswith("not ready\n")
