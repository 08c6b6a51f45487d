"""What `sif-jax plan` does (io)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sif_jax.bench.report_line import json_line
from sif_jax.errors import InputError
from sif_jax.plan.plan import best_plan, can_compile, make_plan
from sif_jax.plan.report import figures, report, search_report
from sif_jax.plan.setting import Setting, read_architecture, read_config
from sif_jax.plan.topology import parse_topology


def run(
    words: Sequence[str],
    *,
    topology: str,
    model: str | None,
    tries: int,
    completion_tokens: int | None,
    analytic: bool,
    json_only: bool,
) -> tuple[str, bool]:
    """The report, and whether the setting (with `tries`, the best one found) fits.

    Raises:
      InputError: of the config, the model, the topology or the mesh.
    """
    where, config = parse_topology(topology), read_config(words)
    name, architecture = read_architecture(model, config)
    setting = Setting(config, architecture, name, where)
    analytic = analytic or _falls_back(setting)
    if tries:
        plans = best_plan(setting, tries=tries, analytic=analytic, completion_tokens=completion_tokens)
        return (json_line(figures(plans[0])) if json_only else search_report(plans)), plans[0].fits
    plan = make_plan(setting, analytic=analytic, completion_tokens=completion_tokens)
    return (json_line(figures(plan)) if json_only else report(plan)), plan.fits


def _falls_back(setting: Setting) -> bool:
    """GPUs are planned by formulas where their compiler, 2 GB of wheels, is not installed; TPUs' has to be.

    Raises:
      InputError: libtpu is not installed, or is another jax's.
    """
    reason: InputError | None = can_compile(setting)
    if reason is None:
        return False
    if setting.topology.platform == "tpu":
        raise reason
    print(f"by formulas alone: {reason}", file=sys.stderr)
    return True
