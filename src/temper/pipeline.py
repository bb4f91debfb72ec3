"""Runs a recipe's stages in order, each from its inputs' folders into its own.

A stage's key is a hash of its configuration, its inputs' keys, what it reads from outside, the seed and its version.
A stage whose key stands is not run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from temper import hub, terminal
from temper import recipe as recipes
from temper.errors import RecipeError, RunError, TemperError, nearest
from temper.job import Job, Log
from temper.manifest import PeakMemory
from temper.manifest import manifest as manifest_of
from temper.recipe import Config, Recipe, Stage
from temper.runfolder import DISK_FULL, Result, RunFolder, read_json, size_of, write_atomic, write_json
from temper.world import Left, World


def settings(stage: Stage) -> dict[str, Any]:
    """The fields that decide a stage's result."""
    return deciding(stage, stage.model_dump(mode="json"))


def deciding(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    """Of values, those of fields that decide a result; of a mapping within a field too.

    Args:
        values: of this kind of stage, maybe of an earlier time.
    """
    out = {}
    for field, value in values.items():
        info = type(config).model_fields.get(field)
        if info is not None and (info.json_schema_extra or {}).get("affects_result", True):  # type: ignore[union-attr]
            inner = getattr(config, field)
            out[field] = deciding(inner, value) if isinstance(inner, Config) and isinstance(value, dict) else value
    return out


def key_of(recipe: Recipe, name: str, keys: dict[str, str]) -> str:
    """The key of a stage, given the keys of the stages it reads.

    Raises:
        ModelError: a model it names is not there (a hub model is asked for its commit).
    """
    stage = recipe.stages[name]
    outside = {}
    for _, gives, value in stage.refs():
        target = recipe.model if value == "base" else value
        if gives != "data" and target not in recipe.stages:
            outside[value] = hub.identity(hub.locate(str(target), recipe.folder))
    payload = {
        "kind": stage.kind,
        "version": stage.version,
        "config": settings(stage),
        "inputs": {n: keys[n] for n in recipes.dependencies(recipe, name)},
        "models": outside,
        "outside": stage.fingerprint(recipe.folder),
        "seed": recipes.seed_of(recipe, name),
        "trust_remote_code": recipe.trust_remote_code,
    }
    if within := stage.within(recipe, keys):
        payload["within"] = within
    return hashlib.sha256(json.dumps(payload, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


# safetensors, tokenizers and pyarrow wrap the system's error in their own; numpy counts what it could not write
FULL_SIGNS = ("No space left", "File too large", *(f"os error {n}" for n in DISK_FULL), "requested and")


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
    recipe: Recipe,
    folder: Path,
    *,
    choice: Choice | None = None,
    quiet: bool = False,
    command: Sequence[str] = (),
    begun: Callable[[], None] = lambda: None,
    world: World | None = None,
) -> RunFolder:
    """Run the stages that have no result yet. Returns the run folder.

    Args:
        begun: called once the folder is this run's and holds its manifest.
        world: the processes that train together; this is the main one.

    Raises:
        TemperError: whatever stopped it; all that was finished before stays, and the next start goes on from there.
    """
    choice, world = choice or Choice(), world or World()
    choice.check(recipe)
    target = RunFolder(folder)
    with disk_errors(folder), target.locked():
        log = Log(folder / "pipeline.log", quiet=quiet)
        began = time.perf_counter()
        order = choice.wanted(recipe)
        _check_same_recipe(target, recipe)
        write_atomic(folder / "recipe.yaml", recipe.dump())
        manifest = manifest_of(recipe, order, command)
        write_json(folder / "manifest.json", manifest)  # a run that is killed leaves one too
        begun()
        keys: dict[str, str] = {}
        done: dict[str, Result] = {}
        try:
            for entry in manifest["stages"]:
                if entry["status"] == "skipped":
                    continue
                try:
                    _stage(recipe, entry, manifest, target, keys, done, choice, log, world)
                except BaseException as error:
                    entry["status"], entry["error"] = "failed", str(error) or type(error).__name__
                    raise
                write_json(folder / "manifest.json", manifest)
        finally:
            manifest["seconds"] = round(time.perf_counter() - began, 3)
            with contextlib.suppress(OSError):
                write_json(folder / "manifest.json", manifest)
        cached = sum(e["cached"] for e in manifest["stages"])
        log(f"done in {manifest['seconds']:.1f} s ({cached} of {len(order)} stages cached)")
        if aside := target.aside():
            size = terminal.size(sum(map(size_of, aside)))
            log(f"set aside earlier: {len(aside)}, {size}; to see and delete them: temper prune {folder}")
    return target


def _stage(
    recipe: Recipe,
    entry: dict[str, Any],
    manifest: dict[str, Any],
    target: RunFolder,
    keys: dict[str, str],
    done: dict[str, Result],
    choice: Choice,
    log: Log,
    world: World,
) -> None:
    """Bring one stage to its result: found, or run."""
    name = entry["name"]
    entry["key"] = keys[name] = key_of(recipe, name, keys)
    if name in choice.force:
        target.discard(name, keys[name])
        found, problem = None, None
    else:
        found, problem = target.find(name, keys[name])
    if found:
        if problem:
            log(f"warning: {problem}", "yellow")
        log(f"{name}: cached")
        entry["cached"], entry["status"], done[name] = True, "done", found
        return
    inputs = {n: done[n] for n in recipes.dependencies(recipe, name)}
    with disk_errors(target.path):
        partial, unusable = target.begin(name, keys[name])
        write_json(target.path / "manifest.json", manifest)  # with the key of the work that has begun
        job = Job(recipe, name, partial, inputs, log, world if recipe.stages[name].together else None)
        log(f"── {name} ({job.stage.kind})", "bold")
        for told in (problem, unusable):
            if told:
                job.warn(told)
        job.start_clock()
        if job.world.size > 1:
            found = {n: str(r.path.resolve()) for n, r in inputs.items()}
            world.told(lambda: {"stage": name, "folder": str(partial.resolve()), "inputs": found, "keys": dict(keys)})
            _agreed(world, keys[name])
        with PeakMemory() as memory:
            try:
                job.stage.run(job)
            except TemperError:
                with contextlib.suppress(OSError):
                    job.save_clock()
                raise
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


def join(recipe: Recipe, world: World) -> None:
    """What another process than the main one does: its part of each stage that is told, until there are no more.

    It writes into a folder that is thrown away, and reads checkpoints where the main one keeps them.

    Raises:
        TemperError: whatever went wrong here.
    """
    while (said := world.told(lambda: None)) is not None:
        name, keys = said["stage"], said["keys"]
        _agreed(world, key_of(recipe, name, keys))
        inputs = {n: Result(n, Path(p), read_json(Path(p) / "stage.json")) for n, p in said["inputs"].items()}
        with tempfile.TemporaryDirectory(prefix="temper-") as folder:
            job = Job(recipe, name, Path(folder), inputs, Log(None, quiet=True), world)
            job.kept = Path(said["folder"])
            job.start_clock()
            with contextlib.suppress(Left):
                job.stage.run(job)


def _agreed(world: World, key: str) -> None:
    """Raises RunError where processes would not train the same thing on the same data."""
    keys = world.gathered(key)
    if others := [str(rank) for rank, other in enumerate(keys) if other != keys[0]]:
        raise RunError(
            f"process {', '.join(others)} reads another recipe, other data or another model than process 0",
            do="give all machines the same files; a run folder must be one that all of them see",
        )


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A full disk, told as such; whatever library met it."""
    try:
        yield
    except TemperError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) in DISK_FULL or any(sign in str(error) for sign in FULL_SIGNS):
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
    if isinstance(old, dict) and old.get("recipe") != recipe.name:
        raise RunError(
            f"this run folder belongs to the recipe «{old.get('recipe')}»",
            where=str(target.path),
            do="choose another folder with --out",
        )
