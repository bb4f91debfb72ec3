"""What each trained model of an evaluation gained over what it began as, and what that cost."""

from __future__ import annotations

from temper.report.contract import Comparison, Evaluation
from temper.report.phrases import NONE, arrow, count, decimals, duration, number, percent, size, verdict
from temper.report.read import Run, Stage
from temper.report.tables import Cell, Table, places_of, words


def ways(run: Run, evaluation: Evaluation) -> Table | None:
    """A column for each evaluated stage that trained, if what it was trained from was evaluated too. None where there is
    none such."""
    found = [(s, before) for s in run.stages if s.name in evaluation.models and (before := _before(run, s, evaluation))]
    if not found:
        return None
    body = [[words("began as"), *(Cell(before) for _, before in found)]]
    for metric, digits in places_of(evaluation).items():
        label = f"{metric} {arrow(evaluation.higher_is_better(metric))}".strip()
        body.append([words(label), *(_gain(evaluation, metric, digits, s.name, before) for s, before in found)])
    infos = [s.info for s, _ in found if s.info]
    body.append([words("time"), *(Cell(duration(i.seconds)) for i in infos)])
    body.append([words("peak memory"), *(Cell(size(i.peak_memory_bytes)) for i in infos)])
    body.append([words("examples"), *(Cell(count(i.examples)) for i in infos)])
    body.append([words("steps"), *(Cell(count(i.steps)) for i in infos)])
    body.append(
        [
            words("trainable parameters"),
            *(Cell(count(i.trainable_parameters), _share(i.trainable_parameters, i.parameters)) for i in infos),
        ]
    )
    body.append([words("base held in"), *(Cell(str(i.facts.get("base held in", i.facts.get("weights", NONE)))) for i in infos)])  # fmt: skip
    body.append([words("size on disk"), *(Cell(size(i.bytes_on_disk)) for i in infos)])
    notes = [
        "Before → after, and their difference with its 95 % interval where the two were compared. Time and disk are those of the "
        "stage alone, not of what it began as; memory is the highest of the whole process while the stage ran, imports included."
    ]
    return Table([words(""), *(Cell(s.name, s.kind) for s, _ in found)], body, "What each way gives and costs", notes)


def _before(run: Run, stage: Stage, evaluation: Evaluation) -> str | None:
    """What the model that a stage trained began as, by its name in the evaluation."""
    if stage.info is None or not stage.info.trainable_parameters:
        return None
    name = stage.info.config.get("model")
    for candidate in (name, "base" if name == _base(run) else None, _base(run) if name == "base" else None):
        if candidate in evaluation.models and candidate != stage.name:
            return str(candidate)
    return None


def _base(run: Run) -> str | None:
    """The recipe's `model`."""
    line = next((x for x in run.recipe.splitlines() if x.startswith("model:")), "")
    return line.removeprefix("model:").strip() or None


def _gain(evaluation: Evaluation, metric: str, digits: int, after: str, before: str) -> Cell:
    old, new = (evaluation.models[name].get(metric) for name in (before, after))
    if old is None or new is None:
        return Cell(NONE)
    text = f"{number(old.value, digits)} → {number(new.value, digits)}"
    pair = next((c for c in evaluation.comparisons if (c.metric, c.a, c.b) == (metric, before, after)), None)
    if pair is None or pair.low is None:
        return Cell(text)
    mark = verdict(pair, evaluation.higher_is_better(metric))
    return Cell(text, _difference(pair), mark if mark in ("better", "worse") else "")


def _difference(pair: Comparison) -> str:
    digits = decimals([(pair.low, pair.high)])
    low, high = (number(x, digits, sign=True) for x in (pair.low, pair.high))
    return f"{number(pair.difference, digits, sign=True)}, {low} to {high}"


def _share(part: int | None, whole: int | None) -> str:
    return f"{percent(part / whole)} of {count(whole)}" if part is not None and whole else ""
