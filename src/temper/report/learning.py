"""Learning curves: a score over how much data or how many steps it took, with intervals, and where more shows nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from temper.report.contract import CurveLine, CurvePoint, Learning, LearningCurve
from temper.report.phrases import NONE, arrow, compact, decimals, number, p_value
from temper.report.plots import COLOURS, circle, label, room, svg, tick_labels, ticks
from temper.report.read import Run, Stage
from temper.report.tables import Cell, Table, words

LOG = 5  # an axis whose largest value is more than so many times its smallest is logarithmic


@dataclass(frozen=True)
class LearningView:
    """One curve: its lines in a plot, a sentence for each, and a table."""

    stage: Stage
    title: str
    findings: list[str]
    legend: list[tuple[int, str]]
    svg: Markup | None
    table: Table


def learning(run: Run) -> list[LearningView]:
    """A view for each field of each sweep that draws curves."""
    return [_view(s, s.learning, curve) for s in run.stages if s.learning for curve in s.learning.curves if curve.lines]


def _view(stage: Stage, found: Learning, curve: LearningCurve) -> LearningView:
    title = f"{found.metric} over {curve.field}"
    legend = [(k, line.others) for k, line in enumerate(curve.lines, 1)] if len(curve.lines) > 1 else []
    findings = [line.finding for line in curve.lines if line.finding]
    return LearningView(stage, title, findings, legend, plot(curve, title), table(found, curve))


def table(found: Learning, curve: LearningCurve) -> Table:
    """One line a point: the score, and how far the last point of its line is from it."""
    every = [p for line in curve.lines for p in line.points]
    places = decimals([(p.low, p.high) for p in every])
    apart = decimals([(p.difference_low, p.difference_high) for p in every])
    higher = next((line.higher_is_better for line in curve.lines), None)
    head = [
        Cell(curve.field),
        Cell(f"{found.metric} {arrow(higher)}".strip()),
        Cell("the last − this"),
        Cell("p adjusted"),
    ]
    several = len(curve.lines) > 1
    body = []
    for line in curve.lines:
        for p in line.points:
            cells = [
                Cell(f"{p.x:g}"),
                Cell(number(p.value, places), _interval(p.low, p.high, places)),
                Cell(
                    number(p.difference, apart, sign=True),
                    _interval(p.difference_low, p.difference_high, apart, sign=True),
                ),
                Cell(p_value(p.p_adjusted)),
            ]
            body.append([words(line.others), *cells] if several else cells)
    note = (
        "Each point is one training run of its own. Intervals are 95 % and cover the sampling of test rows, not training "
        "again; p values are of paired tests against the last point of the line, adjusted together."
    )
    return Table([words("the other settings"), *head] if several else head, body, notes=[note])


def _interval(low: float | None, high: float | None, places: int, *, sign: bool = False) -> str:
    return (
        "" if low is None or high is None else f"{number(low, places, sign=sign)} to {number(high, places, sign=sign)}"
    )


def plot(curve: LearningCurve, title: str) -> Markup | None:
    """Points with their intervals, joined line by line; a ring where more shows nothing. Width 360 units; None where there
    are not two points."""
    lines = [[p for p in line.points if p.value is not None and math.isfinite(p.x)] for line in curve.lines]
    every = [p for points in lines for p in points]
    xs = sorted({p.x for p in every})
    if len(xs) < 2:
        return None
    left, right, top, bottom, width, height = 50.0, 346.0, 10.0, 176.0, 360, 212
    y_low, y_high = room(*_ends([v for p in every for v in (p.value, p.low, p.high)]))
    log = xs[0] > 0 and xs[-1] / xs[0] > LOG

    def at(x: float, y: float) -> tuple[float, float]:
        a, b, c = (math.log(v) if log else v for v in (xs[0], xs[-1], x))
        return left + 8 + (c - a) / (b - a) * (right - left - 16), bottom - (y - y_low) / (y_high - y_low) * (
            bottom - top
        )

    out = []
    marks = ticks(y_low, y_high)
    for tick, text in zip(marks, tick_labels(marks), strict=True):
        _, y = at(xs[0], tick)
        out.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(label(left - 5, y + 3.5, text, "end"))
    edge = -math.inf
    for x in xs:  # the values that were tried, as many of them as fit
        px = at(x, y_low)[0]
        if px - edge >= 7 * len(f"{x:g}"):
            out.append(label(px, bottom + 16, f"{x:g}", "middle"))
            edge = px
    out.append(label((left + right) / 2, height - 6, curve.field, "middle", "name"))
    for k, (line, points) in enumerate(zip(curve.lines, lines, strict=True), 1):
        out += _drawn(line, points, f"c{k % COLOURS}", at)
    return svg(width, height, title, out)


def _drawn(line: CurveLine, points: list[CurvePoint], kind: str, at: Any) -> list[str]:
    places = [at(p.x, p.value) for p in points]
    out = [f'<polyline class="line {kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>']
    for p, (x, y) in zip(points, places, strict=True):
        if p.low is not None and p.high is not None:
            y1, y2 = at(p.x, p.low)[1], at(p.x, p.high)[1]
            out.append(f'<line class="bar {kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>')
        tip = escape(f"{line.others} {p.x:g}: {compact(p.value) if p.value is not None else NONE}".strip())
        out.append(circle(x, y, 3.4, kind, f"<title>{tip}</title>"))
        if p.x == line.stops:
            out.append(circle(x, y, 6.5, "ring"))
    return out


def _ends(values: list[float | None]) -> tuple[float, float]:
    known = [v for v in values if v is not None]
    return min(known), max(known)
