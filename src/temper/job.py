"""What a stage is given: its folder, its inputs, the log, and where to note what it did."""

from __future__ import annotations

import contextlib
import copy
import datetime
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from temper import hub, terminal
from temper import recipe as recipes
from temper.errors import RecipeError
from temper.recipe import Recipe
from temper.runfolder import Result, read_json, write_json
from temper.world import World

STREAM = "stream.json"  # beside a data stage's rows: what its split train is read from


class Log:
    """The same lines on the terminal and in pipeline.log; progress bars only on a terminal."""

    def __init__(self, file: Path | None, *, quiet: bool = False) -> None:
        self.console = Console(highlight=False, quiet=quiet)
        self.file = file

    def __call__(self, text: str, style: str = "") -> None:
        terminal.show(self.console, Text(text, style=style))
        if self.file is not None:
            stamp = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            with (
                contextlib.suppress(OSError),
                open(self.file, "a", encoding="utf-8") as out,
            ):  # a full disk is told elsewhere
                out.write("".join(f"{stamp} {line}\n" for line in text.splitlines() or [""]))


class Job:
    """What a stage is given: its folder, its inputs, the log, and where to note what it did."""

    def __init__(
        self, recipe: Recipe, name: str, folder: Path, inputs: dict[str, Result], log: Log, world: World | None = None
    ) -> None:
        self.recipe, self.name, self.dir, self.inputs, self.log = recipe, name, folder, inputs, log
        self.world = world or World()
        self.kept = folder  # where checkpoints are; of other processes than the main one `dir` is a folder that is thrown away
        self.clock = folder / "clock.json"
        self.stage = recipe.stages[name]
        self.seed = recipes.seed_of(recipe, name)
        self.facts: dict[str, Any] = {}  # what was really used: attention, layout, dtype, …
        self.counts: dict[str, Any] = {}  # tokens, trained_tokens, examples, steps, parameters, …
        self.warnings: list[str] = []
        self.summary = ""
        self.peak_device_memory: int | None = None

    def say(self, text: str, style: str = "") -> None:
        self.log(text, style)

    def warn(self, text: str) -> None:
        """A thing that may be intended: said once, and written into the report."""
        if text not in self.warnings:
            self.warnings.append(text)
            self.log(f"warning: {text}", "yellow")

    @contextlib.contextmanager
    def progress(self, total: int | None, what: str, done: int = 0) -> Iterator[Any]:
        """`with job.progress(n, "training") as step: step(1, loss=0.3)`"""
        if not self.log.console.is_terminal or self.log.console.quiet:
            yield lambda advance=1, **shown: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
        )
        with Progress(*columns, console=self.log.console, transient=True) as bar:
            task = bar.add_task(f"{self.name}: {what}", total=total, completed=done, shown="")

            def step(advance: int = 1, **shown: Any) -> None:
                bar.update(task, advance=advance, shown=" ".join(f"{k} {v}" for k, v in shown.items()))

            yield step

    def rows(self, ref: str, split: str) -> Path | None:
        """The parquet file of one split of a data stage (`STAGE` or `STAGE.SPLIT`); None where it has no rows.

        Raises:
            RecipeError: the split is read as a stream.
        """
        name, _, named = ref.partition(".")
        folder = self.inputs[name].path / "data"
        if (named or split) == "train" and (folder / STREAM).is_file():
            raise RecipeError(
                f"«{name}» is a stream, whose rows are read while sft trains on them, and by nothing else",
                where=self.name, do="a data stage without stream, and with take",
            )  # fmt: skip
        path = folder / f"{named or split}.parquet"
        return path if path.is_file() else None

    def model(self, ref: str) -> hub.Source:
        """A model reference (stage, `base`, folder, hub id) → what to load."""
        name = self.recipe.model if ref == "base" else ref
        assert name is not None  # checked when the recipe was loaded
        if name not in self.inputs:
            return hub.locate(name, self.recipe.folder)
        return self.of_result(self.inputs[name])

    def of_result(self, result: Result) -> hub.Source:
        """The model that a stage made; an unmerged adapter is named together with the base it belongs to."""
        if (result.path / "model").is_dir():
            return hub.Source(str(result.path / "model"))
        base = read_json(result.path / "adapter" / "temper.json")["base"]
        folder = result.path.parent / base["stage"] / "model" if base["stage"] else None
        return hub.Source(
            str(folder) if folder else base["name"], base["revision"], (*base["adapters"], str(result.path / "adapter"))
        )

    def part(self, name: str, seed: int) -> Job:
        """A part of this stage's work: a folder, a seed, facts and counts of its own; clock and warnings are the stage's."""
        out = copy.copy(self)
        out.dir, out.kept, out.seed = self.dir / name, self.kept / name, seed
        out.facts, out.counts, out.summary = {}, {}, ""
        out.dir.mkdir(parents=True, exist_ok=True)
        return out

    def save_clock(self) -> None:
        write_json(self.clock, {"seconds": self.seconds(), "warnings": self.warnings})

    def start_clock(self) -> None:
        earlier = 0.0
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = read_json(self.clock)
            earlier = float(found["seconds"])
            told = list(found.get("warnings", []))  # in an earlier part of this work
            self.warnings = told + [w for w in self.warnings if w not in told]
        self._started = time.perf_counter() - earlier

    def seconds(self) -> float:
        return time.perf_counter() - self._started
