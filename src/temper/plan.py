"""What a run would do, without doing it: which stages stand, which run and why, and what they would cost.

Nothing is written and no file's checksum is verified: a damaged result is found when the run reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from temper import pipeline
from temper import recipe as recipes
from temper.errors import RecipeError, TemperError
from temper.pipeline import Choice
from temper.predict import Cost, Predictor
from temper.recipe import Recipe
from temper.runfolder import Result, RunFolder, progress
from temper.scaling.footprint import Setting, setting_of
from temper.scaling.machines import Machines, Way, size_of, ways
from temper.shapes import Size, size_of_pretrained
from temper.stages.pretrain import Pretrain
from temper.stages.sweep import Sweep

CACHED, RUNS, GOES_ON, STOPS = "cached", "runs", "goes on", "stops"
SHOWN = 4  # changed keys named in full


@dataclasses.dataclass(frozen=True)
class Step:
    """One stage of the plan. `problem`: as things stand, the run would stop here."""

    name: str
    kind: str
    state: str
    reason: str
    cost: Cost

    @property
    def problem(self) -> bool:
        return self.state == STOPS


def make(recipe: Recipe, folder: Path, choice: Choice) -> list[Step]:
    """The stages that were chosen, in the order they would run.

    Raises:
        RecipeError: a chosen stage does not exist. What would stop a stage is a step of the plan, not an error.
    """
    choice.check(recipe)
    target = RunFolder(folder)
    predictor = Predictor(recipe, target)
    keys: dict[str, str] = {}
    steps: list[Step] = []
    for name in choice.wanted(recipe):
        kind = recipe.stages[name].kind
        needed = recipes.dependencies(recipe, name)
        problem: TemperError | None = None
        try:
            if all(n in keys for n in needed):
                keys[name] = pipeline.key_of(recipe, name, keys)
        except TemperError as error:
            problem = error
        found = target.recorded(name, keys[name]) if name in keys and name not in choice.force else None
        if found:
            predictor.known[name] = found
            aside = "" if found.path.name == name else f"it was set aside as {found.path.name} and is taken back"
            steps.append(Step(name, kind, CACHED, aside, Cost()))
            continue
        cost = Cost()
        try:
            cost = predictor.cost(name)
        except TemperError as error:  # an adapter that the model cannot take
            problem = problem or error
        if problem := problem or predictor.problems.get(name):
            steps.append(Step(name, kind, STOPS, _said(problem), cost))
        else:
            steps.append(Step(name, kind, *_why(recipe, name, target, keys, forced=name in choice.force), cost))
    return steps


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """A stage on machines that are elsewhere; `trained` parameters, `busy` cards: those for which a step has examples."""

    name: str
    size: Size
    trained: int
    setting: Setting
    ways: list[Way]
    busy: int

    def advice(self, machines: Machines) -> str:
        """What would help where nothing fits."""
        if min(way.held.start for way in self.ways) > machines.room:
            return "every card reads the whole model before it is spread, and must have room for that: larger cards, or an adapter"
        return f"{'fewer micro_tokens, an adapter' if self.setting.recompute else 'activation_checkpointing: true, fewer micro_tokens'}, or more cards"


def elsewhere(recipe: Recipe, names: Sequence[str], machines: Machines, *, looked_at: bool = True) -> Iterator[Elsewhere]:
    """Memory and time of those of some stages that all processes train together, on graphics cards of other machines.

    Args:
        looked_at: rows are looked at, where there are any, to tell how long they are and how many tokens a step has.

    Raises:
        RecipeError: none of the stages is trained by several processes.
        ModelError: a model has no configuration, or its shapes do not tell what it takes.
    """
    predictor = Predictor(dataclasses.replace(recipe, device="cpu"), RunFolder(Path()))
    found = [name for name in names if getattr(recipe.stages[name], "together", False)]
    if not found:
        raise RecipeError("none of these stages is trained by several processes", do="name one that trains: --stages sft")
    for name in found:
        stage: Any = recipe.stages[name]
        size, rows = _size(recipe, stage), predictor.rows(stage.data) if looked_at else None
        width, row, scored = float(stage.row_tokens), None, 1.0
        if rows is not None:
            width, row = max(width, rows.tokens), predictor.row_tokens(name, stage, rows)
            scored = predictor.scored(stage, rows)
        precision = "bf16" if stage.precision == "auto" else stage.precision
        setting = setting_of(stage, machines.size, width=width, scored=scored, row=row, precision=precision, cards=True)
        trained = size.adapter(setting.adapter) if setting.adapter else size.parameters
        busy = machines.size if row is None else min(machines.size, stage.batch_size * stage.accumulation)
        yield Elsewhere(name, size, trained, setting, ways(stage, size, setting, machines), busy)


def _size(recipe: Recipe, stage: Any) -> Size:
    """The size of what a stage trains, followed back to the model that was there first."""
    while not isinstance(stage, Pretrain):
        name = str(recipe.model if stage.model == "base" else stage.model)
        if name not in recipe.stages:
            return size_of(name, recipe.folder, trust_remote_code=recipe.trust_remote_code)
        stage = recipe.stages[name]
        if isinstance(stage, Sweep):
            stage = recipe.stages[stage.giver(recipe) or ""]
    return size_of_pretrained(stage)


def _said(error: TemperError) -> str:
    """An error on one line."""
    return error.what + (f" ({error.where})" if error.where else "") + (f"; {error.do}" if error.do else "")


def total(steps: Sequence[Step]) -> Cost:
    """Sums, and the largest memory; what is not known of one stage is not known of all."""

    def over(field: str, how: Callable[[list[float]], float]) -> float | None:
        values = [getattr(s.cost, field) for s in steps if s.state != CACHED]
        return None if None in values else how([*values, 0.0])

    return Cost(
        None, over("seconds", sum), over("memory_bytes", max), over("download_bytes", sum), over("disk_bytes", sum)
    )


def _why(recipe: Recipe, name: str, target: RunFolder, keys: dict[str, str], *, forced: bool) -> tuple[str, str]:
    """(state, reason) of a stage that has no result under its key."""
    if forced:
        return RUNS, "asked for by --force"
    if name in keys and target.unfinished(target.partial(name)) == keys[name]:
        step, answered = progress(target.partial(name))
        if step:
            return GOES_ON, f"from step {step}, where it was stopped"
        if answered:
            return GOES_ON, f"the answers of {answered} of its models are kept"
        if tried := len(list(target.partial(name).glob("trials/*/trial.json"))):
            return GOES_ON, f"{tried} of its trials are done"
        return RUNS, "it was stopped before anything of it was kept"
    present = target.peek(name)
    if present is None:
        return RUNS, "no result yet"
    return RUNS, "; ".join(_changes(recipe, name, present, keys))


def _changes(recipe: Recipe, name: str, present: Result, keys: dict[str, str]) -> list[str]:
    """What makes the key another one than that of the present result."""
    stage, info = recipe.stages[name], present.info
    now = pipeline.settings(stage)
    then = pipeline.deciding(stage, info["config"])
    changed = [f"{key} {_shown(a)} → {_shown(b)}" for key, a, b in differences(then, now)]
    if len(changed) > SHOWN:
        changed = [*changed[:SHOWN], f"{len(changed) - SHOWN} more"]
    out = ["changed: " + ", ".join(changed)] if changed else []
    inputs = recipes.dependencies(recipe, name)
    moved = [n for n in inputs if n not in keys or info["inputs"].get(n) != keys[n]]
    if moved:
        out.append(f"its input changes: {', '.join(moved)}")
    if stage.version != info["version"]:
        out.append(f"version {info['version']} → {stage.version} of this kind of stage")
    if not out and stage.kind == "sweep":
        return ["what its trials run has changed: settings of a stage that is measured, the seed, or what they read"]
    return out or ["the seed, or the content of a file or model that it reads, has changed"]


def differences(then: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What differs between two nested settings.

    >>> list(differences({"lr": 1, "adapter": {"r": 8, "alpha": 16}}, {"lr": 1, "adapter": {"r": 4, "alpha": 16}}))
    [('adapter.r', 8, 4)]
    """
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**then, **now}:
            yield from differences(then.get(key), now.get(key), f"{path}.{key}" if path else str(key))
    elif then != now:
        yield path, then, now


def _shown(value: Any) -> str:
    text = "null" if value is None else "{…}" if isinstance(value, dict) else str(value)
    return text if len(text) <= 24 else f"{text[:23]}…"
