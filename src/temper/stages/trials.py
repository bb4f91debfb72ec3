"""Trials of a sweep: each a run folder of its own, `trials/KEY/` in the sweep's, that takes what is there already.

A stage that no trial changes is the run's own, linked; one that another trial, or an earlier sweep, or the run itself
made under the same key is taken by hard links. `trial.json` is the record of a trial that is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper import pipeline
from temper import recipe as recipes
from temper.errors import RecipeError, RunError, TemperError, TrainingError
from temper.job import Job
from temper.pipeline import Choice
from temper.recipe import Recipe
from temper.runfolder import RunFolder, read_json, read_sealed, write_json, write_sealed
from temper.stages import learning
from temper.stages.seen import TRAINED_ON
from temper.stages.space import Measure, Settings
from temper.stages.study import DONE, FAILED, Grid, Study

if TYPE_CHECKING:
    from temper.stages.sweep import Sweep

WEIGHTS = ("model", "adapter")
RECORD = "trial.json"


def run(job: Job, sweep: Sweep, search: Grid | Study) -> None:
    """All trials, the table of them, and the best one's model.

    Raises:
        TrainingError: every trial failed.
        RunError: the disk is full, or the run folder is in use: that is no trial's fault.
    """
    while (proposed := search.ask()) is not None:
        number, settings = proposed
        job.say(f"trial {number + 1} of {len(search)}: {_said(settings)}")
        trial = _trial(job, sweep, number, settings)
        _check_directions(sweep, trial)
        search.tell(trial)
        job.say(f"  {_outcome(trial)}")
        write_json(job.dir / "trials.json", table(sweep, search.trials))
    if isinstance(search, Study):
        search.wait()
    found = table(sweep, search.trials)
    if found["best"] is None:
        first = next((t["error"] for t in found["trials"] if t["error"]), "no trial was finished")
        raise TrainingError(
            f"all {len(found['trials'])} trials failed; the first: {first}",
            do=f"see trials/*/pipeline.log in {job.dir}; the next start tries them again",
        )
    best = next(t for t in found["trials"] if t["number"] == found["best"])
    folder = _here(job, sweep, best)
    best["folder"] = f"trials/{folder.name}"
    for name, warning in _warnings(job, sweep, found["trials"]).items():
        job.warn(f"{name} (in trial{'s' * (len(warning) > 1)} {', '.join(map(str, warning))})")
    write_json(job.dir / "trials.json", found)
    if len(sweep.measures) == 2:
        write_json(job.dir / "front.json", front(sweep, found))
    if sweep.curves:
        drawn = _curves(job, sweep, found["trials"])
        write_json(job.dir / "curve.json", drawn)
        for line in (line for curve in drawn["curves"] for line in curve["lines"]):
            job.say(line["finding"])
    job.peak_device_memory = max(_infos(folder, sweep, job.recipe, "peak_memory_bytes"), default=None)
    _prune(job, sweep, folder)
    _give(job, sweep, folder)
    job.counts["examples"] = None
    done = sum(t["state"] == DONE for t in found["trials"])
    job.facts["trials"] = done
    job.summary = f"{done} of {len(found['trials'])} trials done; the best: {_said(best['settings'])}: {_outcome(best)}"
    job.say(job.summary)


def own_key(job: Job) -> str:
    """The key under which the sweep works: equal settings have it on every machine."""
    mark = read_sealed(job.dir / "partial.json")
    assert mark is not None  # written when the stage began
    return mark["key"]


def table(sweep: Sweep, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """trials.json: what was varied and measured, every trial, which one is best, and which none beats in both."""
    names = [str(m) for m in sweep.measures]
    done = [t for t in trials if t["state"] == DONE]

    def merit(trial: dict[str, Any]) -> list[float]:
        """Higher is better in each."""
        values = [trial["values"][name]["value"] for name in names]
        return [v if best == "highest" else -v for v, best in zip(values, sweep.directions, strict=True)]

    beaten = {t["number"] for t in done if any(dominates(merit(o), merit(t)) for o in done)}
    return {
        "schema": 1,
        "search": sweep.search,
        "fields": list(sweep.vary),
        "measures": [
            {"measure": n, "metric": m.metric, "best": b}
            for n, m, b in zip(names, sweep.measures, sweep.directions, strict=True)
        ],
        "best": max(done, key=lambda t: (merit(t)[0], -t["number"]))["number"] if done else None,
        "front": [t["number"] for t in done if t["number"] not in beaten] if len(names) == 2 else [],
        "trials": trials,
    }


def dominates(a: list[float], b: list[float]) -> bool:
    """Whether a is at least as good in everything and better in something; higher is better.

    >>> dominates([1.0, 2.0], [1.0, 1.0]), dominates([1.0, 2.0], [2.0, 1.0]), dominates([1.0], [1.0])
    (True, False, False)
    """
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b


def front(sweep: Sweep, found: dict[str, Any]) -> dict[str, Any]:
    """front.json: the first measure over the second, a point a trial."""
    y, x = sweep.measures
    points = [
        {"label": _said(t["settings"]), "setting": t["settings"], "x": t["values"][str(x)], "y": t["values"][str(y)]}
        for t in found["trials"]
        if t["state"] == DONE
    ]
    return {"x": x.metric, "y": y.metric, "points": points}


def _curves(job: Job, sweep: Sweep, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """curve.json, of the trials that are done. One that an earlier sweep ran has its rows in that one's folder."""
    done, folders, stage = [t for t in trials if t["state"] == DONE], dict[int, Path](), sweep.measures[0].stage
    for trial in done:
        name = Path(trial["folder"]).name
        places = [folder / stage for folder in _same(job, name) if (folder / stage / "rows.parquet").is_file()]
        folders[trial["number"]] = places[0]
    return learning.curves(sweep.curves, sweep.measures[0], done, folders, seed=job.seed)


