"""What the command line and `temper.run` share: recipe → pipeline → report."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import temper.stages  # noqa: F401  fills the registry of stages
from temper import launch, pipeline, report
from temper import recipe as recipes
from temper.job import Log
from temper.pipeline import Choice
from temper.recipe import Recipe
from temper.tracking.start import Followers


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
    """Load, run, report."""
    recipe = recipes.load(name, profile=profile, overlays=overlays, sets=sets, overrides=overrides)
    return execute(recipe, folder_of(recipe, out), choice=choice, quiet=quiet, command=command)


def execute(
    recipe: Recipe, folder: Path, *, choice: Choice | None = None, quiet: bool = False, command: Sequence[str] = ()
) -> Path:
    """Run and report; returns the folder. The report is written even when a stage failed, of what there is."""
    world = launch.world(recipe)
    if not world.main:
        with contextlib.closing(world), launch.among(world), library_warnings_to(folder / "pipeline.log"):
            pipeline.join(recipe, world)
        return folder
    followers = Followers(recipe.trackers, folder, Log(folder / "pipeline.log", quiet=quiet))
    stopped = False
    with library_warnings_to(folder / "pipeline.log"):
        try:
            with launch.among(world):
                pipeline.run(recipe, folder, choice=choice, quiet=quiet, command=command, begun=followers.start, world=world)
                world.told(lambda: None)
        except BaseException as error:
            stopped = not isinstance(error, Exception)
            raise
        finally:
            try:
                if (folder / "manifest.json").is_file():
                    with pipeline.disk_errors(folder):
                        report.build([folder])
            finally:
                followers.finish(stopped=stopped)
                world.close()
    return folder


@contextlib.contextmanager
def library_warnings_to(log: Path) -> Iterator[None]:
    """Python warnings of libraries go into the run's log: a terminal shows what Temper says, and nothing is lost."""

    def note(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        with contextlib.suppress(OSError), open(log, "a", encoding="utf-8") as out:
            out.write(f"{category.__name__} of a library: {' '.join(str(message).split())} ({filename}:{lineno})\n")

    with warnings.catch_warnings():
        warnings.showwarning = note
        yield
