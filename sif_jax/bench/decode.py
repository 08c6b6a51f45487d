"""How fast completions are decoded, beside transformers' `generate` on the same weights and prompts (io)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from sif_jax.bench.bandwidth import measure_bandwidth
from sif_jax.bench.decode_workload import Timed, Workload, random_lengths
from sif_jax.bench.report_line import Figures, machine, text_report
from sif_jax.bench.transformers_generate import TransformersGenerate
from sif_jax.bench.workload import random_batch
from sif_jax.config import DecodeBenchConfig
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.layer_arrays import separate_layers
from sif_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from sif_jax.models.qwen2_5_vl.weights import load_model, save_model
from sif_jax.ops.attention_choice import choose_backend
from sif_jax.rollout import programs
from sif_jax.rollout.engine import encode_images, generate, make_slots, prefers_separate_layers
from sif_jax.rollout.sampling import Sampling, sample_keys
from sif_jax.rollout.schedule import Usage, empty_rows

OURS, THEIRS = "sif_jax", "transformers"


def measure(config: DecodeBenchConfig, *, against: str) -> Figures:
    """Both engines take turns; the first turn of each, of one token, compiles and warms up."""
    if config.checkpoint is not None:
        return _measure(config, Path(config.checkpoint), against=against)
    with TemporaryDirectory(prefix="sif-jax-bench-") as directory:
        path = Path(directory) / "model"
        _write_random_checkpoint(config, path)
        return _measure(config, path, against=against)


def report(figures: Figures) -> str:
    header = ["engine", "seconds", "of which prompts", "tokens per second", "times as fast"]
    rows = [
        [
            name,
            f"{own['seconds']:.2f}",
            f"{own['prompt_seconds']:.2f}",
            f"{own['tokens_per_second']:.0f}",
            f"{own['tokens_per_second'] / figures['engines'][OURS]['tokens_per_second']:.2f}",
        ]
        for name, own in figures["engines"].items()
    ]
    rollout, step = figures["rollout"], figures["step"]
    facts = (
        f"useful row-steps {rollout['useful_share']:.3f} of {rollout['row_steps']}; a step of {step['rows']} rows reads "
        f"{step['bytes'] / 1e6:.0f} MB at {step['bytes_per_second'] / 1e9:.1f} GB/s, {step['of_bandwidth']:.2f} of the "
        f"{step['bandwidth'] / 1e9:.1f} GB/s measured"
    )
    if THEIRS in figures["engines"]:
        facts += f"; ratio {figures['ratio']:.2f}, greedy tokens that are the same {figures['same_tokens']:.6f}"
    return text_report(figures, header, rows, facts=facts)


def _measure(config: DecodeBenchConfig, checkpoint: Path, *, against: str) -> Figures:
    architecture = Qwen2_5_VLConfig.from_directory(checkpoint)
    batch = random_batch(architecture, rows=config.prompts, tokens=config.tokens, image_px=config.image_px)
    special = tuple(range(architecture.image_token_id, architecture.text.vocab_size))
    sampling = Sampling(config.max_new_tokens, (), special, temperature=config.temperature)
    work = Workload(batch, random_lengths(config), sampling)
    attention = choose_backend("auto", config.dtype)
    graphdef, state = nnx.split(load_model(checkpoint, dtype=config.dtype, attention=attention))
    ours = _timed_ours(graphdef, (state,), config)
    engines = {OURS: ours}
    if against == "hf":
        engines[THEIRS] = TransformersGenerate(checkpoint, architecture, config.dtype).timed
    ours(work)  # compiles every program
    prompt_seconds = {name: engine(work.with_one_token()).seconds for name, engine in engines.items()}
    turns: list[dict[str, Timed]] = [
        {name: engine(work) for name, engine in engines.items()} for _ in range(config.repeats)
    ]
    seconds = {name: statistics.median(turn[name].seconds for turn in turns) for name in engines}
    tokens, usage = int(work.limits.sum()), turns[-1][OURS].usage or Usage()
    figures: Figures = {
        "bench": "decode",
        "machine": machine(),
        "config": config.model_dump(mode="json"),
        "completion_tokens": tokens,
        "engines": {
            name: {
                "seconds": seconds[name],
                "prompt_seconds": prompt_seconds[name],
                "tokens_per_second": tokens / seconds[name],
            }
            for name in engines
        },
        "rollout": {"useful_share": usage.share, "row_steps": usage.row_steps, "steps": usage.steps},
        "step": _step_figures(graphdef, (state,), config, sampling),
    }
    if against == "hf":
        figures["ratio"] = seconds[THEIRS] / seconds[OURS]
        figures["same_tokens"] = None if config.temperature else _same(turns[-1][OURS], turns[-1][THEIRS], work.limits)
    return figures


def _timed_ours(
    graphdef: nnx.GraphDef, states: tuple[nnx.State, ...], config: DecodeBenchConfig
) -> Callable[[Workload], Timed]:
    keys = sample_keys(config.seed, 0, np.arange(config.prompts), config.samples)

    def run(work: Workload) -> Timed:
        began, usage = time.perf_counter(), Usage()
        rollout = generate(
            graphdef,
            states,
            work.batch,
            encode_images(graphdef, states, work.batch),
            keys,
            sampling=work.sampling,
            pad_id=0,
            rows=config.decode_rows,
            prefill=config.prefill,
            limits=work.limits,
            usage=usage,
        )
        ids = np.asarray(rollout.ids)
        return Timed(time.perf_counter() - began, ids, usage)

    return run


def _step_figures(
    graphdef: nnx.GraphDef, states: tuple[nnx.State, ...], config: DecodeBenchConfig, sampling: Sampling
) -> Figures:
    """One decoding step with every row live and the ring at its longest, beside the bandwidth of the memory."""
    slots = make_slots(
        sampling, prompts=config.prompts, samples=config.samples, rows=config.decode_rows, prefill=config.prefill or 1
    )
    model: Qwen2_5_VL = nnx.eval_shape(lambda: nnx.merge(graphdef, *states))
    separate = prefers_separate_layers()
    layers = separate_layers(states) if separate else None
    shapes = {"dtype": model.compute_dtype, "separate": separate}
    pool = programs.empty_pool(model.config.text, slots.prompts, config.tokens, **shapes)
    cache = programs.empty_cache(model.config.text, slots.rows, slots.rings[-1], **shapes)
    rows = empty_rows(slots, slots.rows)
    rows.lengths[:], rows.limits[:] = 1, slots.max_steps + 2
    weights = model.decoder, model.embed_tokens if model.lm_head is None else model.lm_head
    moved = sum(x.nbytes for x in jax.tree.leaves((pool.prefix, cache))) + sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(weights))
    )
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        cache, emitted = programs.decode(
            graphdef, states, layers, pool, cache, np.int32(0), rows, sampling=sampling, max_steps=slots.max_steps
        )
        steps = int(emitted.steps)
        seconds.append((time.perf_counter() - began) / steps)
    fastest, bandwidth = min(seconds[1:]), measure_bandwidth()
    return {
        "rows": slots.rows,
        "seconds": fastest,
        "bytes": moved,
        "bytes_per_second": moved / fastest,
        "bandwidth": bandwidth,
        "of_bandwidth": moved / fastest / bandwidth,
    }


def _same(ours: Timed, theirs: Timed, limits: Int[np.ndarray, "P M"]) -> float:
    """The share of tokens that are equal."""
    counted = np.arange(ours.tokens.shape[-1]) < limits[..., None]
    return float((ours.tokens == theirs.tokens)[counted].mean())


def _write_random_checkpoint(config: DecodeBenchConfig, directory: Path) -> None:
    architecture = Qwen2_5_VLConfig.from_directory(config.architecture)
    model = Qwen2_5_VL(architecture, param_dtype=jnp.dtype(config.dtype), rngs=nnx.Rngs(params=config.seed))
    save_model(model, directory, source=Path(config.architecture))