def _trial(job: Job, sweep: Sweep, number: int, settings: Settings) -> dict[str, Any]:
    """One trial, run or found; an error of its own is its outcome, and the sweep goes on."""
    trial: dict[str, Any] = {
        "number": number, "settings": settings, "values": {}, "seconds": None, "state": FAILED, "error": None, "folder": None,
    }  # fmt: skip
    try:
        recipe = sweep.trial_recipe(job.recipe, settings)
        keys = sweep.keys(recipe, {n: r.key for n, r in job.inputs.items()})
        folder = job.dir / "trials" / _name(sweep, keys)
        trial["folder"] = f"trials/{folder.name}"
        record = next((r for f in _same(job, folder.name) if (r := read_sealed(f / RECORD))), None)
        if record is None:
            _run(job, recipe, keys, folder, sweep)
            values = {str(m): _value(folder, m) for m in sweep.measures}
            record = {"values": values, "seconds": round(sum(_infos(folder, sweep, job.recipe, "seconds")), 3)}
        folder.mkdir(parents=True, exist_ok=True)
        write_sealed(folder / RECORD, record)
        trial |= {"state": DONE, "values": record["values"], "seconds": record["seconds"]}
    except RunError:
        raise
    except TemperError as error:
        trial["error"] = error.what
    except Exception as error:  # whatever a setting leads to, out of memory included
        trial["error"] = f"{type(error).__name__}: {error}"
    return trial


def _name(sweep: Sweep, keys: dict[str, str]) -> str:
    """A trial's folder: equal where everything that decides its values is equal."""
    return hashlib.sha256(json.dumps([keys[name] for name in sweep.measured]).encode()).hexdigest()[:12]


def _run(job: Job, recipe: Recipe, keys: dict[str, str], folder: Path, sweep: Sweep) -> None:
    target = RunFolder(folder)
    target.open()
    for name in recipes.order(recipe):
        if target.recorded(name, keys[name]) is None:
            _bring(job, target, name, keys[name])
    pipeline.run(recipe, folder, choice=Choice(only=sweep.measured), quiet=True)


def _bring(job: Job, target: RunFolder, name: str, key: str) -> None:
    """A finished stage from where it is: nothing is trained twice, and nothing is copied where links can be made."""
    place = target.path / name
    if place.is_symlink():
        place.unlink()  # to a result that is another one by now
    if name in job.inputs and job.inputs[name].key == key:
        os.symlink(os.path.relpath(job.inputs[name].path, target.path), place)
        return
    for other in [job.dir.parent, *_same(job, "*")]:
        found = RunFolder(other).recorded(name, key) if other != target.path else None
        if found is not None and not place.exists():
            beside = target.path / f".{name}.taken.tmp"
            shutil.rmtree(beside, ignore_errors=True)
            _link(found.path, beside)
            os.rename(beside, place)
            return


def _same(job: Job, name: str) -> Iterator[Path]:
    """Folders of trials of this name, of this sweep first, then of earlier ones."""
    yield from sorted((job.dir / "trials").glob(name))
    for sweep in sorted(job.dir.parent.glob(f"{job.name}*")):
        if sweep != job.dir and sweep.name.partition("@")[0].removesuffix(".partial") == job.name:
            yield from sorted((sweep / "trials").glob(name))


def _link(source: Path, target: Path) -> None:
    """A folder again, its files shared where the file system can."""

    def one(a: str, b: str) -> None:
        try:
            os.link(a, b)
        except OSError:
            shutil.copy2(a, b)

    shutil.copytree(source, target, symlinks=True, copy_function=one)


