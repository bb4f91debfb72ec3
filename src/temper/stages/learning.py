"""Learning curves: a score over how much data was used, or over how many steps, and from where on more of it shows nothing.

Each point is a trial of a sweep, trained by itself: of fewer steps the whole schedule is shorter, too. Every point is
compared with the last of its line, row by row; all p-values are adjusted together (Holm).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet

from temper import statistics
from temper.errors import RecipeError
from temper.runfolder import read_json
from temper.stages.space import Measure, Settings, Space
from temper.types import Scores

RESAMPLES = 10_000


class Point(NamedTuple):
    """A trial on a line: where it stands, what it scored, and its rows' scores where they can be compared."""

    trial: int
    x: float
    measured: dict[str, Any]
    scores: Scores | None


def check(fields: Sequence[str], space: Space, search: str) -> None:
    """What `curve` names can be drawn.

    Raises:
        RecipeError: no grid, a field that is not varied, values that are not two different positive numbers.
    """
    if fields and search != "grid":
        raise RecipeError("a curve has all its points: it needs a grid", where="curve", do="search: grid")
    for field in fields:
        if field not in space:
            raise RecipeError(
                f"curve: {field} is not varied", where="curve", do=f"name one of {', '.join(space)}, or vary it"
            )
        values = space[field]
        numbers = (
            [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
            if isinstance(values, list)
            else []
        )
        if len(set(numbers)) < 2 or numbers != values:
            raise RecipeError(
                f"curve: {field} needs numbers to run along, two at least, and its values are {values}",
                where=f"vary.{field}",
                do="such as sft.share: [0.25, 0.5, 1.0], or sft.max_steps: [50, 100, 200]",
            )


def curves(
    fields: Sequence[str], measure: Measure, trials: Sequence[dict[str, Any]], folders: dict[int, Path], *, seed: int
) -> dict[str, Any]:
    """curve.json: for each field a line for every combination of the other settings, and what each line says.

    Args:
        trials: those that are done, as trials.json has them.
        folders: trial's number → the folder of its evaluation.
    """
    found: list[dict[str, Any]] = []
    for field in fields:
        lines: dict[str, list[dict[str, Any]]] = {}
        for trial in trials:
            others = {name: value for name, value in trial["settings"].items() if name != field}
            lines.setdefault(_said(others), []).append(trial)
        found.append(
            {
                "field": field,
                "lines": [_line(field, said, line, measure, folders, seed) for said, line in lines.items()],
            }
        )
    every = [point for curve in found for line in curve["lines"] for point in line["points"]]
    tested = [point for point in every if point.get("p") is not None]
    for point, p in zip(tested, statistics.holm([point["p"] for point in tested]), strict=True):
        point["p_adjusted"] = p
    for curve in found:
        for line in curve["lines"]:
            line["stops"], line["finding"] = _finding(curve["field"], measure.metric, line, len(tested) or 1)
            for point in line["points"]:
                point.pop("error")
    return {"schema": 1, "measure": str(measure), "metric": measure.metric, "curves": found}


def _line(
    field: str, said: str, trials: Sequence[dict[str, Any]], measure: Measure, folders: dict[int, Path], seed: int
) -> dict[str, Any]:
    """The points of one line by rising x, each compared with the last."""
    points = sorted((_point(t, field, measure, folders[t["number"]]) for t in trials), key=lambda p: p.x)
    last, out = points[-1], []
    why = _untested([folders[p.trial] for p in points], points)
    for point in points:
        entry: dict[str, Any] = {"x": point.x, "trial": point.trial, "p_adjusted": None, "error": None}
        entry |= {key: point.measured.get(key) for key in ("value", "low", "high", "n")}
        if not why and point is not last:
            assert point.scores is not None and last.scores is not None
            compared = statistics.compare(point.scores, last.scores, seed=seed, resamples=RESAMPLES)
            more = {"difference": compared.difference, "difference_low": compared.low, "difference_high": compared.high}
            entry |= {key: _number(value) for key, value in more.items()} | {"p": compared.p, "error": compared}
        out.append(entry)
    higher = last.measured.get("higher_is_better")
    return {"others": said, "higher_is_better": higher, "points": out, "untested": why}


def _point(trial: dict[str, Any], field: str, measure: Measure, folder: Path) -> Point:
    entry = read_json(folder / "evaluation.json")["models"][measure.model][measure.metric]
    kept = pyarrow.parquet.read_table(folder / "rows.parquet")
    rows = _column(kept, f"{measure.model}|{measure.metric}")
    tokens = _column(kept, f"{measure.model}|tokens") if f"{measure.model}|tokens" in kept.column_names else None
    value = math.nan if entry["value"] is None else entry["value"]
    scores = statistics.of_kept_rows(rows, value, entry["signature"], entry["higher_is_better"], tokens)
    return Point(trial["number"], float(trial["settings"][field]), entry, scores)


def _column(kept: Any, name: str) -> np.ndarray:
    return np.array([math.nan if v is None else v for v in kept[name].to_pylist()], np.float64)


def _untested(folders: Sequence[Path], points: Sequence[Point]) -> str:
    """Why the points of a line cannot be compared row by row; empty where they can."""
    if len(points) < 2:
        return "one point alone is no curve"
    if len({read_json(folder / "evaluation.json")["data"]["sha256"] for folder in folders}) > 1:
        return "the trials were evaluated on different rows"
    if len({p.measured["signature"] for p in points}) > 1:
        return "the trials were not measured alike"
    if any(p.measured["value"] is None for p in points):
        return "a value is no number"
    if any(p.scores is None for p in points):
        return "rows do not say what the metric is: it is no mean of them"
    return ""


def _finding(field: str, metric: str, line: dict[str, Any], together: int) -> tuple[float | None, str]:
    """From where on the difference to the last point is not significant (None: nowhere), and a sentence on it."""
    points, of = line["points"], f" ({line['others']})" if line["others"] else ""
    if line["untested"]:
        return None, f"{metric} over {field}{of}: not tested, {line['untested']}."
    *before, last = points
    clear = [
        p for p in before if p["p_adjusted"] is not None and p["p_adjusted"] < statistics.ALPHA and p["difference"]
    ]
    if clear and clear[-1] is before[-1]:
        step, up = before[-1], (before[-1]["difference"] > 0) == line["higher_is_better"]
        what = "still changes" if line["higher_is_better"] is None else "still gets better" if up else "gets worse"
        return None, (
            f"{metric} {what} from {field} {step['x']:g} to {last['x']:g}{of}: difference {_interval(step)}, "
            f"p adjusted {step['p_adjusted']:.2g}."
        )
    stops = points[before.index(clear[-1]) + 1] if clear else points[0]
    detectable = stops["error"].smallest_detectable(together) if stops["error"] is not None else None
    bound = f"; a true difference of {detectable:.2g} would be shown in 80 % of cases" if detectable is not None else ""
    what = f"More than {field} {stops['x']:g} shows no further change in {metric}"
    if not clear:
        what = f"{field} shows no effect on {metric} from {stops['x']:g} on"
    return stops[
        "x"
    ], f"{what}{of}: difference to {last['x']:g} {_interval(stops)}, p adjusted {stops['p_adjusted']:.2g}{bound}."


def _interval(point: dict[str, Any]) -> str:
    text = f"{point['difference']:+.3g}"
    if point["difference_low"] is not None:
        text += f" (95 % interval {point['difference_low']:+.3g} to {point['difference_high']:+.3g})"
    return text


def _said(settings: Settings) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _number(value: float | None) -> float | None:
    """JSON has no nan."""
    return None if value is None or not math.isfinite(value) else float(value)
