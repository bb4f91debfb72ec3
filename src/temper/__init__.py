"""Temper post-trains language models: one recipe, one command, one report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "run"]


def run(
    recipe: str | Path,
    overrides: dict[str, Any] | None = None,
    *,
    profile: str | None = None,
    out: str | Path | None = None,
    quiet: bool = False,
) -> Path:
    """Run a recipe and write its report. Returns the run folder.

    Args:
        recipe: a file, or the name of a shipped recipe.
        overrides: a nested dictionary of the recipe's own shape, merged over it.
        profile: which of the recipe's profiles to merge first.
        out: the run folder; by default runs/NAME-PROFILE below the current folder.

    Raises:
        temper.errors.TemperError: whatever stopped it; all that was finished stays.
    """
    from temper.app import run_recipe  # torch is imported when a run begins, not by `import temper`

    return run_recipe(recipe, overrides=overrides, profile=profile, out=Path(out) if out else None, quiet=quiet)
