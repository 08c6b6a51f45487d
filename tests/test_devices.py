"""Eight simulated devices compute what one does, on every mesh: samples, their log-probabilities, gradients and rewards."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

BY_PROMPTS = [
    "data=8",
    "data=1,fsdp=8",
    "data=2,fsdp=4",
    "data=1,fsdp=4,tensor=2",
    "data=2,fsdp=2,tensor=2",
    "data=4,sequence=2",
    "data=1,fsdp=2,sequence=4",
    "data=1,fsdp=2,sequence=2,tensor=2",
]
BY_SAMPLES = ["data=8"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "shapes"),
    [
        pytest.param(8, BY_PROMPTS, id="by prompts"),
        pytest.param(2, BY_SAMPLES, id="by samples"),
    ],
)
def test_eight_devices_sample_differentiate_and_reward_as_one_does(measured, prompts, shapes):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "tests.mesh_rollouts", str(prompts), *shapes]
    out = subprocess.run(command, env=environment, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["mesh"] for line in lines] == shapes
    for line in lines:
        assert line["devices"] == 8
        assert line["same_ids"], line["mesh"]
        claim = f"mesh {line['mesh']}, {prompts} prompts, against one device"
        measured(f"rollout's log-probabilities and gradients, {claim}", line["error"], at_most=1e-5)
        measured(f"rewards, {claim}", line["rewards_error"], at_most=1e-6)
