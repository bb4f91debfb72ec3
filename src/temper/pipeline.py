"""Runs a recipe's stages in order, each from its inputs' folders into its own.

A stage's key is a hash of its configuration, its inputs' keys, what it reads from outside, the seed and its version.
A stage whose key stands is not run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from temper import hub
from temper import recipe as recipes
from temper.errors import RecipeError, RunError, TemperError, nearest
from temper.recipe import Recipe, Stage
from temper.run import DISK_FULL, Result, RunFolder, read_json, write_atomic, write_json

REPORTED_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy", "safetensors")


class Log:
    """The same lines on the terminal and in pipeline.log; progress bars only on a terminal."""

    def __init__(self, file: Path | None, *, quiet: bool = False) -> None:
        self.console = Console(highlight=False, quiet=quiet, soft_wrap=True)
        self.file = file

    def __call__(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, markup=False)
        if self.file is not None:
            stamp = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            with (
                contextlib.suppress(OSError),
                open(self.file, "a", encoding="utf-8") as out,
            ):  # a full disk is told elsewhere
                out.write("".join(f"{stamp} {line}\n" for line in text.splitlines() or [""]))


class Job:
    """What a stage is given: its folder, its inputs, the log, and where to note what it did."""

    def __init__(self, recipe: Recipe, name: str, folder: Path, inputs: dict[str, Result], log: Log) -> None:
        self.recipe, self.name, self.dir, self.inputs, self.log = recipe, name, folder, inputs, log
        self.stage = recipe.stages[name]
        self.seed = seed_of(recipe, name)
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
        """The parquet file of one split of a data stage (`STAGE` or `STAGE.SPLIT`); None where it has no rows."""
        name, _, named = ref.partition(".")
        path = self.inputs[name].path / "data" / f"{named or split}.parquet"
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

    def save_clock(self) -> None:
        write_json(self.dir / "clock.json", {"seconds": self.seconds()})

    def start_clock(self) -> None:
        before = self.dir / "clock.json"
        earlier = 0.0
        with contextlib.suppress(OSError, ValueError, KeyError):
            earlier = float(read_json(before)["seconds"])
        self._started = time.perf_counter() - earlier

    def seconds(self) -> float:
        return time.perf_counter() - self._started


class PeakMemory:
    """The process's peak resident memory during a stage, in bytes: the kernel's own mark where it can be reset, else sampled."""

    def __enter__(self) -> PeakMemory:
        self.kernel = False
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self.kernel = True
        self.peak, self._stop, self._process = 0, threading.Event(), psutil.Process()
        if not self.kernel:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self.kernel:
            status = Path("/proc/self/status").read_text()
            self.peak = int(status.split("VmHWM:")[1].split()[0]) * 1024


def seed_of(recipe: Recipe, name: str) -> int:
    """The seed of a stage: the recipe's, moved for the replicas that `seeds: N` makes."""
    return recipe.seed + 1000 * int(recipes.replica(name)[1])


def settings(stage: Stage) -> dict[str, Any]:
    """The fields that decide a stage's result."""
    return {
        field: value
        for field, value in stage.model_dump(mode="json").items()
        if (type(stage).model_fields[field].json_schema_extra or {}).get("affects_result", True)  # type: ignore[union-attr]
    }


