"""Answer held-out questions with a model and score the traces: greedy by default, strict always (io)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float64

from sif_jax.config import EvalConfig, dump_config
from sif_jax.data.batch import Batch
from sif_jax.data.feed import Feed, open_feed
from sif_jax.errors import InputError
from sif_jax.evals.statistics import summarise
from sif_jax.judge.completions import judge_completions
from sif_jax.judge.rule import rule_score
from sif_jax.models.qwen2_5_vl.chat import ChatProcessor
from sif_jax.models.qwen2_5_vl.checkpoint import open_model, open_processor
from sif_jax.progress import Progress
from sif_jax.rewards import score
from sif_jax.rollout.engine import Rollout, encode_images, generate
from sif_jax.rollout.sampling import Sampling, sample_keys
from sif_jax.rollout.text import decode_rollout
from sif_jax.sif.record import Record

TERMS = ("format", "answer", "bbox", "depth", "total", "hiou_first", "hiou_last", "hiou_gain", "depth_consistency")
NEEDS_DEPTH = ("depth", "depth_consistency", "total")


def evaluate(config: EvalConfig) -> Path:
    """Write samples.jsonl (one line per question) and summary.json into the run's directory, and return it."""
    directory, processor, model = config.run.directory, open_processor(config.model), open_model(config.model)
    feed = open_feed(
        config.data,
        config.prompt,
        processor,
        model.config.vision,
        target="none",
        batch_size=config.batch_size,
        epochs=1,
        shuffle=False,
    )
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        stop_ids=processor.eos_ids,
        forbidden_ids=processor.forbidden_ids(model.config.text.vocab_size),
        temperature=config.temperature,
    )
    graphdef, state = nnx.split(model)
    progress = Progress(f"eval {config.run.name}", -(-len(feed.records) // config.batch_size))
    samples = []
    for batch in feed.loader:
        rollout = _answer(graphdef, state, batch, sampling, seed=config.run.seed, pad_id=processor.pad_id)
        samples += _samples(rollout, batch, feed, processor, config)
        progress.advance()
    progress.close()
    feed.report_skipped()
    summary = summarise(samples, seed=config.run.seed).to_json() | {
        "model": config.model.path,
        "data": config.data.path,
        "skipped": {str(row): reason for row, reason in feed.skipped.items()},
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        dump_config(config, directory / "config.yaml")
        _write(directory / "samples.jsonl", "".join(json.dumps(sample, allow_nan=False) + "\n" for sample in samples))
        _write(directory / "summary.json", json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write the results ({error.strerror})", file=directory, fix="set run.root") from error
    return directory


def _answer(
    graphdef: nnx.GraphDef, state: nnx.State, batch: Batch, sampling: Sampling, *, seed: int, pad_id: int
) -> Rollout:
    ids = np.array([row[0] if row else 0 for row in batch.records], np.int32)
    features = encode_images(graphdef, (state,), batch.arrays)
    keys = sample_keys(seed, 0, ids, 1)
    return generate(graphdef, (state,), batch.arrays, features, keys, sampling=sampling, pad_id=pad_id)


def _samples(
    rollout: Rollout, batch: Batch, feed: Feed, processor: ChatProcessor, config: EvalConfig
) -> list[dict[str, Any]]:
    """One row per question of the batch; rows of padding are left out."""
    directory = config.run.directory
    indices = [row[0] for row in batch.records if row]
    completions = decode_rollout(rollout, processor)[: len(indices)]
    records = [feed.records[index] for index in indices]
    judged = _judge(completions, records, config)
    scores = score(completions, records, judge_scores=judged, depth_maps=feed.depth_maps(indices))
    finished = np.asarray(rollout.finished)[:, 0]
    return [
        {
            "id": str(feed.file.rows[index]),
            "scene": str(record.extra.get("scene", record.image)),
            "family": str(record.extra.get("family", record.dataset)),
            "image": _relative(feed.file.image_root / record.image, directory),
            "depth_image": record.depth_image and _relative(feed.file.image_root / record.depth_image, directory),
            "problem": record.problem,
            "gold_boxes": [list(box) for box in record.gold_boxes],
            "response": record.response,
            "completion": completions[row],
            "scores": {term: _measured(getattr(scores, term)[row], term, record) for term in TERMS},
            "judge": float(judged[row]),
            "finish_reason": "stop" if finished[row] else "length",
        }
        for row, (index, record) in enumerate(zip(indices, records, strict=True))
    ]


def _judge(
    completions: Sequence[str], records: Sequence[Record], config: EvalConfig
) -> Float64[np.ndarray, " completion"]:
    if config.target == "cot":
        return judge_completions(completions, records)
    return np.array([rule_score(record.problem, record.response, text) for text, record in zip(completions, records)])


def _measured(value: float, term: str, record: Record) -> float | None:
    """None for what a record without a depth map cannot tell."""
    return None if record.depth_image is None and term in NEEDS_DEPTH else float(value)


def _relative(path: Path, directory: Path) -> str:
    return os.path.relpath(path, directory)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