def _value(folder: Path, measure: Measure) -> dict[str, Any]:
    """The score with its interval.

    Raises:
        TrainingError: it is no number.
    """
    found = read_json(folder / measure.stage / "evaluation.json")["models"][measure.model].get(measure.metric, {})
    if found.get("value") is None or not math.isfinite(found["value"]):
        raise TrainingError(f"{measure} is no number")
    return {key: found.get(key) for key in ("value", "low", "high", "n", "higher_is_better")}


def _check_directions(sweep: Sweep, trial: dict[str, Any]) -> None:
    """Raises RecipeError where the metric says that the worst would be taken for the best."""
    for measure, best in zip(sweep.measures, sweep.directions, strict=True):
        higher = trial["values"].get(str(measure), {}).get("higher_is_better")
        if higher is not None and higher != (best == "highest"):
            right = "highest" if higher else "lowest"
            raise RecipeError(
                f"{measure.metric} is better the {'higher' if higher else 'lower'} it is, and the sweep takes the {best}",
                where=str(measure),
                do=f"best: {right}; trials that were done are kept",
            )


def _infos(folder: Path, sweep: Sweep, recipe: Recipe, field: str) -> Iterator[Any]:
    """A field of stage.json of the stages that differ from trial to trial."""
    for name in sweep.affected(recipe):
        with contextlib.suppress(OSError, ValueError):
            if (value := read_json(folder / name / "stage.json")[field]) is not None:
                yield value


def _warnings(job: Job, sweep: Sweep, trials: list[dict[str, Any]]) -> dict[str, list[int]]:
    """What stages of trials warned of → the trials' numbers."""
    out: dict[str, list[int]] = {}
    for trial in trials:
        if trial["state"] == DONE and trial["folder"]:
            for warnings in _infos(job.dir / trial["folder"], sweep, job.recipe, "warnings"):
                for warning in warnings:
                    out.setdefault(warning, []).append(trial["number"] + 1)
    return {warning: list(dict.fromkeys(numbers)) for warning, numbers in out.items()}


def _here(job: Job, sweep: Sweep, best: dict[str, Any]) -> Path:
    """The folder of the best trial with all its stages: one that another process ran, or whose weights an earlier sweep
    deleted, is run here; it comes out the same."""
    recipe = sweep.trial_recipe(job.recipe, best["settings"])
    keys = sweep.keys(recipe, {n: r.key for n, r in job.inputs.items()})
    folder = job.dir / "trials" / _name(sweep, keys)
    _run(job, recipe, keys, folder, sweep)
    return folder


def _prune(job: Job, sweep: Sweep, best: Path) -> None:
    """Delete unfinished work of failed trials, and the stages with weights of all trials but the best where only its
    are kept; records and evaluations stay."""
    for folder in (job.dir / "trials").iterdir():
        for stage in folder.iterdir():
            heavy = sweep.keep == "best" and folder != best and any((stage / part).is_dir() for part in WEIGHTS)
            if stage.is_dir() and not stage.is_symlink() and (heavy or stage.name.endswith(".partial")):
                shutil.rmtree(stage)


def _give(job: Job, sweep: Sweep, folder: Path) -> None:
    """The model of the best trial as this stage's own, by links; an adapter names its base where that will stand."""
    giver = sweep.giver(job.recipe)
    if giver is None:
        return
    source = folder / giver
    for part in WEIGHTS:
        shutil.rmtree(job.dir / part, ignore_errors=True)
        if (source / part).is_dir():
            _link(source / part, job.dir / part)
    if (source / TRAINED_ON).is_file():
        shutil.copy2(source / TRAINED_ON, job.dir / TRAINED_ON)
    if written := read_json(source / "stage.json")["facts"].get("written_as"):
        job.facts["written_as"] = written
    note = job.dir / "adapter" / "temper.json"
    if note.is_file():
        own = read_json(note)
        base = own["base"]
        working, final = str(job.dir.resolve()), str((job.dir.parent / job.name).resolve())
        base["name"] = base["name"].replace(working, final)
        base["adapters"] = [a.replace(working, final) for a in base["adapters"]]
        if base["stage"] in sweep.affected(job.recipe):
            base["stage"] = f"{job.name}/trials/{folder.name}/{base['stage']}"
        write_json(note, own)


def _said(settings: Settings) -> str:
    short = {
        f: float(f"{v:.4g}") if isinstance(v, float) else v for f, v in settings.items()
    }  # drawn ones have 17 digits
    return ", ".join(f"{field} {json.dumps(v, ensure_ascii=False)}" for field, v in short.items())


def _outcome(trial: dict[str, Any]) -> str:
    if trial["state"] != DONE:
        return f"failed: {trial['error']}"
    values = [f"{name.rpartition('.')[2]} {v['value']:.4g}" for name, v in trial["values"].items()]
    return f"{', '.join(values)}; {trial['seconds']:.1f} s"
