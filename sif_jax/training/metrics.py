"""What a run measures, step by step: metrics.jsonl, TensorBoard, Weights & Biases (io)."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from sif_jax.config import RunConfig
from sif_jax.data.batch import Waste
from sif_jax.errors import InputError
from sif_jax.parallel.distributed import is_first, mean_over_processes


class MetricsLog:
    """One JSON line per step: {"step": 7, "time": unix seconds, "loss": 0.5, …}.

    A value that is not finite is null, and "nonfinite" names it. `start_step` is the first step that will be logged:
    on resume the lines from there on, of steps that are about to be repeated, are dropped.
    """

    def __init__(
        self, run_dir: str | Path, *, start_step: int = 0, tensorboard: bool = True, wandb: bool = False
    ) -> None:
        run_dir = Path(run_dir)
        self._path = run_dir / "metrics.jsonl"
        self._wandb = _start_wandb(run_dir) if wandb else None
        run_dir.mkdir(parents=True, exist_ok=True)
        _drop_from(self._path, start_step)
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step) if tensorboard else None

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {"step": step, "time": round(time.time(), 3)} | {name: finite.get(name) for name in values}
        if len(finite) < len(values):
            line["nonfinite"] = {name: str(value) for name, value in values.items() if name not in finite}
        self._write(json.dumps(line, allow_nan=False) + "\n")
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()  # another process may end this one
        if self._wandb:
            self._wandb.log(values, step=step)

    @property
    def shows_pictures(self) -> bool:
        return bool(self._board or self._wandb)

    def log_table(
        self, step: int, name: str, rows: Sequence[Mapping[str, str | float | None]], pictures: Sequence[Image.Image]
    ) -> None:
        """A picture and its row each: images and a text in TensorBoard, one table in Weights & Biases."""
        if self._board:
            self._board.add_text(name, _markdown(rows), step)
            for number, picture in enumerate(pictures):
                self._board.add_image(f"{name}/{number}", np.asarray(picture), step, dataformats="HWC")
        if self._wandb:
            wandb = importlib.import_module("wandb")
            cells = [[wandb.Image(picture), *row.values()] for picture, row in zip(pictures, rows, strict=True)]
            self._wandb.log({name: wandb.Table(columns=["picture", *rows[0]], data=cells)}, step=step)

    def _write(self, line: str) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise InputError(
                f"cannot write ({error.strerror})", file=self._path, fix="free space, then resume the run"
            ) from None

    def close(self) -> None:
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


class NoLog:
    """The log of a process that is not the first."""

    shows_pictures = False

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        pass

    def log_table(
        self, step: int, name: str, rows: Sequence[Mapping[str, str | float | None]], pictures: Sequence[Image.Image]
    ) -> None:
        pass

    def close(self) -> None:
        pass


def open_log(run_dir: Path, run: RunConfig, *, start_step: int) -> MetricsLog | NoLog:
    if not is_first():
        return NoLog()
    return MetricsLog(run_dir, start_step=start_step, tensorboard=run.tensorboard, wandb=run.wandb)


def padding(waste: Waste) -> dict[str, float]:
    """Shares of the whole batch, whichever process holds its rows."""
    return dict(zip(("padding/tokens", "padding/patches"), mean_over_processes(waste), strict=True))


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut short by a kill is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _markdown(rows: Sequence[Mapping[str, str | float | None]]) -> str:
    """Picture i stands beside the row that is numbered i."""
    header = ["picture", *rows[0]]
    lines = [header, ["---"] * len(header), *([str(i), *map(_cell, row.values())] for i, row in enumerate(rows))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: str | float | None) -> str:
    """Whatever a model writes stays text: no markup, no further column."""
    if isinstance(value, str):
        return " ".join(re.sub(r"[^\w\s.,:;]|_", lambda sign: f"&#{ord(sign[0])};", value).split())
    return "–" if value is None else f"{value:.3f}"


def _drop_from(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path.parent) if line["step"] < step]
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)


def _start_wandb(run_dir: Path) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ModuleNotFoundError:
        raise InputError("wandb is not installed", value="run.wandb=true", fix="pip install wandb") from None
    return wandb.init(project="sif_jax", name=run_dir.name, id=run_dir.name, dir=str(run_dir), resume="allow")
