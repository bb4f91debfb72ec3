"""Numbers, durations and findings as a reader would say them."""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from temper.report.contract import Comparison, Evaluation, Measured

ALPHA = 0.05  # of the p values adjusted by Holm
NONE = "–"


def profiled(profile: str | None) -> str:
    """What kind of run this was, by its profile.

    >>> profiled("mini"), profiled(None)
    ('profile mini', 'no profile')
    """
    if not profile:
        return "no profile"
    rehearsal = ": a rehearsal, too small to tell which model is better" if profile == "smoke" else ""
    return f"profile {profile}{rehearsal}"


def decimals(intervals: list[tuple[float | None, float | None]]) -> int:
    """Places that show two digits of the median half-width, and at most three of the widest: more would be noise.

    >>> decimals([(0.29, 0.33)]), decimals([(21.2, 25.5)]), decimals([])
    (3, 1, 3)
    >>> decimals([(0.0033, 0.0052), (0.0039, 0.0056), (0.41, 0.71)])
    3
    """
    halves = [(high - low) / 2 for low, high in intervals if low is not None and high is not None and high > low]
    if not halves:
        return 3
    typical, widest = (1 - math.floor(math.log10(half)) for half in (statistics.median(halves), max(halves)))
    return min(max(min(typical, widest + 1), 0), 6)


