"""The rewards bench: both ways give the same, and its report ends with its figures."""

import json
import sys

import pytest

from sif_jax.bench.rewards import measure, report
from sif_jax.config import RewardsBenchConfig
from sif_jax.errors import InputError

SMALL = RewardsBenchConfig(completions=6, samples=4, areas=3, boxes=5, map_px=96, repeats=1)


def test_the_program_and_the_loops_agree_and_are_timed():
    figures = measure(SMALL)
    assert max(figures["max_difference"].values()) < 1e-6
    assert all(ratio > 0 for ratio in figures["ratios"].values())
    assert json.loads(report(figures).splitlines()[-1]) == figures


def test_without_shapely_the_fix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "shapely", None)
    with pytest.raises(InputError, match=r"shapely is not installed.*sif_jax\[bench\]"):
        measure(SMALL)
