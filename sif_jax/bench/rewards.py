"""How long the rewards' geometry takes: one compiled program beside a plain loop of SciPy and shapely (io)."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from sif_jax.bench.report_line import Figures, machine, text_report
from sif_jax.config import RewardsBenchConfig
from sif_jax.errors import InputError
from sif_jax.rewards.assignment import best_total
from sif_jax.rewards.packing import TraceArrays, pack
from sif_jax.rewards.terms import Rules, Verdicts, reward_terms
from sif_jax.sif.boxes import WHOLE_IMAGE, Box
from sif_jax.sif.grammar import BoxDepth, Step, Trace
from sif_jax.sif.record import Record

# The box term is a sum of three HIoUs, each within 1e-6.
_TOLERANCE = 3e-6
# A depth at the very edge of its tolerance may fall to either side: the program has 1e-6 of slack, the loop none.
_EDGE = 1e-5

Answers = dict[str, np.ndarray]


class Workload(NamedTuple):
    traces: list[Trace]
    records: list[Record]
    depth_maps: list[Float[np.ndarray, "h w"]]  # of each completion; those of a group share one


def measure(config: RewardsBenchConfig) -> Figures:
    """Median times of both ways, which take turns in one run, and the largest difference of what they give."""
    work = random_workload(config)
    packed = jax.device_put(pack(*work))
    verdicts, rules = _all_valid(packed), _paper()
    weights = _random_weights(config)
    ways: dict[str, Callable[[], Any]] = {
        "program": lambda: jax.block_until_ready(reward_terms(packed, verdicts, rules)),
        "packing": lambda: pack(*work),
        "loop": lambda: plain_loop(work, plain_iou),
        "careful loop": lambda: plain_loop(work, careful_iou),
        "batched assignment": lambda: jax.block_until_ready(jax.jit(best_total)(weights)),
        "assignment loop": lambda: _looped_totals(np.asarray(weights)),
    }
    answers = {name: way() for name, way in ways.items()}
    seconds = _take_turns(ways, config.repeats)
    count, problems = config.completions, len(weights)
    return {
        "bench": "rewards",
        "machine": machine(),
        "config": config.model_dump(mode="json"),
        "ms_per_completion": {
            name: 1e3 * seconds[name] / count for name in ("loop", "careful loop", "program", "packing")
        },
        "us_per_assignment": {
            name: 1e6 * seconds[name] / problems for name in ("assignment loop", "batched assignment")
        },
        "max_difference": {
            "hiou": _difference(answers["loop"]["hious"], answers["program"].hious[:count, : config.areas]),
            "bbox": _difference(answers["loop"]["bbox"], answers["program"].bbox[:count]),
            "depth_consistency": _difference(
                answers["loop"]["depth_consistency"], answers["program"].depth_consistency[:count]
            ),
            "assignment": _difference(answers["assignment loop"], answers["batched assignment"]),
        },
        "ratios": {
            "program": seconds["loop"] / seconds["program"],
            "program_to_careful_loop": seconds["careful loop"] / seconds["program"],
            "program_and_packing": seconds["loop"] / (seconds["program"] + seconds["packing"]),
            "assignment": seconds["assignment loop"] / seconds["batched assignment"],
        },
    }


def report(figures: Figures) -> str:
    times, each, ratios = figures["ms_per_completion"], figures["us_per_assignment"], figures["ratios"]
    rows = [
        ["rewards: SciPy and shapely, one completion after the other", f"{times['loop']:.3f} ms", "1"],
        [
            "the same, the union of two boxes from their areas",
            f"{times['careful loop']:.3f} ms",
            f"{times['loop'] / times['careful loop']:.1f}",
        ],
        ["rewards: one compiled program", f"{times['program']:.3f} ms", f"{ratios['program']:.0f}"],
        [
            "the program, and packing the traces into arrays",
            f"{times['program'] + times['packing']:.3f} ms",
            f"{ratios['program_and_packing']:.0f}",
        ],
        ["assignment: a loop over SciPy", f"{each['assignment loop']:.2f} µs", "1"],
        ["assignment: the whole batch at once", f"{each['batched assignment']:.2f} µs", f"{ratios['assignment']:.1f}"],
    ]
    return text_report(figures, ["way", "each", "times as fast"], rows)


def plain_loop(work: Workload, iou: Callable[[Any, Any], float]) -> Answers:
    """HIoU of every area, the box term and the share of right depths, as one would write them without arrays."""
    rows = [_plain_rewards(*row, iou) for row in zip(*work, strict=True)]
    hious, bbox, depth_consistency = (np.array(column) for column in zip(*rows, strict=True))
    return {"hious": hious, "bbox": bbox, "depth_consistency": depth_consistency}


def plain_iou(a: Any, b: Any) -> float:
    return a.intersection(b).area / a.union(b).area


def careful_iou(a: Any, b: Any) -> float:
    intersection = a.intersection(b).area
    return intersection / (a.area + b.area - intersection)


def _plain_rewards(
    trace: Trace, record: Record, depth_map: Float[np.ndarray, "h w"], iou: Callable[[Any, Any], float]
) -> tuple[list[float], float, float]:
    shapely = _shapely()
    gold = [shapely.box(*box) for box in record.gold_boxes]
    hious = [_plain_hiou([shapely.box(*pair.box_norm) for pair in area], gold, iou) for area in trace.areas]
    focused = [hiou for hiou, area in zip(hious, trace.areas) if any(pair.box_norm != WHOLE_IMAGE for pair in area)]
    first = focused[0] if focused else hious[-1]
    hits = [_plain_hit(pair, depth_map) for area in trace.areas for pair in area]
    return hious, hious[-1] + (hious[-1] - first), sum(hits) / len(hits)


def _plain_hiou(pred: Sequence[Any], gold: Sequence[Any], iou: Callable[[Any, Any], float]) -> float:
    union_all = _shapely().union_all
    pairs = np.array([[iou(p, g) for g in gold] for p in pred])
    matched = pairs[linear_sum_assignment(pairs, maximize=True)]
    return (iou(union_all(pred), union_all(gold)) + matched.mean()) / 2


def _shapely() -> Any:
    try:
        import shapely
    except ModuleNotFoundError:
        raise InputError(
            "shapely is not installed", expected="the extra `bench`", fix="pip install 'sif_jax[bench]'"
        ) from None
    return shapely


def _plain_hit(pair: BoxDepth, depth_map: Float[np.ndarray, "h w"]) -> bool:
    mean = _plain_mean(pair.box_norm, depth_map)
    return abs(pair.depth - mean) <= 0.1 * mean


def _plain_mean(box: Box, depth_map: Float[np.ndarray, "h w"]) -> float:
    height, width = depth_map.shape
    x1, x2 = math.ceil(box[0] * width - 0.5), math.floor(box[2] * width + 0.5)
    y1, y2 = math.ceil(box[1] * height - 0.5), math.floor(box[3] * height + 0.5)
    return float(depth_map[y1:y2, x1:x2].mean(dtype=np.float64))


def random_workload(config: RewardsBenchConfig) -> Workload:
    """Boxes of at least 3 % of the image to a side; half of the depths are right; smooth depth maps with noise."""
    rng = np.random.default_rng(config.seed)
    num_groups = -(-config.completions // config.samples)
    maps = [_random_map(rng, config.map_px) for _ in range(num_groups)]
    gold = [tuple(map(tuple, _random_boxes(rng, config.boxes).tolist())) for _ in range(num_groups)]
    groups = [index // config.samples for index in range(config.completions)]
    records = [
        Record(dataset="bench", image="i.png", depth_image=None, problem="Q", gold_boxes=gold[group], response="A")
        for group in groups
    ]
    traces = [_random_trace(rng, config, maps[group]) for group in groups]
    return Workload(traces, records, [maps[group] for group in groups])


def _random_map(rng: np.random.Generator, side: int) -> Float[np.ndarray, "h w"]:
    slope = np.linspace(0.1, 0.8, side, dtype=np.float32)
    return slope[:, None] * slope[None] + 0.1 * rng.random((side, side), np.float32)


def _random_boxes(rng: np.random.Generator, count: int) -> Float[np.ndarray, "n 4"]:
    corners, extents = rng.integers(0, 970, (count, 2)), rng.integers(30, 500, (count, 2))
    return np.concatenate([corners, np.minimum(corners + extents, 1000)], axis=1) / 1000


def _random_trace(rng: np.random.Generator, config: RewardsBenchConfig, depth_map: np.ndarray) -> Trace:
    return Trace(tuple(_random_step(rng, config.boxes, depth_map) for _ in range(config.areas)), "a", ())


def _random_step(rng: np.random.Generator, count: int, depth_map: np.ndarray) -> Step:
    boxes: list[Box] = [tuple(box) for box in _random_boxes(rng, count).tolist()]
    return Step(tuple(BoxDepth(box, _random_depth(rng, _plain_mean(box, depth_map))) for box in boxes), "t")


def _random_depth(rng: np.random.Generator, mean: float) -> float:
    depth = round(float(mean * rng.uniform(0.8, 1.2)), 3)
    return depth + 0.001 if abs(abs(depth - mean) - 0.1 * mean) < _EDGE else depth


def _all_valid(packed: TraceArrays) -> Verdicts:
    yes, half = np.ones(len(packed.mask), bool), np.full(len(packed.mask), 0.5, np.float32)
    return Verdicts(yes, yes, half, yes, half)


def _paper() -> Rules:
    yes, no = np.array(True), np.array(False)
    return Rules(np.ones(4, np.float32), yes, yes, clip_progress=no, fractional_depth=no, count_all=no)


def _random_weights(config: RewardsBenchConfig) -> Float[jax.Array, "batch n n"]:
    shape = (config.completions * config.areas, config.boxes, config.boxes)
    return jnp.asarray(np.random.default_rng(config.seed).random(shape, np.float32))


def _looped_totals(weights: Float[np.ndarray, "batch n m"]) -> Float[np.ndarray, " batch"]:
    return np.array([problem[linear_sum_assignment(problem, maximize=True)].sum() for problem in weights])


def _take_turns(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each; in turns, so that a busy moment of the machine meets them all."""
    turns = [{name: _seconds(way) for name, way in ways.items()} for _ in range(repeats)]
    return {name: statistics.median(turn[name] for turn in turns) for name in ways}


def _seconds(way: Callable[[], Any]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def _difference(loop: np.ndarray, program: Any) -> float:
    difference = float(np.abs(loop - np.asarray(program, np.float64)).max())
    if difference > _TOLERANCE:
        raise ArithmeticError(f"the two ways differ by {difference:.2g}")
    return difference
