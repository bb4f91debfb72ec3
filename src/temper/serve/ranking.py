"""Votes → which model is better, how sure that is, whether people agree, and how many more votes it would take.

Votes on one prompt are not independent, so prompts are what is resampled and what tests count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import krippendorff
import numpy as np
from scipy.special import ndtri

from temper import statistics
from temper.serve.votes import Battle
from temper.types import Scores

RESAMPLES = 1000
SCALE = 400 / math.log(10)  # of Elo: 400 points are odds of 10 to 1
CENTRE = 1000.0
FEW = 5  # prompts below which nothing is said of how many more would do
PRIOR = 1.0  # imaginary ties between each two models that met: without any, one that always won would be infinitely better


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A verdict in terms of models: `score` is 1 where a was better, 0 where b was, 0.5 where neither."""

    a: str
    b: str
    score: float
    prompt: str
    who: str
    both_bad: bool = False


def outcomes(battles: Sequence[Battle]) -> list[Outcome]:
    """Verdicts with the models of each in alphabetical order."""
    out = []
    for battle in battles:
        assert battle.verdict is not None
        left, right = battle.models["left"], battle.models["right"]
        score = {"left": 1.0, "right": 0.0}.get(battle.verdict, 0.5)
        a, b = sorted((left, right))
        prompt = battle.item or battle.id
        out.append(Outcome(a, b, score if a == left else 1 - score, prompt, battle.who, battle.verdict == "both_bad"))
    return out


def bradley_terry(wins: np.ndarray, met: np.ndarray | None = None) -> np.ndarray:
    """Strengths [N] (natural logarithms of odds, mean 0) that make the wins likeliest (Bradley and Terry 1952); a tie is half
    a win for either.

    Newton's method on the logarithm of the likelihood, which is concave.

    Args:
        wins: [N, N], how often i was better than j.
        met: [N, N], whether i and j get imaginary ties; by default where either was better. A resample is given those of
            all votes: else models would drift apart in it that only single prompts connect.

    >>> bradley_terry(np.array([[0, 7.5], [1.5, 0]])).round(4)  # ± log(8 / 2) / 2
    array([ 0.6931, -0.6931])
    """
    n = len(wins)
    wins = wins + PRIOR / 2 * (wins + wins.T > 0 if met is None else met)
    games = wins + wins.T
    strength = np.zeros(n)
    for _ in range(100):
        chance = 1 / (1 + np.exp(strength[None] - strength[:, None]))  # [N, N]: that i is better than j
        slope = wins.sum(1) - (games * chance).sum(1)
        bend = games * chance * (1 - chance)
        curvature = np.diag(bend.sum(1)) - bend
        step = np.linalg.lstsq(curvature, slope, rcond=None)[0]  # singular along the mean: that stays as it is
        strength = strength + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            break
    return strength - strength.mean()


def table(found: Sequence[Outcome], names: Sequence[str]) -> np.ndarray:
    """Wins [N, N]."""
    place = {name: k for k, name in enumerate(names)}
    wins = np.zeros((len(names), len(names)))
    for one in found:
        wins[place[one.a], place[one.b]] += one.score
        wins[place[one.b], place[one.a]] += 1 - one.score
    return wins


def ranked(found: Sequence[Outcome], *, seed: int = 0) -> list[dict[str, Any]]:
    """Models by Bradley–Terry score on Elo's scale, mean 1000, with percentile intervals of a bootstrap over prompts.

    `group` counts sets of models that no chain of votes connects: scores of two groups cannot be compared.
    """
    names = sorted({name for one in found for name in (one.a, one.b)})
    if not names:
        return []
    wins = table(found, names)
    met = wins + wins.T > 0
    scores = CENTRE + SCALE * bradley_terry(wins)
    prompts = sorted({one.prompt for one in found})
    tables = np.zeros((len(prompts), len(names), len(names)))
    place = {prompt: k for k, prompt in enumerate(prompts)}
    for one in found:
        tables[place[one.prompt]] += table([one], names)
    draw = np.random.default_rng(seed)
    n = len(prompts)
    counts = [np.bincount(draw.integers(0, n, n), minlength=n) for _ in range(RESAMPLES)]
    drawn = np.array([CENTRE + SCALE * bradley_terry(np.tensordot(c, tables, 1), met) for c in counts])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    groups = _groups(wins)
    out = []
    for k, name in enumerate(names):
        mine = [(o.score if o.a == name else 1 - o.score, o.both_bad) for o in found if name in (o.a, o.b)]
        few = len(prompts) < 2
        out.append(
            {
                "model": name, "score": scores[k], "low": None if few else low[k], "high": None if few else high[k],
                "votes": len(mine), "won": sum(s == 1 for s, _ in mine), "lost": sum(s == 0 for s, _ in mine),
                "tied": sum(s == 0.5 and not bad for s, bad in mine), "both_bad": sum(bad for _, bad in mine), "group": groups[k],
            }
        )  # fmt: skip
    return sorted(out, key=lambda row: (row["group"], -row["score"]))


