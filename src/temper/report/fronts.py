"""Sweeps and fronts: trials as a table and as parallel coordinates, two scores of many settings against each other."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from temper.report.contract import Front, Measured, Point, Trial, Trials
from temper.report.phrases import NONE, compact, decimals, duration, number
from temper.report.plots import COLOURS, circle, label, room, svg, tick_labels, ticks
from temper.report.read import Run, Stage
from temper.report.tables import Cell, Table, words

LOG = 20  # an axis whose highest value is more than so many times its lowest is logarithmic


@dataclass(frozen=True)
class SweepView:
    """What the page shows of one sweep."""

    stage: Stage
    finding: str
    table: Table
    parallel: Markup | None


@dataclass(frozen=True)
class FrontView:
    """All fronts of a run over the same two scores, in one plot."""

    title: str
    legend: list[tuple[int, str]]
    svg: Markup
    table: Table


@dataclass(frozen=True)
class Curve:
    """The points of one stage; `joined` are those that none of them beats in both scores, along x."""

    name: str
    colour: int
    points: list[Point]
    joined: list[Point]


def sweeps(run: Run) -> list[SweepView]:
    return [_sweep(stage, stage.trials) for stage in run.stages if stage.trials and stage.trials.trials]


def _sweep(stage: Stage, found: Trials) -> SweepView:
    drawn = parallel(found, f"trials of {stage.name}: settings and scores")
    return SweepView(stage, finding(found), trials_table(found), drawn)


def finding(found: Trials) -> str:
    """The best trial in a sentence, and how many came to an end."""
    done, failed = (sum(t.state == state for t in found.trials) for state in ("done", "failed"))
    text = f"{done} of {len(found.trials)} trials done" + (f", {failed} failed" if failed else "") + "."
    best = next((t for t in found.trials if t.number == found.best), None)
    if best is None or not found.measures:
        return text
    main, value = found.measures[0], best.values.get(found.measures[0].measure)
    scored = f"{number(value.value, decimals([(value.low, value.high)]))}{_interval(value)}" if value else NONE
    return f"The {main.best} {main.measure} is {scored}, at {said(best.settings)}. {text}"


def _interval(m: Measured) -> str:
    places = decimals([(m.low, m.high)])
    return "" if m.low is None else f" (95 % interval {number(m.low, places)} to {number(m.high, places)})"


def said(settings: dict[str, Any]) -> str:
    """
    >>> said({"sft.lr": 0.001, "sft.adapter": None})
    'sft.lr 0.001, sft.adapter null'
    """
    return ", ".join(f"{field} {shown(value)}" for field, value in settings.items())


def shown(value: Any) -> str:
    """A setting's value: numbers short, the rest as JSON."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return compact(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def trials_table(found: Trials) -> Table:
    """One line a trial: its settings, its scores with intervals, what it took."""
    places = {
        m.measure: decimals([(v.low, v.high) for t in found.trials if (v := t.values.get(m.measure))])
        for m in found.measures
    }
    marks = {"highest": "↑", "lowest": "↓"}
    head = [Cell("trial"), *(Cell(field) for field in found.fields)]
    head += [Cell(f"{m.measure} {marks[m.best]}") for m in found.measures] + [Cell("time"), words("outcome")]
    body = []
    for t in found.trials:
        line = [Cell(str(t.number + 1)), *(Cell(shown(t.settings.get(field))) for field in found.fields)]
        for k, m in enumerate(found.measures):
            value = t.values.get(m.measure)
            note = (
                f"{number(value.low, places[m.measure])} to {number(value.high, places[m.measure])}"
                if value and value.low is not None
                else ""
            )
            mark = "best" if t.number == found.best and k == 0 else ""
            line.append(Cell(number(value.value, places[m.measure]), note, mark) if value else Cell(NONE))
        body.append([*line, Cell(duration(t.seconds)), _outcome(t, found)])
    notes = [
        "Time: of the stages that differ from trial to trial, shared ones counted for each. Intervals are 95 %, over test rows; the best of many is partly luck."
    ]
    return Table(head, body, notes=notes)


def _outcome(t: Trial, found: Trials) -> Cell:
    if t.state == "failed":
        return words("failed", t.error or "", "failed")
    if t.number == found.best:
        return words("best")
    return words("on the front" if t.number in found.front else t.state)


# Parallel coordinates


