"""Drawn scenes with exact depth, and the files of runs that answer questions about them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from sif_jax.evals.statistics import summarise
from sif_jax.sif.boxes import Box
from sif_jax.sif.depth_codec import encode_depth
from sif_jax.sif.grammar import BoxDepth, Step, render

FAMILIES = ("position", "counting", "nearest", "colour")
WIDTH, HEIGHT = 320, 240


def draw_scene(folder: Path, name: str, rng: np.random.Generator) -> tuple[list[float], float]:
    """Balls on a floor as an image and its depth map; returns the box and depth of the nearest ball."""
    rows = np.linspace(1, 0, HEIGHT, dtype=np.float32)[:, None]
    depth = np.repeat(0.15 + 0.8 * rows, WIDTH, axis=1)
    image = Image.fromarray(
        (np.array([198, 205, 214]) - 60 * rows[..., None] * np.ones((1, WIDTH, 1))).astype(np.uint8)
    )
    canvas = ImageDraw.Draw(image)
    box = [0.0, 0.0, 1.0, 1.0]
    distance = 1.0
    for distance in sorted(rng.uniform(0.2, 0.85, 4), reverse=True):
        radius = 45 * (1.15 - distance)
        x, y = rng.uniform(40, WIDTH - 40), HEIGHT * (1.05 - distance) - radius / 2
        canvas.ellipse([x - radius, y - radius, x + radius, y + radius], fill=tuple(rng.integers(40, 230, 3)))
        grid_y, grid_x = np.mgrid[:HEIGHT, :WIDTH]
        depth[(grid_x - x) ** 2 + (grid_y - y) ** 2 <= radius**2] = distance
        corners = np.array([x - radius, y - radius, x + radius, y + radius]) / [WIDTH, HEIGHT, WIDTH, HEIGHT]
        box = corners.clip(0, 1).round(3).tolist()
    image.filter(ImageFilter.GaussianBlur(0.8)).save(folder / f"{name}.png")
    Image.fromarray(encode_depth(depth)).save(folder / f"{name}_depth.png")
    return box, float(distance)


def make_sample(folder: Path, number: int, skill: float, rng: np.random.Generator) -> dict:
    """One held-out question; a higher skill answers and looks better. The scene depends on the number alone."""
    box, depth = draw_scene(folder, f"scene{number // 2}", np.random.default_rng(number // 2))
    family, hit = FAMILIES[number % len(FAMILIES)], rng.random() < skill
    noise = rng.normal(0, 0.12 * (1 - skill), 4)
    looked = np.sort(np.clip(np.array(box) + noise, 0, 1).reshape(2, 2), axis=0).reshape(4)
    wide = np.clip(np.add(box, [-0.15, -0.15, 0.15, 0.15]), 0, 1)
    steps = [
        Step((BoxDepth((0.0, 0.0, 1.0, 1.0), 0.551),), "Several balls lie on a floor that runs away from the camera."),
        Step((BoxDepth(_box(wide), 0.4),), "The lower part of the scene holds the largest balls, so look there."),
        Step((BoxDepth(_box(looked), float(np.clip(depth + noise[0], 0, 1))),), "This ball has the smallest depth."),
    ]
    completion = render(steps, "the front ball" if hit else "the ball at the back")
    if rng.random() > skill + 0.3:
        completion = "The nearest one is <b>the front ball</b>, I think. " + completion[: rng.integers(30, 300)]
    answer, gain = float(hit), float(rng.normal(0.3 * skill, 0.05))
    last = float(np.clip(skill + rng.normal(0, 0.1), 0, 1))
    scores = {
        "format": float(completion.startswith("<think>")),
        "answer": answer,
        "bbox": last + gain,
        "depth": float(rng.random() < skill),
        "hiou_first": last - gain,
        "hiou_last": last,
        "hiou_gain": gain,
        "depth_consistency": float(rng.random() < skill),
    }
    scores["total"] = sum(scores[term] for term in ("format", "answer", "bbox", "depth"))
    return {
        "id": f"q{number:03d}",
        "scene": f"scene{number // 2}",
        "family": family,
        "image": f"scene{number // 2}.png",
        "depth_image": f"scene{number // 2}_depth.png",
        "problem": "Which ball is nearest to the camera?",
        "gold_boxes": [box],
        "response": "the front ball",
        "completion": completion,
        "scores": scores,
        "judge": answer,
        "finish_reason": "stop" if completion.endswith("</answer>") else "length",
    }


def _box(corners: np.ndarray) -> Box:
    x1, y1, x2, y2 = corners.tolist()
    return x1, y1, x2, y2


def write_samples(folder: Path, samples: list[dict]) -> Path:
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summarise(samples).to_json()), encoding="utf-8")
    return path


def write_evaluation(folder: Path, questions: int, skill: float) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(int(skill * 1000))
    return write_samples(folder, [make_sample(folder, number, skill, rng) for number in range(questions)])


def write_sft_metrics(path: Path, steps: int) -> Path:
    rng, t = np.random.default_rng(0), np.linspace(0, 1, steps)
    columns = {
        "loss": 0.35 + 1.9 * np.exp(-5 * t) + rng.normal(0, 0.05, steps),
        "learning_rate": 1e-4 * np.minimum(t / 0.1, 0.5 * (1 + np.cos(np.pi * np.maximum(t - 0.1, 0) / 0.9))),
        "grad_norm": 0.4 + np.exp(-3 * t) + rng.gamma(2, 0.05, steps),
        "tokens_per_second": 11_800 + rng.normal(0, 250, steps),
        "padding_fraction": rng.uniform(0.02, 0.09, steps),
    }
    return _write_columns(path, columns)


def write_grpo_metrics(path: Path, steps: int) -> Path:
    rng, t = np.random.default_rng(1), np.linspace(0, 1, steps)
    terms = {
        "reward/format": np.minimum(1, 0.75 + 0.3 * t + rng.normal(0, 0.05, steps)),
        "reward/answer": 0.4 + 0.35 * t + rng.normal(0, 0.1, steps),
        "reward/bbox": 0.45 + 0.4 * t + rng.normal(0, 0.08, steps),
        "reward/depth": 0.2 + 0.4 * t + rng.normal(0, 0.09, steps),
    }
    others = {
        "kl": 0.05 * t**0.7 + rng.gamma(2, 0.002, steps),
        "entropy": 0.6 - 0.25 * t + rng.normal(0, 0.02, steps),
        "clip_fraction": rng.gamma(2, 0.002, steps),
        "completion_length": 210 + 40 * t + rng.normal(0, 9, steps),
    }
    return _write_columns(path, {"reward/total": sum(terms.values())} | terms | others)


def _write_columns(path: Path, columns: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (dict(zip(columns, map(float, values))) for values in zip(*columns.values()))
    path.write_text("".join(json.dumps({"step": step} | row) + "\n" for step, row in enumerate(rows, 1)))
    return path
