"""Which test rows a reader sees: chosen by rule, so that nobody picks the pretty ones."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from temper.report.contract import Evaluation
from temper.report.phrases import NONE, number
from temper.report.tables import places_of

EACH = 3  # rows in each group


@dataclass(frozen=True)
class Answer:
    """What one model wrote."""

    model: str
    text: str | None  # None: the evaluation asked for no answers
    scores: list[tuple[str, str]]  # (metric, score of this row)
    cut: bool  # ended by the length limit


@dataclass(frozen=True)
class Sample:
    """One test row with the answers of all models."""

    id: int
    prompt: str
    reference: str
    answers: list[Answer]


@dataclass(frozen=True)
class Group:
    """Samples chosen for one reason."""

    title: str
    samples: list[Sample]


def choose(evaluation: Evaluation, rows: pa.Table, each: int = EACH) -> list[Group]:
    """Rows with the highest, lowest and middle difference of the main metric, and some at random; each row once."""
    table = rows.to_pydict()
    total = rows.num_rows
    order, title = _order(evaluation, table, total)
    picked: list[tuple[str, list[int]]] = []
    taken: set[int] = set()

    def take(name: str, candidates: list[int]) -> None:
        new = [i for i in candidates if i not in taken][:each]
        taken.update(new)
        if new:
            picked.append((name, new))

    if order:
        middle = len(order) // 2
        take(f"Highest {title}", order)
        take(f"Lowest {title}", order[::-1])
        from_middle = sorted(range(len(order)), key=lambda rank: abs(rank - middle))
        take(f"Middle {title}", [order[rank] for rank in from_middle])
    drawn = list(range(total))
    random.Random(0).shuffle(drawn)  # the same rows on every build, whatever the scores
    take("At random", drawn)
    places = {metric: (name, places_of(evaluation)[metric]) for metric, name in _shown(evaluation, table).items()}
    return [Group(name, [_sample(evaluation, table, i, places) for i in indices]) for name, indices in picked]


def _order(evaluation: Evaluation, table: dict[str, list[Any]], total: int) -> tuple[list[int], str]:
    """Row numbers by falling difference b − a (by falling score with one model), and what that quantity is called."""
    for metric in evaluation.metrics:  # the first that has scores of single rows
        pair = next(((c.a, c.b) for c in evaluation.comparisons if c.metric == metric), None)
        models = [name for name in evaluation.models if f"{name}|{metric}" in table]
        if not models:
            continue
        if pair is None or not set(pair) <= set(models):
            pair = (models[0], models[-1])
        a, b = pair
        upper = table[f"{b}|{metric}"]
        lower = table[f"{a}|{metric}"] if a != b else [0.0] * total
        value = [y - x if x is not None and y is not None else math.nan for x, y in zip(lower, upper, strict=True)]
        order = sorted((i for i in range(total) if math.isfinite(value[i])), key=lambda i: (-value[i], i))
        if order:
            return order, f"difference {b} − {a} in {metric}" if a != b else f"{metric} of {b}"
    return [], ""


def _shown(evaluation: Evaluation, table: dict[str, list[Any]]) -> dict[str, str]:
    """Metric → its name beside a single row. A mean, a maximum and a quantile of the same scores are one score of a row,
    shown once under what their names have in common."""
    same: dict[tuple[str, ...], list[str]] = {}
    for metric in evaluation.metrics:
        stem = metric.rpartition("_")[0] or metric
        columns = (repr(table.get(f"{model}|{metric}")) for model in evaluation.models)
        same.setdefault((stem, *columns), []).append(metric)
    return {alike[0]: stem if len(alike) > 1 else alike[0] for (stem, *_), alike in same.items()}


def _sample(evaluation: Evaluation, table: dict[str, list[Any]], i: int, places: dict[str, tuple[str, int]]) -> Sample:
    answers = []
    written = any(any(table.get(f"{model}|prediction", ())) for model in evaluation.models)
    for model in evaluation.models:
        if f"{model}|prediction" not in table:
            continue
        scores = [
            (name, score)
            for metric, (name, digits) in places.items()
            if f"{model}|{metric}" in table and (score := number(table[f"{model}|{metric}"][i], max(digits, 2))) != NONE
        ]
        ended = table[f"{model}|ended"][i] if f"{model}|ended" in table else None
        text = (table[f"{model}|prediction"][i] or "") if written else None
        answers.append(Answer(model, text, scores, ended is False))
    identity = table["id"][i] if "id" in table else i
    return Sample(identity, _text(table, "prompt", i), _text(table, "reference", i), answers)


def _text(table: dict[str, list[Any]], column: str, i: int) -> str:
    return (table[column][i] or "") if column in table else ""
