"""Answer held-out questions with a model and score the traces: greedy by default, strict always (io)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float64

from sif_jax.atomic import write_text
from sif_jax.config import EvalConfig, dump_config, flat_config
from sif_jax.data.feed import Feed, open_feed
from sif_jax.errors import InputError
from sif_jax.evals.statistics import summarise
from sif_jax.judge.completions import judge_completions
from sif_jax.judge.rule import rule_score
from sif_jax.models.qwen2_5_vl.axes import place_parameters
from sif_jax.models.qwen2_5_vl.chat import ChatProcessor
from sif_jax.models.qwen2_5_vl.checkpoint import open_model, open_processor
from sif_jax.models.qwen2_5_vl.layer_arrays import AnyState, take_apart
from sif_jax.parallel.distributed import (
    by_first,
    check_processes_agree,
    data_shard,
    gather_json,
    gather_rows,
    is_first,
    own_run,
)
from sif_jax.parallel.mesh import make_mesh
from sif_jax.parallel.partition import num_shards
from sif_jax.parallel.placement import check_rows, shard_rows
from sif_jax.progress import Progress
from sif_jax.rewards import score
from sif_jax.rollout.engine import Prompts, encode_images, make_slots, split_prompts, stream
from sif_jax.rollout.sampling import Sampling, sample_keys
from sif_jax.rollout.schedule import Task
from sif_jax.sif.record import Record

TERMS = ("format", "answer", "bbox", "depth", "total", "hiou_first", "hiou_last", "hiou_gain", "depth_consistency")
NEEDS_DEPTH = ("depth", "depth_consistency", "total")


def evaluate(config: EvalConfig) -> Path:
    """Write samples.jsonl (one line per question) and summary.json into the run's directory, and return it.

    Of several processes, each loads the questions of its devices and scores an equal run of the answers; the first writes.
    """
    mesh = make_mesh(config.mesh)
    check_rows(config.batch_size, mesh)
    check_processes_agree(flat_config(config))
    by_first(lambda: _make_directory(config.run.directory))
    processor = open_processor(config.model)
    with jax.set_mesh(mesh):
        feed, answers = _answers(processor, config, mesh)
    indices = sorted(answers)
    own = indices[own_run(len(indices))]
    scored = [
        sample
        for start in range(0, len(own), config.batch_size)
        for sample in _samples(own[start : start + config.batch_size], answers, feed, processor, config)
    ]
    samples = [sample for part in gather_json(scored) for sample in part]
    by_first(lambda: _write_results(samples, feed, config))
    return config.run.directory


def _answers(processor: ChatProcessor, config: EvalConfig, mesh: Mesh) -> tuple[Feed, dict[int, Task]]:
    """The completion of each record that could be read; an answer that ends makes room for the next question."""
    model, shard, lanes = open_model(config.model, mesh), data_shard(mesh), num_shards(mesh, "batch")
    place_parameters(model, mesh)
    feed = open_feed(
        config.data,
        config.prompt,
        processor,
        model.config.vision,
        target="none",
        batch_size=config.batch_size,
        epochs=1,
        shuffle=False,
        shard=shard.index,
        num_shards=shard.count,
        fixed_shape=jax.process_count() > 1,
    )
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        stop_ids=processor.eos_ids,
        forbidden_ids=processor.forbidden_ids(model.config.text.vocab_size),
        temperature=config.temperature,
    )
    graphdef, state = nnx.split(model)
    states = (state if config.model.scan_layers else take_apart(state),)
    each = config.batch_size // lanes
    slots = make_slots(sampling, lanes=lanes, prompts=2 * each, samples=1, rows=each, prefill=_prefill(each))
    progress = Progress(f"eval {config.run.name}", len(feed.records), shown=is_first())
    answers = {}
    prompts = _prompts(graphdef, states, feed, config, mesh)
    for task in stream(graphdef, states, prompts, sampling=sampling, slots=slots):
        answers[task.prompt] = task
        progress.advance()
    progress.close()
    return feed, answers


def _prefill(rows: int) -> int:
    """Prompts of a lane computed in one pass: a quarter of its rows, so that few rows wait for others to end."""
    return next(size for size in range(-(-rows // 4), 0, -1) if rows % size == 0)


def _prompts(
    graphdef: nnx.GraphDef, states: tuple[AnyState, ...], feed: Feed, config: EvalConfig, mesh: Mesh
) -> Iterator[Prompts]:
    shard, lanes = data_shard(mesh), num_shards(mesh, "batch")
    for loaded in feed.loader:
        numbers = gather_rows([row[0] if row else -1 for row in loaded.records], shard)
        keys = np.asarray(jax.random.key_data(sample_keys(config.run.seed, 0, np.maximum(numbers, 0), 1)))
        limits = np.full((len(numbers), 1), config.max_new_tokens, np.int32)
        batch = shard_rows(loaded.arrays, mesh, shard)
        whole = Prompts(batch, encode_images(graphdef, states, batch), numbers, keys, limits)
        yield from split_prompts(whole, _prefill(len(numbers) // lanes), lanes=lanes)


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


def _make_directory(directory: Path) -> None:
    """Before the model is read: an evaluation whose results cannot be written is not begun."""
    with _disk_problems(directory):
        directory.mkdir(parents=True, exist_ok=True)


def _write_results(samples: Sequence[Mapping[str, Any]], feed: Feed, config: EvalConfig) -> None:
    feed.report_skipped()
    directory = config.run.directory
    summary = summarise(samples, seed=config.run.seed).to_json() | {
        "model": config.model.path,
        "data": config.data.path,
        "skipped": {str(row): reason for row, reason in feed.skipped.items()},
    }
    with _disk_problems(directory):
        dump_config(config, directory / "config.yaml")
    write_text(directory / "samples.jsonl", "".join(json.dumps(sample, allow_nan=False) + "\n" for sample in samples))
    write_text(directory / "summary.json", json.dumps(summary, indent=2) + "\n")


@contextmanager
def _disk_problems(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write the results ({error.strerror})", file=directory, fix="set run.root") from error
