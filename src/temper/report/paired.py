"""Models of one name in several runs, tested row by row where both runs kept rows of the same data.

A run keeps what each test row scored (rows.parquet), not the statistics behind a corpus metric. So a metric is paired
where its value is the mean of its rows, or of losses weighed by their tokens, which are kept; of others (a quantile) the
page says that it cannot be. Models without a namesake in the other run are paired as what each run leads to: its last.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from temper import statistics
from temper.report.contract import Comparison, Evaluation, Measured
from temper.report.read import Run, Stage
from temper.types import Scores

Tested = tuple[str, str, str, statistics.Comparison]  # metric, a, b, b against a

MEASURED_FROM = re.compile(r"\|(?:from|against):([^|]+)")  # in the signature of a score that is relative to a model
RESAMPLES = 10_000  # where the run does not say how many it took


@dataclass(frozen=True)
class Between:
    """The comparisons between runs of one evaluate stage.

    `evaluation` holds each run's models under the name RUN/MODEL, so that it is read like any other evaluation;
    `notes` are sentences on what could not be paired, and why.
    """

    name: str
    evaluation: Evaluation
    notes: list[str]


def between(named: list[tuple[str, Run]], name: str) -> Between:
    """Every run against the first and against the one before it, the p-values adjusted together (Holm)."""
    having = [(label, stage) for label, run in named for stage in run.stages if stage.name == name and stage.evaluation]
    first = [(having[0], other) for other in having[1:]]
    pairs = first + [pair for pair in itertools.pairwise(having) if pair not in first]
    seed = next((run.manifest.seed for _, run in named if run.manifest.seed is not None), 0)
    found: list[Tested] = []
    notes: dict[str, None] = {}  # an ordered set
    for a, b in pairs:
        made, said = _pair(*a, *b, seed)
        found += made
        notes |= dict.fromkeys(said)
    models = {
        f"{label}/{m}": scores for label, s in having if s.evaluation for m, scores in s.evaluation.models.items()
    }
    data = having[0][1].evaluation.data if having[0][1].evaluation else {}
    return Between(name, Evaluation(data=data, models=models, comparisons=_adjusted(found)), list(notes))


def _pair(label_a: str, a: Stage, label_b: str, b: Stage, seed: int) -> tuple[list[Tested], list[str]]:
    """The comparisons of two runs before Holm's correction, and what could not be compared."""
    assert a.evaluation and b.evaluation
    where = f"{label_a} and {label_b}"
    if reason := _unlike(a, b):
        return [], [f"{where} are not tested against each other: {reason}."]
    assert a.rows is not None and b.rows is not None
    couples = _couples(list(a.evaluation.models), list(b.evaluation.models))
    notes = []
    if _column(a.rows, "prompt") != _column(b.rows, "prompt"):
        notes.append(f"{where} wrote the same rows out in different forms; a difference may come from that.")
    made: list[Tested] = []
    untested: dict[str, dict[str, None]] = {}  # why → which metrics
    for mine, other in couples:
        if mine == other and _same(a.rows, b.rows, mine):
            notes.append(f"{mine} answered every row alike, with equal scores, in {where}.")
            continue
        ours, theirs = a.evaluation.models[mine], b.evaluation.models[other]
        for metric in [m for m in ours if m in theirs]:
            c = _compare(a, b, (mine, other), metric, seed)
            if isinstance(c, str):
                untested.setdefault(c, {})[metric] = None
            else:
                made.append((metric, f"{label_a}/{mine}", f"{label_b}/{other}", c))
    return made, notes + [f"Not tested between runs: {', '.join(metrics)}; {why}." for why, metrics in untested.items()]


def _couples(ours: list[str], theirs: list[str]) -> list[tuple[str, str]]:
    """Models of one name; and of those that only one run has the last of each.

    >>> _couples(["base", "lora", "sft"], ["base", "dpo"])
    [('base', 'base'), ('sft', 'dpo')]
    """
    alone = [m for m in ours if m not in theirs][-1:], [m for m in theirs if m not in ours][-1:]
    return [(m, m) for m in ours if m in theirs] + list(zip(*alone, strict=False))


