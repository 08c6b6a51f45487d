"""Builds SIF-Scenes: pictures, depth maps and SIF rows of every split, the same bytes for the same seed (io)."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zlib import Z_RLE, crc32

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from tqdm import tqdm

from sif_jax.data.scenes.chain import think
from sif_jax.data.scenes.config import ScenesConfig
from sif_jax.data.scenes.layout import sample_scene, visible_boxes
from sif_jax.data.scenes.questions import Question, ask
from sif_jax.data.scenes.render import paint
from sif_jax.data.scenes.view import View
from sif_jax.errors import InputError
from sif_jax.sif.depth_codec import box_mean_depth, encode_depth, normalise_depth
from sif_jax.sif.grammar import render
from sif_jax.sif.record import Record, write_records

DATASET = "sif-scenes"
MANIFEST = "manifest.json"
# Of the generator: to be raised when the same seed comes to give other bytes, so that old builds are made anew.
GENERATOR = 2
ATTEMPTS = 500


@dataclass(frozen=True)
class SceneRows:
    """One scene: its picture, its depth map in the colour code and its rows."""

    rgb: UInt8[np.ndarray, "h w 3"]
    depth_rgb: UInt8[np.ndarray, "h w 3"]
    records: tuple[Record, ...]


def build_scenes(
    out_dir: str | Path, config: ScenesConfig, splits: Mapping[str, int], seed: int, workers: int = 1
) -> dict[str, Path]:
    """Writes `images/`, `depth/` and SPLIT.json for so many scenes of each split, and returns the JSON files.

    The manifest is written last: a build that was interrupted has none and starts over, one that finished with the same
    config, seed and splits is left as it is.

    Raises:
      InputError: a split's name or size is impossible, or the families cannot be asked of such scenes.
    """
    _check_splits(splits)
    out_dir = Path(out_dir)
    paths = {split: out_dir / f"{split}.json" for split in splits}
    manifest = {"generator": GENERATOR, "seed": seed, "splits": dict(splits), "config": asdict(config)}
    if _is_built(out_dir / MANIFEST, manifest) and all(path.is_file() for path in paths.values()):
        return paths
    (out_dir / MANIFEST).unlink(missing_ok=True)
    for folder in ("images", "depth"):
        (out_dir / folder).mkdir(parents=True, exist_ok=True)
    jobs = [(split, number) for split, count in splits.items() for number in range(1, count + 1)]
    records = list(
        tqdm(_run(partial(_write_scene, out_dir, config, seed), jobs, workers), "scenes", len(jobs), unit="scene")
    )
    for split, path in paths.items():
        write_records(path, [row for (name, _), rows in zip(jobs, records) if name == split for row in rows])
    _write_manifest(out_dir / MANIFEST, manifest)
    return paths


def make_scene(config: ScenesConfig, seed: int, split: str, number: int) -> SceneRows:
    """A scene and its rows; each (seed, split, number) has a random stream of its own, so splits share no scene."""
    rng = np.random.default_rng([seed, crc32(split.encode()), number])
    names, weights = zip(*config.families)
    chosen = rng.choice(names, config.questions_per_scene, replace=False, p=np.array(weights) / sum(weights)).tolist()
    name = f"{split}-{number:05d}"
    for _ in range(ATTEMPTS):
        scene, geometry = sample_scene(rng, config)
        depth_norm = _quantised(normalise_depth(geometry.depth_m))
        boxes_norm = visible_boxes(geometry, len(scene.solids)).round(3)
        depths = [box_mean_depth(depth_norm, tuple(box)) for box in boxes_norm.tolist()]
        view = View(scene, boxes_norm, np.array(depths, np.float64))
        questions = _ask_all(view, chosen, rng)
        if questions is not None:
            records = tuple(_records(view, depth_norm, questions, name, rng, config))
            return SceneRows(paint(scene, geometry), encode_depth(depth_norm), records)
    raise InputError(
        f"no scene among {ATTEMPTS} lets these families be asked",
        value=chosen,
        fix="allow more solids, or leave out families (distance needs three solids)",
    )


def _ask_all(view: View, families: list[str], rng: np.random.Generator) -> dict[str, Question] | None:
    questions: dict[str, Question] = {}
    for family in families:
        question = ask(view, family, rng)
        if question is None:
            return None
        questions[family] = question
    return questions


def _records(
    view: View,
    depth_norm: Float[np.ndarray, "h w"],
    questions: Mapping[str, Question],
    name: str,
    rng: np.random.Generator,
    config: ScenesConfig,
) -> Iterator[Record]:
    boxes = [tuple(box) for box in view.boxes_norm.tolist()]
    solids = [asdict(solid) | {"box": list(box)} for solid, box in zip(view.solids, boxes)]
    for family, question in questions.items():
        gold_boxes = tuple(boxes[index] for index in question.gold)
        steps = think(question, gold_boxes, depth_norm, rng, config)
        yield Record(
            dataset=DATASET,
            image=f"images/{name}.png",
            depth_image=f"depth/{name}.png",
            problem=question.problem,
            gold_boxes=gold_boxes,
            response=question.answer,
            completion=render(steps, question.answer),
            extra={"scene": name, "family": family, "solids": solids},
        )


def _quantised(depth_norm: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """The depth that the 8-bit map will hold, so that what the text says of it is what a reader of the map finds."""
    return (1 - np.rint((1 - depth_norm) * 255) / 255).astype(np.float32)


def _write_scene(out_dir: Path, config: ScenesConfig, seed: int, job: tuple[str, int]) -> tuple[Record, ...]:
    made = make_scene(config, seed, *job)
    first = made.records[0]
    for pixels, path in ((made.rgb, first.image), (made.depth_rgb, first.depth_image)):
        Image.fromarray(pixels).save(out_dir / str(path), compress_level=1, compress_type=Z_RLE)
    return made.records


def _run(work: partial[tuple[Record, ...]], jobs: list[tuple[str, int]], workers: int) -> Iterable[tuple[Record, ...]]:
    if workers <= 1:
        yield from map(work, jobs)
        return
    # Forking a process whose threads run (JAX has some) can hang.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, jobs, chunksize=8)


def _check_splits(splits: Mapping[str, int]) -> None:
    for split, count in splits.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", split) or split == MANIFEST.removesuffix(".json"):
            raise InputError("a split cannot have this name", value=split, expected="letters, digits, _ and -")
        if count < 1:
            raise InputError(f"split {split!r} has no scene", value=count, expected="at least 1 scene")


def _is_built(path: Path, manifest: dict[str, Any]) -> bool:
    """A manifest that cannot be read is that of an unfinished build."""
    try:
        return json.loads(path.read_text()) == json.loads(json.dumps(manifest))
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(partial_path, path)