def parallel(found: Trials, title: str) -> Markup | None:
    """A line a trial over an axis for each setting and score; the best one thick. Width 360 units; None where there are
    not two axes or not two trials."""
    names = [*found.fields, *(m.measure for m in found.measures)]
    done = [t for t in found.trials if t.state == "done" and all(t.values.get(m.measure) for m in found.measures)]
    if len(names) < 2 or len(done) < 2:
        return None
    values = [[t.settings.get(f) for t in done] for f in found.fields]
    values += [[t.values[m.measure].value for t in done] for m in found.measures]
    left, right, top, bottom, width, height = 62.0, 298.0, 40.0, 196.0, 360, 206  # −1.234e-5 fits beside an axis
    axes = [_axis(v) for v in values]
    xs = [left + (right - left) * k / (len(names) - 1) for k in range(len(names))]
    out = []
    for t in sorted(done, key=lambda t: (t.number == found.best, t.number in found.front)):
        kind = "c1 thick" if t.number == found.best else "c3" if t.number in found.front else "c0 faint"
        row = done.index(t)
        path = " ".join(f"{x:.1f},{bottom - at[row] * (bottom - top):.1f}" for x, (at, _) in zip(xs, axes, strict=True))
        tip = escape(f"trial {t.number + 1}: {said(t.settings)}")
        out.append(f'<polyline class="line {kind}" points="{path}"><title>{tip}</title></polyline>')
    for k, (x, name, (_, marks)) in enumerate(zip(xs, names, axes, strict=True)):
        out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        anchor = "start" if k == 0 else "end" if k == len(names) - 1 else "middle"
        edge = 4 if k == 0 else width - 4 if k == len(names) - 1 else x
        out.append(label(edge, 12 if k % 2 == 0 else 26, _short(name), anchor, "name"))
        for at, text in marks:
            y = bottom - at * (bottom - top) + 3.5
            out.append(
                label(
                    x - 5 if k < len(names) - 1 else x + 5,
                    y,
                    text,
                    "end" if k < len(names) - 1 else "start",
                    "tick halo",
                )
            )
    return svg(width, height, title, out)


def _short(name: str) -> str:
    """
    >>> _short("rloo.kl.beta"), _short("compare.rloo.reward_mean")
    ('rloo.kl.beta', 'rloo.reward_mean')
    """
    return name if len(name) <= 18 else name.partition(".")[2] or name


