"""The directory of a run: created once, resumed only with the config that made it (io)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sif_jax.config import TrainConfig, dump_config, flat_config, load_config
from sif_jax.errors import InputError
from sif_jax.parallel.distributed import by_first, check_processes_agree

# What a resumed run may change without becoming another run.
FREE_KEYS = {
    "run.root",
    "run.resume",
    "run.log_every",
    "run.save_every",
    "run.keep",
    "run.keep_best",
    "run.keep_best.metric",
    "run.keep_best.mode",
    "run.keep_best.count",
    "run.tensorboard",
    "run.wandb",
    "run.samples_every",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.sequence",
    "model.remat",
    "model.attention",
    "model.scan_layers",
    "separate_layers",
    "remove_padding",
    "judge.concurrency",
    "judge.timeout_s",
    "judge.retries",
    "judge.backoff_s",
    "judge.max_wait_s",
    "judge.cache",
    "judge.api_key_env",
    "judge.prompt_price",
    "judge.completion_price",
    "judge.max_cost",
    "judge.max_total_tokens",
    "judge.max_failed_share",
}


def open_run_together(config: TrainConfig) -> Path:
    """`open_run` by the first process, after all have found that they were started alike.

    Raises:
      InputError: on every process, where one of them has a reason.
    """
    check_processes_agree(flat_config(config))
    by_first(lambda: open_run(config))
    return config.run.directory


def open_run(config: TrainConfig) -> Path:
    """Create the run's directory and its config.yaml, or check that it may be resumed.

    Raises:
      InputError: `run.resume` forbids it, the config differs from the run's, or the directory cannot be written.
    """
    directory, resume = config.run.directory, config.run.resume
    file = directory / "config.yaml"
    if resume == "must" and not file.exists():
        raise InputError("no run to resume", file=directory, value="run.resume=must", fix="check run.name and run.root")
    if resume == "never" and file.exists():
        raise InputError(
            "this run exists", file=directory, value="run.resume=never", fix="another run.name, or run.resume=auto"
        )
    if file.exists():
        _check_same_config(config, file)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        dump_config(config, file)
    except OSError as error:
        raise InputError(f"cannot create the run ({error.strerror})", file=directory, fix="set run.root") from None
    return directory


def _check_same_config(config: TrainConfig, file: Path) -> None:
    old, new = flat_config(load_config(type(config), file)), flat_config(config)
    for key in sorted((old.keys() | new.keys()) - FREE_KEYS):
        before, now = (_shown(values[key]) if key in values else "absent" for values in (old, new))
        if before != now:
            raise InputError(
                f"this run was started with another {key}",
                file=file,
                value=now,
                expected=before,
                fix=f"set {key}={before} to resume, or choose another run.name",
            )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