def key_of(recipe: Recipe, name: str, keys: dict[str, str]) -> str:
    """The key of a stage, given the keys of the stages it reads.

    Raises:
        ModelError: a model it names is not there (a hub model is asked for its commit).
    """
    stage = recipe.stages[name]
    outside = {}
    for _, gives, value in stage.refs():
        target = recipe.model if value == "base" else value
        if gives == "model" and target not in recipe.stages:
            outside[value] = hub.identity(hub.locate(str(target), recipe.folder))
    payload = {
        "kind": stage.kind,
        "version": stage.version,
        "config": settings(stage),
        "inputs": {n: keys[n] for n in recipes.dependencies(recipe, name)},
        "models": outside,
        "outside": stage.fingerprint(recipe.folder),
        "seed": seed_of(recipe, name),
        "trust_remote_code": recipe.trust_remote_code,
    }
    return hashlib.sha256(json.dumps(payload, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@dataclasses.dataclass
class Choice:
    """Which stages to run: `only` (with what they need), all but `skip`, and `force` afresh."""

    only: Sequence[str] = ()
    skip: Sequence[str] = ()
    force: Sequence[str] = ()

    def check(self, recipe: Recipe) -> None:
        for flag, names in (("--stages", self.only), ("--skip", self.skip), ("--force", self.force)):
            for name in names:
                if name not in recipe.stages:
                    raise RecipeError(f"there is no stage «{name}»", where=flag, do=nearest(name, recipe.stages))

    def wanted(self, recipe: Recipe) -> list[str]:
        """Stages to run, in order; what a skipped stage feeds is left out too."""
        wanted: set[str] = set()

        def need(name: str) -> None:
            if name not in wanted:
                wanted.add(name)
                for other in recipes.dependencies(recipe, name):
                    need(other)

        for name in self.only or recipe.stages:
            need(name)
        out: list[str] = []
        for name in recipes.order(recipe):
            if name in wanted and name not in self.skip and all(d in out for d in recipes.dependencies(recipe, name)):
                out.append(name)
        return out


def run(
    recipe: Recipe, folder: Path, *, choice: Choice | None = None, quiet: bool = False, command: Sequence[str] = ()
) -> RunFolder:
    """Run the stages that have no result yet. Returns the run folder.

    Raises:
        TemperError: whatever stopped it; all that was finished before stays, and the next start goes on from there.
    """
    choice = choice or Choice()
    choice.check(recipe)
    target = RunFolder(folder)
    with target.locked():
        log = Log(folder / "pipeline.log", quiet=quiet)
        began = time.perf_counter()
        order = choice.wanted(recipe)
        _check_same_recipe(target, recipe)
        write_atomic(folder / "recipe.yaml", recipe.dump())
        manifest = _manifest(recipe, order, command)
        keys: dict[str, str] = {}
        done: dict[str, Result] = {}
        try:
            for entry in manifest["stages"]:
                if entry["status"] == "skipped":
                    continue
                try:
                    _stage(recipe, entry, target, keys, done, choice, log)
                except BaseException as error:
                    entry["status"], entry["error"] = "failed", str(error) or type(error).__name__
                    raise
        finally:
            manifest["seconds"] = round(time.perf_counter() - began, 3)
            with contextlib.suppress(OSError):
                write_json(folder / "manifest.json", manifest)
        cached = sum(e["cached"] for e in manifest["stages"])
        log(f"done in {manifest['seconds']:.1f} s ({cached} of {len(order)} stages were there already)")
    return target


def _stage(
    recipe: Recipe,
    entry: dict[str, Any],
    target: RunFolder,
    keys: dict[str, str],
    done: dict[str, Result],
    choice: Choice,
    log: Log,
) -> None:
    """Bring one stage to its result: found, or run."""
    name = entry["name"]
    entry["key"] = keys[name] = key_of(recipe, name, keys)
    if name in choice.force:
        target.discard(name)
        found, problem = None, None
    else:
        found, problem = target.find(name, keys[name])
    if problem:
        log(f"warning: {problem}", "yellow")
    if found:
        log(f"{name}: there already")
        entry["cached"], entry["status"], done[name] = True, "done", found
        return
    inputs = {n: done[n] for n in recipes.dependencies(recipe, name)}
    with disk_errors(target.path):
        partial = target.begin(name, keys[name])
        job = Job(recipe, name, partial, inputs, log)
        log(f"── {name} ({job.stage.kind})", "bold")
        job.start_clock()
        with PeakMemory() as memory:
            try:
                job.stage.run(job)
            except TemperError:
                with contextlib.suppress(OSError):
                    job.save_clock()
                raise
        (partial / "clock.json").unlink(missing_ok=True)
        counts = {
            k: job.counts.get(k)
            for k in ("tokens", "trained_tokens", "examples", "trainable_parameters", "parameters", "steps")
        }
        info = {
            "schema": 1,
            "name": name,
            "kind": job.stage.kind,
            "version": job.stage.version,
            "key": keys[name],
            "config": job.stage.model_dump(mode="json"),
            "inputs": {n: r.key for n, r in inputs.items()},
            "seconds": round(job.seconds(), 3),
            **counts,
            "peak_memory_bytes": job.peak_device_memory or memory.peak or None,
            "warnings": job.warnings,
            "facts": job.facts,
            "summary": job.summary,
        }
        done[name] = target.commit(name, info)
    entry["status"] = "done"
    log(f"{name}: {info['seconds']:.1f} s")


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A full disk, told as such; whatever library met it."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL or "No space left" in str(error) or "File too large" in str(error):
            raise _full(folder, error) from error
        raise
    except Exception as error:  # safetensors and pyarrow wrap the system's error in their own
        if type(error).__name__ in {"SafetensorError", "ArrowException"} and (
            "os error 28" in str(error) or "os error 27" in str(error)
        ):
            raise _full(folder, error) from error
        raise


def _full(folder: Path, error: Exception) -> RunError:
    free = psutil.disk_usage(str(folder)).free
    return RunError(
        f"writing failed: the disk is full or a limit on file size was met ({error})",
        where=f"{folder} ({free / 1e9:.1f} GB free)",
        do="make room (`temper prune` deletes results that were set aside) and start the same command; it goes on from the last good state",
    )


def _check_same_recipe(target: RunFolder, recipe: Recipe) -> None:
    try:
        old = read_json(target.path / "manifest.json")
    except (OSError, ValueError):
        return
    if old.get("recipe") != recipe.name:
        raise RunError(
            f"this run folder belongs to the recipe «{old.get('recipe')}»",
            where=str(target.path),
            do="choose another folder with --out",
        )


def _manifest(recipe: Recipe, order: list[str], command: Sequence[str]) -> dict[str, Any]:
    rest = [n for n in recipe.stages if n not in order]
    return {
        "schema": 1,
        "recipe": recipe.name,
        "profile": recipe.profile,
        "seed": recipe.seed,
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": list(command),
        "temper": importlib.metadata.version("temper-lm"),
        "python": platform.python_version(),
        "packages": {p: importlib.metadata.version(p) for p in REPORTED_PACKAGES},
        "hardware": hardware(recipe.threads),
        "git": _git(recipe.folder),
        "seconds": None,
        "stages": [
            {
                "name": n,
                "kind": recipe.stages[n].kind,
                "key": None,
                "cached": False,
                "status": "pending" if n in order else "skipped",
                "error": None,
            }
            for n in [*order, *rest]
        ],
    }


def hardware(threads: int | None = None) -> dict[str, Any]:
    """Processor, cores usable by this process, memory; GPUs are added by the stages that use them."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().split("model name")[1].split(":", 1)[1].splitlines()[0].strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return {
        "cpu": cpu,
        "cores": cores,
        "threads": threads or cores,
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [],
    }


def _git(folder: Path) -> dict[str, Any] | None:
    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def command_line() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