def number(value: float | None, places: int = 3, *, sign: bool = False) -> str:
    """
    >>> number(-0.5, 2), number(0.25, 2, sign=True), number(None)
    ('−0.50', '+0.25', '–')
    """
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:{'+' if sign else ''},.{places}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def compact(value: Any) -> str:
    """A number of unknown scale: four significant digits.

    >>> compact(0.00030000), compact(12), compact(1234567.0), compact("text")
    ('0.0003', '12', '1.235e+06', 'text')
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    return f"{value:.4g}".replace("e-0", "e-").replace("-", "−")


def count(value: int | None) -> str:
    """
    >>> count(812345), count(3_700_000), count(7_620_000_000)
    ('812,345', '3.70 M', '7.62 B')
    """
    if value is None:
        return NONE
    if value < 1_000_000:
        return f"{value:,}"
    scale, letter = (1e9, "B") if value >= 1e9 else (1e6, "M")
    return f"{value / scale:.3g} {letter}" if value / scale >= 100 else f"{value / scale:#.3g} {letter}"


def duration(seconds: float | None) -> str:
    """
    >>> duration(0.42), duration(41.2), duration(200), duration(7500)
    ('0.4 s', '41 s', '3 min 20 s', '2 h 5 min')
    """
    if seconds is None:
        return NONE
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def size(amount: int | None) -> str:
    """Bytes in decimal units.

    >>> size(999), size(12_345_678), size(912_345_678), size(None)
    ('999 B', '12.3 MB', '912 MB', '–')
    """
    if amount is None:
        return NONE
    value = float(amount)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{amount} B" if unit == "B" else f"{value:.0f} {unit}" if value >= 99.95 else f"{value:.1f} {unit}"


def percent(share: float) -> str:
    """
    >>> percent(0.0221), percent(0.75), percent(1.0)
    ('2.2 %', '75 %', '100 %')
    """
    return f"{100 * share:.{0 if share >= 0.0995 or share == 0 else 1}f} %"


def moment(iso: str) -> str:
    """
    >>> moment("2026-11-21T09:30:00+00:00")
    '21 November 2026, 09:30 UTC'
    """
    try:
        when = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    zone = f" {when.tzname()}" if when.tzname() else ""
    return f"{when.day} {when:%B %Y, %H:%M}{zone}"


def p_value(p: float | None) -> str:
    """
    >>> p_value(0.00001), p_value(0.0003), p_value(0.0123), p_value(0.4)
    ('< 0.0001', '0.0003', '0.012', '0.40')
    """
    if p is None:
        return NONE
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _p_in_words(p: float) -> str:
    """'p adjusted 0.0003', but 'p adjusted below 0.0001'."""
    return p_value(p).replace("< ", "below ")


def arrow(higher_is_better: bool | None) -> str:
    return {True: "↑", False: "↓", None: ""}[higher_is_better]


def verdict(comparison: Comparison, higher_is_better: bool | None) -> str:
    """What b is beside a: 'better', 'worse', 'different' (a metric without a direction), 'unclear', or 'untested' (a
    maximum, whose difference no test can judge)."""
    p = comparison.p_adjusted if comparison.p_adjusted is not None else comparison.p
    if p is None and comparison.difference is not None:
        return "untested"
    if p is None or p >= ALPHA or not comparison.difference:
        return "unclear"
    if higher_is_better is None:
        return "different"
    return "better" if (comparison.difference > 0) == higher_is_better else "worse"


@dataclass(frozen=True)
class Finding:
    """One sentence of the headline, and its verdict."""

    verdict: str
    text: str


def findings(evaluation: Evaluation, most: int = 12) -> list[Finding]:
    """A sentence a comparison, of metrics that have a direction (a length is in the table, but it is not the news) and
    were tested; where these are more than `most`, of the first metric alone, and the clearest of another family.
    """
    tested = [c for c in evaluation.comparisons if verdict(c, None) != "untested"]
    chosen = [c for c in tested if evaluation.higher_is_better(c.metric) is not None]
    chosen = chosen or tested or evaluation.comparisons
    if len(chosen) > most:
        chosen = [c for c in chosen if c.metric == chosen[0].metric][:most]
        chosen += _second(tested, chosen[0], evaluation)
    out = [compared(c, evaluation) for c in chosen]
    if left := [c for c in evaluation.comparisons if c not in chosen]:
        clear = sum(verdict(c, None) == "different" for c in left)
        which = f", {clear} of them significant" if clear else ""
        out.append(Finding("", f"{len(left)} more comparison{'s' * (len(left) > 1)} in the table below{which}."))
    return out or [
        Finding("", measured(name, metric, value, evaluation.data))
        for name, metrics in evaluation.models.items()
        for metric, value in metrics.items()
    ]


def _second(tested: list[Comparison], main: Comparison, evaluation: Evaluation) -> list[Comparison]:
    """The clearest significant comparison on a metric of another family than the main one (rouge1 and rougeL are one
    family, toxicity_mean and toxicity_share another), of the last model where there is one: it is what a recipe leads to.
    """
    clear = [
        c
        for c in tested
        if verdict(c, evaluation.higher_is_better(c.metric)) in ("better", "worse")
        and _family(c.metric) != _family(main.metric)
    ]
    last = list(evaluation.models)[-1:]
    return sorted(clear, key=lambda c: ([c.b] != last, 1.0 if c.p_adjusted is None else c.p_adjusted))[:1]


def _family(metric: str) -> str:
    """
    >>> _family("rougeL"), _family("rouge1"), _family("toxicity_mean")
    ('rouge', 'rouge', 'toxicity')
    """
    found = re.match("[a-z]+", metric)
    return found[0] if found else metric


def compared(c: Comparison, evaluation: Evaluation) -> Finding:
    """A comparison in plain words."""
    higher = evaluation.higher_is_better(c.metric)
    kind = verdict(c, higher)
    places = decimals([(c.low, c.high)])
    rows = evaluation.row_count(c)
    on = f" with {rows:,} rows" if rows is not None else ""
    if kind == "untested":
        text = f"{c.b} − {c.a} on {c.metric}{on}: {number(c.difference, places, sign=True)}, which no test can judge"
        return Finding(kind, text + ".")
    if kind == "unclear":
        text = f"{c.b} cannot be told apart from {c.a} on {c.metric}{on}"
        if c.difference is not None:
            text += f": difference {number(c.difference, places, sign=True)}{_sureness(c, c.low, c.high)}"
        if c.smallest_detectable is not None:
            text += f"; a true difference of {number(c.smallest_detectable, places)} would be shown in 80 % of cases"
        elif rows is not None and c.detectable_level is not None and 2.0 ** (1 - min(rows, 1000)) >= c.detectable_level:
            text += "; no difference, however large, could have been shown with so few"
        return Finding(kind, text + ".")
    assert c.difference is not None  # verdict() calls a missing difference unclear
    up = c.difference > 0
    # "below by 0.55" is followed by the interval of that 0.55, not of −0.55.
    ends = (c.low, c.high) if up or c.low is None or c.high is None else (-c.high, -c.low)
    text = f"{c.b} is {'above' if up else 'below'} {c.a} on {c.metric} by {number(abs(c.difference), places)}"
    meaning = "" if kind == "different" else f", which is {kind}"
    return Finding(kind, f"{text}{_sureness(c, *ends)}{meaning}.")


def _sureness(c: Comparison, low: float | None, high: float | None) -> str:
    """' (95 % interval … to …, p adjusted …)', as much of it as there is."""
    inside = []
    if low is not None and high is not None:
        places = decimals([(low, high)])
        inside.append(f"95 % interval {number(low, places)} to {number(high, places)}")
    if c.p_adjusted is not None:
        inside.append(f"p adjusted {_p_in_words(c.p_adjusted)}")
    elif c.p is not None:
        inside.append(f"p {_p_in_words(c.p)}")
    return f" ({', '.join(inside)})" if inside else ""


def measured(model: str, metric: str, m: Measured, data: dict[str, Any]) -> str:
    """One model's metric where there is nothing to compare it with."""
    places = decimals([(m.low, m.high)])
    text = f"{model} has {metric} {number(m.value, places)}"
    if m.low is not None and m.high is not None:
        text += f" (95 % interval {number(m.low, places)} to {number(m.high, places)})"
    if m.n is not None:
        text += f" on {m.n:,} rows" + (f" of {data['name']}" if data.get("name") else "")
    return text + "."
