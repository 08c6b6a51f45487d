"""The hacking suite: what each trick earns beside the honest answer, under each setting of the rewards (io)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from sif_jax.bench.report_line import Figures, machine, text_report
from sif_jax.bench.tricks import TRICKS, DepthMap, Draft, Question, draft_honestly
from sif_jax.config import HacksBenchConfig, RewardsConfig
from sif_jax.judge.completions import judge_completions
from sif_jax.rewards.scoring import score
from sif_jax.sif.boxes import Box
from sif_jax.sif.record import Record

SETTINGS: Mapping[str, RewardsConfig] = {
    "paper": RewardsConfig(),
    "paper, max": RewardsConfig(pair_denominator="max"),
    "release": RewardsConfig(compat="release"),
    "release, max": RewardsConfig(compat="release", pair_denominator="max"),
    "paper, max, no box progress": RewardsConfig(pair_denominator="max", bbox_progress=False),
    # With a share of the depths paid, a trace does not earn by showing fewer of them.
    "hardened": RewardsConfig(compat="release", pair_denominator="max", bbox_progress=False),
}
_MAP_PX = 64
_ANSWERS = (
    ("left", "right", "front", "behind"),
    ("red", "green", "blue", "yellow"),
    ("yes", "no"),
    ("1", "2", "3", "4", "5"),
)
_LETTERS = "ABCD"


def measure(config: HacksBenchConfig) -> Figures:
    """Per trick and setting: the mean gain in total reward over the same policy without the trick, its standard error,
    and the share of completions that it pays for."""
    rng = np.random.default_rng(config.seed)
    drafts = [draft_honestly(question, rng) for question in random_questions(config.records, rng)]
    honest = _totals(drafts, [draft.text() for draft in drafts])
    tricks = {
        (family, name): _gains(_totals(drafts, [trick(draft) for draft in drafts]), honest)
        for family, members in TRICKS.items()
        for name, trick in members.items()
    }
    return {
        "bench": "hacks",
        "machine": machine(),
        "config": config.model_dump(mode="json"),
        "settings": {name: rewards.model_dump(mode="json") for name, rewards in SETTINGS.items()},
        "honest": {setting: float(totals.mean()) for setting, totals in honest.items()},
        "tricks": {family: {name: tricks[family, name] for name in members} for family, members in TRICKS.items()},
    }


def report(figures: Figures) -> str:
    """Gains; bold where the trick pays by more than two standard errors."""
    header = ["trick", *SETTINGS]
    honest = ["honest, total reward", *(f"{figures['honest'][setting]:.2f}" for setting in SETTINGS)]
    rows = [
        [f"{family}: {name}", *(_cell(gains[setting]) for setting in SETTINGS)]
        for family, members in figures["tricks"].items()
        for name, gains in members.items()
    ]
    return text_report(figures, header, [honest, *rows])


def pays(gain: Mapping[str, float]) -> bool:
    return gain["mean"] > 2 * gain["error"]


def _cell(gain: Mapping[str, float]) -> str:
    text = f"{gain['mean']:+.2f}"
    return f"**{text}**" if pays(gain) else text


def _totals(drafts: Sequence[Draft], completions: Sequence[str]) -> dict[str, Float[np.ndarray, " completion"]]:
    records = [draft.question.record for draft in drafts]
    judged = judge_completions(completions, records)
    depth_maps = [draft.question.depth_norm for draft in drafts]
    return {
        name: score(completions, records, judge_scores=judged, depth_maps=depth_maps, rewards=rewards).total
        for name, rewards in SETTINGS.items()
    }


def _gains(
    totals: Mapping[str, Float[np.ndarray, " completion"]], honest: Mapping[str, Float[np.ndarray, " completion"]]
) -> dict[str, dict[str, float]]:
    return {setting: _gain(totals[setting] - honest[setting]) for setting in SETTINGS}


def _gain(differences: Float[np.ndarray, " completion"]) -> dict[str, float]:
    error = differences.std() / np.sqrt(len(differences))
    # Totals are float32 sums.
    share = (differences > 1e-5).mean()
    return {"mean": float(differences.mean()), "error": float(error), "share": float(share)}


def random_questions(count: int, rng: np.random.Generator) -> Iterator[Question]:
    """Questions of every kind of answer in turn, about one to four boxes in a smooth depth map."""
    for index in range(count):
        candidates = _ANSWERS[index % len(_ANSWERS)]
        gold, lettered = str(rng.choice(candidates)), len(candidates) == len(_LETTERS) and index % 8 < 4
        options = "".join(f"\n{letter}. {words}" for letter, words in zip(_LETTERS, candidates)) if lettered else ""
        record = Record(
            dataset="hacks",
            image="i.png",
            depth_image="d.png",
            problem=f"Which is it?{options}",
            gold_boxes=tuple(_random_box(rng) for _ in range(rng.integers(1, 5))),
            response=_LETTERS[candidates.index(gold)] if lettered else gold,
        )
        yield Question(record, _random_map(rng), tuple(_LETTERS) if lettered else candidates)


def _random_box(rng: np.random.Generator) -> Box:
    width, height = rng.uniform(0.08, 0.4, 2)
    x1, y1 = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    return round(x1, 3), round(y1, 3), round(x1 + width, 3), round(y1 + height, 3)


def _random_map(rng: np.random.Generator) -> DepthMap:
    """Depths of a coarse grid, interpolated."""
    coarse, at = rng.uniform(0.1, 1, (5, 5)), np.linspace(0, 4, _MAP_PX)
    rows = np.stack([np.interp(at, np.arange(5), column) for column in coarse.T], axis=1)
    return np.stack([np.interp(at, np.arange(5), row) for row in rows]).astype(np.float32)