def _adjusted(made: list[Tested]) -> list[Comparison]:
    """As an evaluation writes them: p-values adjusted together, and what so many comparisons could have shown."""
    together = sum(c.p is not None for *_, c in made) or 1
    adjusted = statistics.holm([c.p for *_, c in made])
    return [
        Comparison(
            metric=metric, a=a, b=b, difference=c.difference, low=c.low, high=c.high, p=c.p, p_adjusted=p,
            smallest_detectable=c.smallest_detectable(together), detectable_level=statistics.ALPHA / together,
        )
        for (metric, a, b, c), p in zip(made, adjusted, strict=True)
    ]  # fmt: skip


def _unlike(a: Stage, b: Stage) -> str:
    """Why the rows of two evaluations cannot be put side by side; empty where they can."""
    assert a.evaluation and b.evaluation
    ours, theirs = a.evaluation.data.get("sha256"), b.evaluation.data.get("sha256")
    if not ours or not theirs:
        return "the data of one of them carry no checksum, so nothing tells whether the rows are the same"
    if ours != theirs:
        return "they were evaluated on different rows"
    if a.rows is None or b.rows is None:
        return "one of them kept no rows (rows.parquet)"
    if _column(a.rows, "reference") != _column(b.rows, "reference"):
        return "the references in their rows.parquet differ although the data's checksums are equal"
    return ""


def _same(a: pa.Table | None, b: pa.Table | None, model: str) -> bool:
    """Whether a model gave the very same in both: text, ending and every score that both have."""
    if a is None or b is None:
        return False
    columns = [c for c in a.column_names if c.startswith(f"{model}|") and c in b.column_names]
    return bool(columns) and all(_equal(_column(a, c), _column(b, c)) for c in columns)


def _equal(a: list[object], b: list[object]) -> bool:
    return len(a) == len(b) and all(x == y or (x != x and y != y) for x, y in zip(a, b, strict=True))


def _column(rows: pa.Table, name: str) -> list[object]:
    return rows[name].to_pylist() if name in rows.column_names else []


def _compare(a: Stage, b: Stage, models: tuple[str, str], metric: str, seed: int) -> statistics.Comparison | str:
    """b against a, or why that cannot be told."""
    assert a.evaluation and b.evaluation
    mine, other = models
    first, second = a.evaluation.models[mine][metric], b.evaluation.models[other][metric]
    if first.signature != second.signature:
        return "not measured alike"
    if (start := MEASURED_FROM.search(first.signature)) and not _same(a.rows, b.rows, start[1]):
        return "measured from a model that is not the same in both"
    if metric in ("loss", "perplexity") and not _same_tokens(a.rows, b.rows, models):
        return "they count different tokens, or the run kept none"
    if first.low is None and first.value is not None and second.value is not None:  # resampling says nothing of it
        return statistics.Comparison(second.value - first.value, None, None, None, None, None)
    ours, theirs = _scores(a.rows, mine, metric, first), _scores(b.rows, other, metric, second)
    if ours is None or theirs is None:
        return "the value is not the mean of the rows, and rows.parquet keeps no more than these"
    resamples = a.info.config.get("resamples") if a.info else None
    return statistics.compare(ours, theirs, seed=seed, resamples=resamples if isinstance(resamples, int) else RESAMPLES)


def _same_tokens(a: pa.Table | None, b: pa.Table | None, models: tuple[str, str]) -> bool:
    """Whether the references are as many tokens to both models, row by row."""
    if a is None or b is None:
        return False
    ours, theirs = (_column(rows, f"{model}|tokens") for rows, model in zip((a, b), models, strict=True))
    return bool(ours) and ours == theirs


def _scores(rows: pa.Table | None, model: str, metric: str, measured: Measured) -> Scores | None:
    """A metric of one run; None where its rows do not say what its value is. Rows without a score (nan) do not count."""
    if rows is None or f"{model}|{metric}" not in rows.column_names or measured.value is None:
        return None
    values = _numbers(rows, f"{model}|{metric}")
    tokens = _numbers(rows, f"{model}|tokens") if f"{model}|tokens" in rows.column_names else None
    return statistics.of_kept_rows(values, measured.value, measured.signature, measured.higher_is_better, tokens)


def _numbers(rows: pa.Table, column: str) -> np.ndarray:
    return np.array([math.nan if v is None else v for v in rows[column].to_pylist()], dtype=np.float64)