def _axis(values: list[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Where values lie between 0 and 1, and what is written where. Numbers on a scale, anything else in its order."""
    if all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        low, high = min(values), max(values)
        if high == low:
            return [0.5] * len(values), [(0.5, compact(low))]
        log = low > 0 and high / low > LOG
        scaled = [math.log(v) if log else float(v) for v in values]
        a, b = min(scaled), max(scaled)
        return [(v - a) / (b - a) for v in scaled], [(0.0, compact(low)), (1.0, compact(high))]
    texts = [shown(v) for v in values]
    order = list(dict.fromkeys(texts))
    place = {text: k / (len(order) - 1) if len(order) > 1 else 0.5 for k, text in enumerate(order)}
    return [place[text] for text in texts], [(at, text[:10]) for text, at in place.items()]


# Fronts


def fronts(run: Run) -> list[FrontView]:
    """A view for each pair of scores that any stage has a front over."""
    pairs: dict[tuple[str, str], list[Curve]] = {}
    for stage in run.stages:
        front = stage.front
        points = [p for p in front.points if p.x.value is not None and p.y.value is not None] if front else []
        if front and points:
            curves = pairs.setdefault((front.x, front.y), [])
            curves.append(Curve(stage.name, len(curves) + 1, points, undominated(points, *_higher(stage, front))))
    return [_front(x, y, curves) for (x, y), curves in pairs.items()]


def _higher(stage: Stage, front: Front) -> tuple[bool, bool]:
    """Whether higher is better in x and in y: as a sweep says, else less of x and more of y."""
    objectives = {m.metric: m.best == "highest" for m in stage.trials.measures} if stage.trials else {}
    return objectives.get(front.x, False), objectives.get(front.y, True)


def undominated(points: list[Point], x_higher: bool, y_higher: bool) -> list[Point]:
    """Those that no other point is at least as good as in both scores and better in one, by rising x."""

    def merit(p: Point) -> tuple[float, float]:
        assert p.x.value is not None and p.y.value is not None
        return (p.x.value if x_higher else -p.x.value), (p.y.value if y_higher else -p.y.value)

    kept = [p for p in points if not any(_beats(merit(o), merit(p)) for o in points)]
    return sorted(kept, key=lambda p: p.x.value or 0.0)


def _beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] >= b[0] and a[1] >= b[1] and a != b


def _front(x: str, y: str, curves: list[Curve]) -> FrontView:
    places = [
        decimals([(v.low, v.high) for c in curves for p in c.points for v in [getattr(p, axis)]]) for axis in "xy"
    ]
    body = []
    for c in curves:
        for p in c.points:
            cells = [
                Cell(number(v.value, n), f"{number(v.low, n)} to {number(v.high, n)}" if v.low is not None else "")
                for v, n in zip((p.x, p.y), places, strict=True)
            ]
            body.append([words(c.name), words(p.label), *cells, words("yes" if p in c.joined else "no")])
    head = [words("stage"), words("setting"), Cell(x), Cell(y), words("on the front")]
    note = "On the front: no other point of the same stage is better in one of the two and as good in the other. Bars: 95 % intervals over test rows."
    legend = [(c.colour, c.name) for c in curves]  # of one stage too: which one is nowhere else in sight
    return FrontView(f"{y} over {x}", legend, scatter(curves, x, y), Table(head, body, notes=[note]))


def scatter(curves: list[Curve], x: str, y: str) -> Markup:
    """Points with their intervals; those of a front are joined. Width 360 units."""
    left, right, top, bottom, width, height = 50.0, 350.0, 10.0, 226.0, 360, 262

    def ends(axis: str) -> tuple[float, float]:
        known = [v for c in curves for p in c.points for m in [getattr(p, axis)] for v in (m.value, m.low, m.high)]
        values = [v for v in known if v is not None]
        return room(min(values), max(values))

    (x_low, x_high), (y_low, y_high) = ends("x"), ends("y")

    def at(px: float, py: float) -> tuple[float, float]:
        across, up = (px - x_low) / (x_high - x_low), (py - y_low) / (y_high - y_low)
        return left + across * (right - left), bottom - up * (bottom - top)

    out = []
    marks = ticks(y_low, y_high, about=6)
    for tick, text in zip(marks, tick_labels(marks), strict=True):
        _, py = at(x_low, tick)
        out.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{py:.1f}" y2="{py:.1f}"/>')
        out.append(label(left - 5, py + 3.5, text, "end"))
    marks = ticks(x_low, x_high, about=6)
    for tick, text in zip(marks, tick_labels(marks), strict=True):
        px, half = at(tick, y_low)[0], 3.2 * len(text)  # a digit is some 6 wide
        out.append(label(min(px, width - half), bottom + 15, text, "middle"))
    out.append(label((left + right) / 2, height - 5, x, "middle", "name"))
    out += [part for c in curves for part in _ends(c, at, right)]  # below what is drawn
    for c in curves:
        kind = f"c{c.colour % COLOURS}"
        out += [part for p in c.points for part in _point(p, c, kind, at)]
        if len(c.joined) > 1:
            places = (at(p.x.value or 0.0, p.y.value or 0.0) for p in c.joined)
            out.append(f'<polyline class="line {kind}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in places)}"/>')
    return svg(width, height, f"{y} over {x}", out)


def _ends(c: Curve, at: Any, right: float) -> list[str]:
    """The settings of a front's two ends, written beside them where they are short."""
    out = []
    for p, down in ((c.joined[0], 15), (c.joined[-1], -8)) if len(c.joined) > 1 else ():
        px, py = at(p.x.value or 0.0, p.y.value or 0.0)
        if len(p.label) <= 16:
            anchor = "end" if px > right - 60 else "start"
            out.append(label(px + (6 if anchor == "start" else 4), py + down, p.label, anchor, "tick halo"))
    return out


def _point(p: Point, c: Curve, kind: str, at: Any) -> list[str]:
    """A point, filled where it is on the front, with its intervals as thin bars."""
    assert p.x.value is not None and p.y.value is not None
    px, py = at(p.x.value, p.y.value)
    out = []
    if p.x.low is not None and p.x.high is not None:
        a, b = at(p.x.low, 0)[0], at(p.x.high, 0)[0]
        out.append(f'<line class="bar {kind}" x1="{a:.1f}" x2="{b:.1f}" y1="{py:.1f}" y2="{py:.1f}"/>')
    if p.y.low is not None and p.y.high is not None:
        a, b = at(0, p.y.low)[1], at(0, p.y.high)[1]
        out.append(f'<line class="bar {kind}" x1="{px:.1f}" x2="{px:.1f}" y1="{a:.1f}" y2="{b:.1f}"/>')
    tip = escape(f"{c.name}, {p.label}: {compact(p.x.value)}, {compact(p.y.value)}")
    return [*out, circle(px, py, 4, kind if p in c.joined else f"seed {kind}", f"<title>{tip}</title>")]
