"""Plots as SVG that takes its colours from the page: readable in light and dark, on paper and without a network.

Drawn by hand, not by matplotlib, because a page with a few dozen small plots should stay small and its text should
be the page's own. Series colours are the classes c0 … c7 of page.css.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from temper.report.phrases import compact

COLOURS = 8
MOST_POINTS = 400  # of one line; beyond that, each bucket keeps its lowest and highest point


@dataclass(frozen=True)
class Series:
    """One line of a plot."""

    name: str
    points: list[tuple[float, float]]  # x rising, finite
    colour: int
    dots: bool = False  # a dot a point: few and meaningful, such as validations
    best: tuple[float, float] | None = None


@dataclass(frozen=True)
class Dot:
    """A row of a dot-and-interval plot."""

    label: str
    value: float
    low: float | None
    high: float | None
    colour: int
    text: str  # the value as it is written beside the row
    others: list[float] = field(default_factory=list)  # values of single seeds


def ticks(low: float, high: float, about: int = 4, *, whole: bool = False) -> list[float]:
    """Round numbers that lie within [low, high]; `whole` ones where they count something.

    >>> ticks(0.0, 1.0), ticks(1.0, 10.0, whole=True)
    ([0.0, 0.25, 0.5, 0.75, 1.0], [5.0, 10.0])
    """
    if not high > low:
        return [low]
    raw = (high - low) / about
    raw = max(raw, 1.0) if whole else raw
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in ((1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: list[float]) -> list[str]:
    """The ticks of one axis, all written alike and short.

    >>> tick_labels([0.0, 0.25, 0.5]), tick_labels([19000.0, 20000.0]), tick_labels([0.0, 0.0005])
    (['0', '0.25', '0.50'], ['19k', '20k'], ['0', '5e-4'])
    """
    top = max(abs(v) for v in values)
    if 0 < top < 0.005:
        texts = [f"{v:.3g}" if v == 0 else f"{v:.3e}" for v in values]
        texts = [re.sub(r"\.?0*e-0?", "e-", text) for text in texts]
    else:
        scale, letter = next(((s, x) for s, x in ((1e9, "B"), (1e6, "M"), (1e4, "k")) if top >= s), (1.0, ""))
        scale = 1e3 if letter == "k" else scale
        places = max((len(f"{v / scale:.6g}".partition(".")[2]) for v in values), default=0)
        texts = ["0" if v == 0 else f"{v / scale:.{places}f}{letter}" for v in values]
    return [text.replace("-", "−") if text.startswith("-") else text for text in texts]


def thin(points: list[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Fewer points whose line still shows every spike."""
    if len(points) <= most:
        return points
    out = []
    width = 2 * len(points) / most
    for k in range(most // 2):
        bucket = points[int(k * width) : int((k + 1) * width)]
        out += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return out


def lines(series: list[Series], title: str) -> Markup:
    """Curves over steps. Width 290, height 176 units."""
    right, top, bottom, width, height = 281, 8, 150, 290, 176
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    x_low, x_high = (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 1, max(xs) + 1)
    y_low, y_high = room(min(ys), max(ys))
    y_ticks = ticks(y_low, y_high) if min(ys) < max(ys) else [min(ys)]
    y_texts = tick_labels(y_ticks)
    left = max(42.0, 9 + 6.4 * max(len(text) for text in y_texts))  # a digit of 11 px is at most so wide

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_low) / (x_high - x_low) * (right - left),
            bottom - (y - y_low) / (y_high - y_low) * (bottom - top),
        )

    out = []
    for tick, text in zip(y_ticks, y_texts, strict=True):
        _, y = place(x_low, tick)
        out.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(label(left - 5, y + 3.5, text, "end"))
    x_ticks = ticks(x_low, x_high, about=5, whole=True)
    for tick, text in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x, _ = place(tick, y_low)
        out.append(label(min(x, right - 8), bottom + 16, text, "middle"))
    for s in series:
        drawn = [place(x, y) for x, y in thin(s.points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        out.append(f'<polyline class="line c{s.colour % COLOURS}" points="{path}"/>')
        if s.dots or len(drawn) == 1:
            for (x, y), (step, value) in zip(drawn, thin(s.points), strict=True):
                tip = escape(f"{s.name}, step {compact(step)}: {compact(value)}")
                out.append(circle(x, y, 2.6, f"c{s.colour % COLOURS}", f"<title>{tip}</title>"))
        if s.best:
            x, y = place(*s.best)
            out.append(circle(x, y, 6, "ring"))
    return svg(width, height, title, out)


def dots(rows: list[Dot], title: str, *, zero: bool = False) -> Markup:
    """A dot and its interval a row; `zero` draws the line of no difference. Width 360 units."""
    left, right, width, step = 136, 296, 360, 24
    height = step * len(rows) + 24
    known = [v for r in rows for v in (r.value, r.low, r.high, *r.others) if v is not None] + ([0.0] if zero else [])
    low, high = room(min(known), max(known))

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    out = []
    marks = ticks(low, high)
    for tick, text in zip(marks, tick_labels(marks), strict=True):
        x = place(tick)
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{height - 20}"/>')
        out.append(label(x, height - 6, text, "middle"))
    if zero:
        out.append(f'<line class="zero" x1="{place(0):.1f}" x2="{place(0):.1f}" y1="2" y2="{height - 20}"/>')
    for i, row in enumerate(rows):
        y = step * i + step / 2 + 2
        kind = f"c{row.colour % COLOURS}"
        short = row.label if len(row.label) <= 19 else row.label[:18] + "…"
        out.append(f"<g><title>{escape(row.label)}</title>{label(left - 10, y + 4, short, 'end', 'name')}</g>")
        for other in row.others:
            out.append(circle(place(other), y + 6, 2.2, f"seed {kind}"))
        if row.low is not None and row.high is not None:
            x1, x2 = place(row.low), place(row.high)
            out.append(f'<line class="line {kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y}" y2="{y}"/>')
        out.append(circle(place(row.value), y, 4.5, kind))
        out.append(label(width - 4, y + 4, row.text, "end", "name"))
    return svg(width, height, title, out)


def room(low: float, high: float) -> tuple[float, float]:
    """Limits of an axis, a little wider than the data."""
    gap = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - gap, high + gap


def circle(x: float, y: float, radius: float, kind: str, inside: str = "") -> str:
    """A circle of a class of page.css."""
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{inside}</circle>'


def label(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    """A line of text, escaped."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def svg(width: float, height: float, title: str, parts: list[str]) -> Markup:
    """The whole plot, with its title for those who do not see it."""
    start = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
    return Markup(start + "".join(parts) + "</svg>")
