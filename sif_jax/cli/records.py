"""`sif-jax data`: records files (io)."""

from __future__ import annotations

from pathlib import Path

import click

from sif_jax.cli.command import command, main
from sif_jax.config import ScenesBuildConfig


@main.group()
def data() -> None:
    """Build and check records files."""


@command(data, "build", ScenesBuildConfig)
def build(config: ScenesBuildConfig) -> None:
    """Render SIF-Scenes: images with exact depth, boxes, questions and chains of thought.

    \b
    Example: sif-jax data build out=data/scenes splits='{train: 400, test: 50}' seed=0 workers=4
    """
    from sif_jax.data.scenes.build import build_scenes
    from sif_jax.data.scenes.config import FAMILIES, ScenesConfig

    scenes = ScenesConfig(
        families=tuple((family, 1.0) for family in config.families or FAMILIES),
        questions_per_scene=config.questions_per_scene,
        distractor_rate=config.distractor_rate,
    )
    for path in build_scenes(config.out, scenes, config.splits, config.seed, config.workers).values():
        click.echo(path)


@data.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--image-root", type=click.Path(path_type=Path), help="Folder of the images; default: FILE's own folder.")
def check(file: Path, image_root: Path | None) -> None:
    """Read every row of a records FILE, open every image, parse every chain of thought; exit with 2 on any problem.

    \b
    Example: sif-jax data check data/scenes/train.json
    """
    from sif_jax.data.check import check_file

    report = check_file(file, image_root=image_root)
    click.echo(
        f"{report.num_rows} rows, {report.num_depth_images} depth images, {report.num_gold_boxes} gold boxes, "
        f"{report.num_completions} chains of thought, {len(report.problems)} problems"
    )
    for problem in report.problems:
        click.echo(problem)
    if report.problems:
        raise click.exceptions.Exit(2)
