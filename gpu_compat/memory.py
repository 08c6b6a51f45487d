"""What a training config needs on a GPU, part by part, and what would fit where it does not (io).

python -m gpu_compat.memory --gpu h20 --count 8 --model 7B [--config configs/paper/sft.yaml] [--fsdp 8] [key=value ...]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gpu_compat.cards import CARDS, Card
from gpu_compat.environment import MEMORY_FRACTION

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # shapes only; a GPU would be filled for nothing

from sif_jax.config import GrpoConfig, SftConfig, TrainConfig, load_config
from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.plan.memory_model import Phase, grpo_phases, held, optimizer_phase, sft_phases
from sif_jax.plan.model_size import ModelSize, model_size

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("3B", "7B", "32B", "72B")
PAPER = ("configs/paper/sft.yaml", "configs/paper/grpo.yaml")
GIB = 2**30
MAX_DEVICES = 256  # how far the search for what would fit goes


class Setting(NamedTuple):
    config: TrainConfig
    model: Qwen2_5_VLConfig
    size: ModelSize
    card: Card
    devices: int
    fsdp: int


class MemoryPlan(NamedTuple):
    held: dict[str, float]
    phases: list[Phase]
    budget: float

    @property
    def head_room(self) -> float:
        return self.budget - sum(self.held.values()) - max(phase.total for phase in self.phases)


def plan(setting: Setting) -> MemoryPlan:
    """
    Raises:
      InputError: the batch does not divide over the devices, or they do not divide into groups of `fsdp`.
    """
    config, devices = setting.config, setting.devices
    if devices % setting.fsdp:
        expected = f"a divisor of {devices}"
        raise InputError("the GPUs do not divide", value=f"--fsdp {setting.fsdp}", expected=expected)
    phases = (
        grpo_phases(config, setting.model, devices, setting.fsdp)
        if isinstance(config, GrpoConfig)
        else sft_phases(_as_sft(config), setting.model, devices)
    )
    budget = MEMORY_FRACTION * setting.card.memory_gib * GIB
    phases.append(optimizer_phase(setting.size, setting.fsdp))
    return MemoryPlan(held(setting.size, config, setting.fsdp), phases, budget)


def _as_sft(config: TrainConfig) -> SftConfig:
    assert isinstance(config, SftConfig)
    return config


def remedies(setting: Setting) -> Iterator[str]:
    """The first change of each kind that fits, the cheapest kind first."""
    for changes in (
        _remat(setting),
        _fewer_rows(setting),
        _more_split(setting),
        _more_gpus(setting),
        _other_cards(setting),
    ):
        found = next((text for text, changed in changes if _fits(changed)), None)
        if found:
            yield found


def _fits(setting: Setting) -> bool:
    try:
        return plan(setting).head_room >= 0
    except InputError:  # a batch that does not divide over so many devices
        return False


def _with(setting: Setting, **changes: object) -> Setting:
    return setting._replace(config=setting.config.model_copy(update=changes))


def _remat(setting: Setting) -> Iterator[tuple[str, Setting]]:
    model = setting.config.model
    if model.remat != "full":
        yield "model.remat=full", _with(setting, model=model.model_copy(update={"remat": "full"}))


def _fewer_rows(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """The same optimizer step in smaller parts."""
    config = setting.config
    while isinstance(config, SftConfig) and config.batch_size % 2 == 0:
        rows, parts = config.batch_size // 2, config.accumulation * 2
        config = config.model_copy(update={"batch_size": rows, "accumulation": parts})
        yield f"batch_size={rows} accumulation={parts}", setting._replace(config=config)


def _more_split(setting: Setting) -> Iterator[tuple[str, Setting]]:
    for fsdp in range(setting.fsdp + 1, setting.devices + 1):
        if setting.devices % fsdp == 0:
            yield f"weights split over {fsdp} GPUs (--fsdp {fsdp})", setting._replace(fsdp=fsdp)


def _more_gpus(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """At least one row, or one prompt, for each of them."""
    key = "batch_size" if isinstance(setting.config, SftConfig) else "prompts_per_step"
    devices = setting.devices * 2
    while devices <= MAX_DEVICES:
        rows = max(getattr(setting.config, key), devices)
        wider = _with(setting, **{key: rows})._replace(devices=devices, fsdp=devices)
        yield f"{devices} GPUs, weights split over all (--count {devices} --fsdp {devices} {key}={rows})", wider
        devices *= 2


def _other_cards(setting: Setting) -> Iterator[tuple[str, Setting]]:
    for name, card in sorted(CARDS.items(), key=lambda item: item[1].memory_gib):
        if card.memory_gib > setting.card.memory_gib:
            yield f"the same on {name} (--gpu {name})", setting._replace(card=card)
            for text, split in _more_split(setting._replace(card=card)):
                yield f"{name} (--gpu {name}), {text}", split


def report(setting: Setting, title: str) -> tuple[str, bool]:
    """A table in GiB per GPU, and whether it fits."""
    result = plan(setting)
    size = setting.size
    lines = [
        f"{title}: {size.parameters:,} parameters, {size.trainable:,} trained",
        f"on {setting.devices} x {setting.card.name}, weights split over {setting.fsdp}; GiB per GPU",
        *(_row(name, amount) for name, amount in result.held.items() if amount),
    ]
    for phase in result.phases:
        lines += [f"  {phase.name}", *(_row(f"  {name}", amount) for name, amount in phase.parts.items() if amount)]
    needed = result.budget - result.head_room
    lines += [_row("needed", needed), _row(f"given to XLA ({MEMORY_FRACTION:.0%})", result.budget)]
    fits = result.head_room >= 0
    if fits:
        lines.append(_row("head-room", result.head_room))
    else:
        lines.append(f"does not fit: {-result.head_room / GIB:.2f} GiB too much. What would:")
        lines += [f"  - {remedy}" for remedy in remedies(setting)] or [
            "  - nothing that was tried; take a smaller model"
        ]
    return "\n".join(lines), fits


def table(config: TrainConfig, count: int) -> str:
    """Every card and model: in how many parts the weights must be split, and the head-room then."""
    lines = [f"| GPU x {count} | " + " | ".join(MODELS) + " |", "|---|" + "---:|" * len(MODELS)]
    settings = {model: open_setting(config, model, "h20", count, 1) for model in MODELS}
    for name, card in CARDS.items():
        cells = [_cell(settings[model]._replace(card=card)) for model in MODELS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(setting: Setting) -> str:
    for fsdp in (1, *range(2, setting.devices + 1)):
        if setting.devices % fsdp == 0 and _fits(setting._replace(fsdp=fsdp)):
            room = plan(setting._replace(fsdp=fsdp)).head_room / GIB
            return f"{'whole' if fsdp == 1 else f'/ {fsdp}'}, {room:.1f} GiB free"
    return "no"


def _row(name: str, amount: float) -> str:
    return f"  {name:<28}{amount / GIB:>9.2f}"


def read_config(path: str, words: Sequence[str]) -> TrainConfig:
    """GRPO's where the file or the words hold a key that only GRPO has."""
    given = Path(path).read_text() if Path(path).is_file() else ""
    only_grpo = set(GrpoConfig.model_fields) - set(SftConfig.model_fields)
    keys = {line.split(":")[0] for line in given.splitlines()} | {word.split("=")[0].split(".")[0] for word in words}
    return load_config(GrpoConfig if keys & only_grpo else SftConfig, path, words)


