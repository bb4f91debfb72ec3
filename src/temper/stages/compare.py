"""Scores of models → what evaluation.json says of them: values, comparisons, and the spread over seeds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from temper import statistics
from temper.errors import DataError, RecipeError, nearest
from temper.types import Scores


def values(scores: dict[str, Scores], *, seed: int, resamples: int) -> dict[str, Any]:
    """Each metric of one model with its interval, its signature and its direction."""
    out = {}
    for metric, s in scores.items():
        bounds = statistics.interval(s, seed=seed, resamples=resamples)
        low, high = bounds if bounds is not None else (None, None)
        out[metric] = {
            "value": _number(s.value), "low": _number(low), "high": _number(high), "n": s.scored,
            "signature": s.signature, "higher_is_better": s.higher_is_better,
        }  # fmt: skip
    return out


def in_turn(models: Sequence[str]) -> list[tuple[str, str]]:
    """Each model with the first, and with the one before it."""
    first = [(models[0], b) for b in models[1:]]
    return first + [pair for pair in itertools.pairwise(models) if pair not in first]


def comparisons(
    pairs: Sequence[tuple[str, str]], scores: dict[str, dict[str, Scores]], *, seed: int, resamples: int
) -> list[dict[str, Any]]:
    """What the second of each pair has more than the first, adjusted together (Holm)."""
    made = [
        (metric, a, b, statistics.compare(ours, scores[b][metric], seed=seed, resamples=resamples))
        for a, b in pairs
        for metric, ours in scores[a].items()
        if ours.signature == scores[b][metric].signature
    ]
    together = sum(c.p is not None for *_, c in made) or 1
    adjusted = statistics.holm([c.p for *_, c in made])
    return [
        {"metric": metric, "a": a, "b": b, "difference": _number(c.difference), "low": _number(c.low), "high": _number(c.high),
         "p": _number(c.p), "p_adjusted": _number(p), "smallest_detectable": _number(c.smallest_detectable(together)),
         "detectable_level": statistics.ALPHA / together}
        for (metric, a, b, c), p in zip(made, adjusted, strict=True)
    ]  # fmt: skip


def check(expect: Sequence[Any], scores: dict[str, dict[str, Scores]], shown: dict[str, str] | None = None) -> None:
    """Stop where a score is outside the bounds that the recipe expects.

    Args:
        shown: a model's name in the recipe → its name among the scores, where these differ.

    Raises:
        DataError: the first that is, or one that was not computed.
    """
    for e in expect:
        found = scores[(shown or {}).get(e.model) or e.model]
        if e.metric not in found:
            raise RecipeError(
                f"expect asks for «{e.metric}», which is not among the scores", do=nearest(e.metric, found)
            )
        value = found[e.metric].value
        low, high = (-np.inf if e.at_least is None else e.at_least), (np.inf if e.at_most is None else e.at_most)
        if not low <= value <= high:
            bound = f"at least {low:g}" if low > -np.inf and not value >= low else f"at most {high:g}"
            raise DataError(
                f"{e.metric} of {e.model} is {value:.3f}, and the recipe expects {bound}",
                do="see the evaluation's rows; what comes after it would have nothing to show. expect: [] goes on all the same",
            )


def spread(scores: dict[str, dict[str, Scores]], copies: dict[str, str]) -> dict[str, Any]:
    """Values over the seeds of stages that were trained several times."""
    out: dict[str, Any] = {}
    for name in dict.fromkeys(copies.values()):
        family = [name, *(c for c, of in copies.items() if of == name)]
        out[name] = {}
        for metric in scores[name]:
            values = [_number(scores[n][metric].value) for n in family]
            mean, sd = (None, None) if None in values else (float(np.mean(values)), float(np.std(values, ddof=1)))  # type: ignore[arg-type]
            out[name][metric] = {"values": values, "mean": mean, "sd": sd}
    return out


def _number(value: float | None) -> float | None:
    """JSON has no nan."""
    return None if value is None or not np.isfinite(value) else float(value)
