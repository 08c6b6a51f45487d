"""Answer held-out questions with a model and score the traces: greedy by default, strict always (io)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float64

from sif_jax.config import EvalConfig, dump_config
from sif_jax.data.feed import Feed, open_feed
from sif_jax.errors import InputError
from sif_jax.evals.statistics import summarise
from sif_jax.judge.completions import judge_completions
from sif_jax.judge.rule import rule_score
from sif_jax.models.qwen2_5_vl.chat import ChatProcessor
from sif_jax.models.qwen2_5_vl.checkpoint import open_model, open_processor
from sif_jax.progress import Progress
from sif_jax.rewards import score
from sif_jax.rollout.engine import Prompts, encode_images, make_slots, split_prompts, stream
from sif_jax.rollout.sampling import Sampling, sample_keys
from sif_jax.rollout.schedule import Task
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
    answers = _answers(nnx.split(model), feed, sampling, processor, config)
    indices = sorted(answers)
    samples = [
        sample
        for start in range(0, len(indices), config.batch_size)
        for sample in _samples(indices[start : start + config.batch_size], answers, feed, processor, config)
    ]
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


def _answers(
    model: tuple[nnx.GraphDef, nnx.State], feed: Feed, sampling: Sampling, processor: ChatProcessor, config: EvalConfig
) -> dict[int, Task]:
    """The completion of each record that could be read; an answer that ends makes room for the next question."""
    graphdef, states = model[0], (model[1],)
    slots = make_slots(
        sampling, prompts=2 * config.batch_size, samples=1, rows=config.batch_size, prefill=_prefill(config)
    )
    progress = Progress(f"eval {config.run.name}", len(feed.records))
    answers = {}
    for task in stream(graphdef, states, _prompts(graphdef, states, feed, config), sampling=sampling, slots=slots):
        answers[task.prompt] = task
        progress.advance()
    progress.close()
    return answers


def _prefill(config: EvalConfig) -> int:
    """Prompts computed in one pass: a quarter of the rows, so that few rows wait for others to end."""
    return next(size for size in range(-(-config.batch_size // 4), 0, -1) if config.batch_size % size == 0)


def _prompts(
    graphdef: nnx.GraphDef, states: tuple[nnx.State, ...], feed: Feed, config: EvalConfig
) -> Iterator[Prompts]:
    for batch in feed.loader:
        numbers = np.array([row[0] if row else -1 for row in batch.records], np.int32)
        keys = np.asarray(jax.random.key_data(sample_keys(config.run.seed, 0, np.maximum(numbers, 0), 1)))
        limits = np.full((len(numbers), 1), config.max_new_tokens, np.int32)
        features = encode_images(graphdef, states, batch.arrays)
        yield from split_prompts(Prompts(batch.arrays, features, numbers, keys, limits), _prefill(config))


def _samples(
    indices: Sequence[int],
    answers: Mapping[int, Task],
    feed: Feed,
    processor: ChatProcessor,
    config: EvalConfig,
) -> list[dict[str, Any]]:
    """One row per question."""
    directory = config.run.directory
    completions = [processor.decode(answers[index].ids) for index in indices]
    records = [feed.records[index] for index in indices]
    judged = _judge(completions, records, config)
    scores = score(completions, records, judge_scores=judged, depth_maps=feed.depth_maps(indices))
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
            "finish_reason": "stop" if answers[index].stopped else "length",
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
