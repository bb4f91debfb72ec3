"""What the command line and `temper.run` share: recipe → pipeline → report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import temper.stages  # noqa: F401  fills the registry of stages
from temper import pipeline, report
from temper import recipe as recipes
from temper.pipeline import Choice
from temper.recipe import Recipe


def folder_of(recipe: Recipe, out: Path | None) -> Path:
    return out or Path("runs") / (f"{recipe.name}-{recipe.profile}" if recipe.profile else recipe.name)


def run_recipe(
    name: str | Path,
    *,
    overrides: dict[str, Any] | None = None,
    profile: str | None = None,
    overlays: list[Path] | None = None,
    sets: list[str] | None = None,
    choice: Choice | None = None,
    out: Path | None = None,
    quiet: bool = False,
    command: Sequence[str] = (),
) -> Path:
    """Load, run, report. The report is written even when a stage failed, of what there is."""
    recipe = recipes.load(name, profile=profile, overlays=overlays, sets=sets, overrides=overrides)
    folder = folder_of(recipe, out)
    try:
        pipeline.run(recipe, folder, choice=choice, quiet=quiet, command=command)
    finally:
        if (folder / "manifest.json").is_file():
            with pipeline.disk_errors(folder):
                report.build([folder])
    return folder