def open_setting(config: TrainConfig, model: str, gpu: str, count: int, fsdp: int) -> Setting:
    directory = ROOT / "configs" / "models" / f"Qwen2.5-VL-{model}-Instruct" if model in MODELS else Path(model)
    architecture = Qwen2_5_VLConfig.from_directory(directory)
    return Setting(config, architecture, model_size(architecture, config), CARDS[gpu], count, fsdp)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gpu_compat.memory", description=__doc__)
    parser.add_argument("--gpu", default="h20", choices=list(CARDS))
    parser.add_argument("--count", type=int, default=1, help="GPUs of the whole job")
    parser.add_argument("--model", default="7B", help="3B, 7B, 32B, 72B, or a directory with a config.json")
    parser.add_argument("--config", help="an SFT or GRPO config; both of the paper's by default")
    parser.add_argument(
        "--fsdp", type=int, default=1, help="GPUs that share one copy of the weights; 1: a copy on each"
    )
    parser.add_argument("--table", action="store_true", help="every GPU and model at this --count, as a table")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0: everything fits; 1: something does not; 2: bad input."""
    given = _parser().parse_intermixed_args(arguments)
    all_fit = True
    try:
        if min(given.count, given.fsdp) < 1:
            raise InputError("not a number of GPUs", value=min(given.count, given.fsdp), expected="1 or more")
        for path in [given.config] if given.config else [str(ROOT / name) for name in PAPER]:
            config = read_config(path, given.words)
            if given.table:
                print(f"{Path(path).stem}\n\n{table(config, given.count)}\n")
                continue
            setting = open_setting(config, given.model, given.gpu, given.count, given.fsdp)
            text, fits = report(setting, f"{Path(path).stem} of {given.model}")
            print(text + "\n")
            all_fit &= fits
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all_fit else 1


if __name__ == "__main__":
    sys.exit(main())