def _groups(wins: np.ndarray) -> list[int]:
    """For each model the number of the set that votes connect it with."""
    group = list(range(len(wins)))
    for i, j in zip(*np.nonzero(wins + wins.T), strict=True):
        old, new = max(group[i], group[j]), min(group[i], group[j])
        group = [new if g == old else g for g in group]
    order = {g: k for k, g in enumerate(sorted(set(group)))}
    return [order[g] for g in group]


def couples(found: Sequence[Outcome], *, seed: int = 0) -> list[dict[str, Any]]:
    """Each two models that met: how often a was better, with interval and p (Holm over all couples), and how many more
    prompts it would take to tell them apart in four of five cases, if they differ by as much as it looks now."""
    names = sorted({name for one in found for name in (one.a, one.b)})
    rows, ps = [], []
    for a, b in combinations(names, 2):
        mine = [o for o in found if (o.a, o.b) == (a, b)]
        if not mine:
            continue
        by_prompt: dict[str, list[float]] = {}
        for one in mine:
            by_prompt.setdefault(one.prompt, []).append(one.score)
        means = np.array([float(np.mean(scores)) for scores in by_prompt.values()])
        compared = statistics.compare(Scores.mean(np.full(len(means), 0.5), "even"), Scores.mean(means, "even"), seed=seed)
        rows.append(
            {
                "a": a, "b": b, "votes": len(mine), "prompts": len(means), "a_better": sum(o.score == 1 for o in mine),
                "b_better": sum(o.score == 0 for o in mine), "tied": sum(o.score == 0.5 and not o.both_bad for o in mine),
                "both_bad": sum(o.both_bad for o in mine), "rate": float(means.mean()),
                "low": None if compared.low is None else 0.5 + compared.low, "high": None if compared.high is None else 0.5 + compared.high,
                "p": compared.p, "_error": compared.error,
            }
        )  # fmt: skip
        ps.append(compared.p)
    for row, adjusted in zip(rows, statistics.holm(ps), strict=True):
        row["p_adjusted"] = adjusted
        row["more"] = _more(row, len(rows), adjusted)
        del row["_error"]
    return rows


def _more(row: dict[str, Any], compared: int, adjusted: float | None) -> int | None:
    """Further prompts until the difference would show; 0 where it shows already, None where nothing can be said."""
    if adjusted is not None and adjusted < statistics.ALPHA:
        return 0
    n, difference, error = row["prompts"], row["rate"] - 0.5, row["_error"]
    if n < FEW or not error or difference == 0:
        return None
    needed = float(ndtri(1 - statistics.ALPHA / compared / 2) + ndtri(statistics.POWER))
    return max(1, math.ceil(n * (needed * error / difference) ** 2) - n)


def agreement(found: Sequence[Outcome], *, seed: int = 0) -> dict[str, Any] | None:
    """Krippendorff's alpha (2004, ordinal: worse, neither, better) over prompts that several people judged, with a percentile
    interval over them; None where nobody judged what another did.

    1: they always agree; 0: as if they chose by chance; below: less than that.
    """
    said: dict[tuple[str, str, str], dict[str, float]] = {}
    for one in found:
        said.setdefault((one.prompt, one.a, one.b), {})[one.who] = 2 * one.score
    shared = [by for by in said.values() if len(by) > 1]
    if not shared:
        return None
    people = sorted({who for by in shared for who in by})
    ratings = np.array([[by.get(who, np.nan) for by in shared] for who in people])
    value = _alpha(ratings)
    draw = np.random.default_rng(seed)
    drawn = [_alpha(ratings[:, draw.integers(0, len(shared), len(shared))]) for _ in range(RESAMPLES)] if len(shared) > 1 else []
    known = [x for x in drawn if x is not None]
    low, high = np.quantile(known, [0.025, 0.975]).tolist() if known and value is not None else (None, None)
    return {"alpha": value, "low": low, "high": high, "people": len(people), "shared": len(shared)}


def _alpha(ratings: np.ndarray) -> float | None:
    """None where all say one and the same: there is nothing to agree or disagree about."""
    if len(np.unique(ratings[~np.isnan(ratings)])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=ratings, level_of_measurement="ordinal"))
