"""What is wrong with a records file, row by row (host)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sif_jax.errors import InputError
from sif_jax.models.qwen2_5_vl.image_processor import load_image
from sif_jax.sif.depth_codec import read_depth
from sif_jax.sif.grammar import parse
from sif_jax.sif.record import Record, read_records


@dataclass(frozen=True)
class FileReport:
    num_rows: int
    num_depth_images: int
    num_gold_boxes: int
    num_completions: int
    problems: tuple[str, ...]


def check_file(path: str | Path, *, image_root: str | Path | None = None) -> FileReport:
    """Read every row, open every image and depth image, parse every chain of thought.

    Raises:
      InputError: the file itself cannot be read.
    """
    file = read_records(path, image_root=image_root, on_error="skip")
    found = [
        (row, f"{path}: row {row}: {problem}")
        for row, record in zip(file.rows, file.records, strict=True)
        for problem in _problems(record, file.image_root)
    ]
    return FileReport(
        num_rows=len(file.records) + len(file.skipped),
        num_depth_images=sum(record.depth_image is not None for record in file.records),
        num_gold_boxes=sum(len(record.gold_boxes) for record in file.records),
        num_completions=sum(record.completion is not None for record in file.records),
        problems=tuple(text for _, text in sorted([*file.skipped, *found], key=lambda problem: problem[0])),
    )


def _problems(record: Record, image_root: Path) -> Iterator[str]:
    try:
        image = load_image(image_root / record.image)
        if record.depth_image is not None:
            read_depth(image_root / record.depth_image, expected_size=image.size)
    except InputError as error:
        yield str(error)
    if record.completion is not None:
        for violation in parse(record.completion).violations:
            yield f"chain of thought: {violation.problem.value} (character {violation.position})"
