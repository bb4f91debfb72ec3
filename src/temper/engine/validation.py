"""When a run looks at its validation rows, at which of them, and which of them it does worst on.

Work is counted in forward-token equivalents, never in seconds, so that a run on another machine, or one that was killed
and goes on, is the same run: a token that is trained on costs 3 (a backward pass is two forward ones, Kaplan et al. 2020,
"Scaling laws for neural language models", section 2.1), a token that is only scored costs 1.

The rule. Every validation of a run is over the same rows, so all its losses can be compared, and the best weights are the
best by these alone. Where the budget does not pay for ten validations over all rows, these rows are a fixed random part,
and at the end the weights that are kept are scored on all rows: that loss is told, and never compared with the others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from temper.losses import Terms
from temper.trees import Row, Tree, rows_of

TRAINED, SCORED = 3, 1  # forward-token equivalents of a token
OFTEN = 10  # validations that a run would like
LEAST = 64  # examples of a part: the standard error of their mean is an eighth of the spread of single examples


@dataclasses.dataclass(frozen=True)
class Plan:
    """When a run validates, and on what."""

    every: int  # steps; the last step validates too
    rows: list[Row]  # looked at each time
    rest: list[Row]  # looked at beside them once, at the end
    share: float  # of all work, as planned
    text: str = ""  # for the summary
    warning: str = ""

    @property
    def whole(self) -> bool:
        """Whether each validation is over all rows."""
        return not self.rest


def plan(
    held: Sequence[Row],
    *,
    steps: int,
    trained: int,
    budget: float,
    every: int | None,
    row_tokens: int,
    micro_tokens: int,
    seed: int,
) -> Plan:
    """When to validate, and on which of the rows, so that it takes at most `budget` of all work.

    The last validation is over all rows, even where that alone is more than the budget.

    Args:
        held: all validation rows.
        steps: of the whole run.
        trained: tokens that the run trains on.
        budget: share of all work, above 0 and up to 1.
        every: steps between validations where the recipe says it: then all rows each time, whatever that costs.
        row_tokens: as in `rows_of`.
        micro_tokens: as in `rows_of`.
        seed: which part is drawn.
    """
    trees = [t for row in held for t in row.trees]
    if not trees:
        return Plan(every or steps, [], [], 0.0)
    work, whole = TRAINED * trained, SCORED * sum(len(t) for t in trees)
    if every is not None:
        share = _share(_times(steps, every) * whole, work)
        over = share > budget and _times(steps, every) > 1
        warning = (
            f"evaluate_every: {every} makes validation {share:.0%} of all work, more than validation_budget ({budget:.0%})"
            if over
            else ""
        )
        return Plan(every, list(held), [], share, _told(steps, every, trees, trees, share, budget), warning)
    allowed = work * budget / (1 - budget) if budget < 1 else math.inf
    often = min(OFTEN, steps)
    entire = int(min(often, allowed // whole))
    least = SCORED * sum(sorted((len(t) for t in trees), reverse=True)[:LEAST])  # of any LEAST examples, at most
    partial = int(min(often, (allowed - whole) // least)) if allowed > whole else 0
    every = -(-steps // max(1, entire))
    if partial > entire and len(trees) > LEAST:
        every = -(-steps // partial)
        part, rest = drawn(trees, (allowed - whole) / (SCORED * _times(steps, every)), seed)
        if rest:
            rows, others = (rows_of(some, row_tokens, micro_tokens) for some in (part, rest))
            share = _share(_times(steps, every) * SCORED * sum(len(t) for t in part) + whole, work)
            return Plan(every, rows, others, share, _told(steps, every, part, trees, share, budget))
    share = _share(_times(steps, every) * whole, work)
    return Plan(every, list(held), [], share, _told(steps, every, trees, trees, share, budget))


def drawn(trees: Sequence[Tree], tokens: float, seed: int) -> tuple[list[Tree], list[Tree]]:
    """A random part of at most so many tokens, and the rest; which examples it has is a function of the seed."""
    order = np.random.default_rng([seed, len(trees)]).permutation(len(trees)).tolist()
    sums = np.cumsum([len(trees[i]) for i in order])
    n = max(1, int(np.searchsorted(sums, tokens, side="right")))
    return [trees[i] for i in sorted(order[:n])], [trees[i] for i in sorted(order[n:])]


def _times(steps: int, every: int) -> int:
    """Validations of a run: every so many steps, and after the last one."""
    return -(-steps // every)


def _share(validated: float, work: float) -> float:
    return validated / (validated + work)


def _told(steps: int, every: int, part: Sequence[Tree], trees: Sequence[Tree], share: float, budget: float) -> str:
    """A line for the summary."""
    times, all_of_them = _times(steps, every), f"all {len(trees):,} examples"
    when = "once, after the last step" if times == 1 else f"{times} times, every {every} steps"
    what = all_of_them
    if len(part) < len(trees):
        what = f"the same {len(part):,} examples each time, and at the end {all_of_them} for the weights that are kept"
    held = f"budget {budget:.0%}" + ("" if share <= budget else ", which the last one alone exceeds" * (times == 1))
    return f"validation: {when}, on {what}: {share:.1%} of all work ({held}; a trained token counts {TRAINED}, a scored one {SCORED})"


@dataclasses.dataclass(frozen=True)
class Example:
    """One example and its losses. S scored tokens."""

    tree: Tree
    loss: float  # mean, as the loss counts its tokens
    tokens: np.ndarray | None  # [S] −log p of each scored token, nats; None where the policy gives no such numbers


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one pass over validation rows gave; sums, so that passes can be added."""

    total: float
    weight: float
    extras: dict[str, float]  # sums of what the loss logs beside
    worst: list[Example]  # the highest loss first
    tokens: int  # that were scored

    @property
    def loss(self) -> float:
        return self.total / self.weight

    def with_(self, other: Measured, keep: int) -> Measured:
        """Both passes as one."""
        extras = {name: value + other.extras.get(name, 0.0) for name, value in self.extras.items()}
        worst = sorted([*self.worst, *other.worst], key=lambda e: -e.loss)[:keep]
        total, weight = self.total + other.total, self.weight + other.weight
        return Measured(total, weight, extras, worst, self.tokens + other.tokens)


def measure(
    policy: torch.nn.Module, loss: Callable[..., Terms], rows: Sequence[Row], device: torch.device, keep: int = 0
) -> Measured:
    """Score rows without gradient, dropout off.

    Args:
        keep: how many of the examples with the highest mean loss to give back.
    """
    policy.eval()
    total = weight = 0.0
    extras, worst = dict[str, float](), list[Example]()
    with torch.no_grad():
        for row in rows:
            row = row.to(device)
            out = policy(row)
            terms = loss(out, row.weight, **row.extra)
            total += float((terms.values * terms.weights).sum(dtype=torch.float64))
            weight += float(terms.weights.sum(dtype=torch.float64))
            for name, values in terms.extras.items():
                extras[name] = extras.get(name, 0.0) + float((values * terms.weights).sum(dtype=torch.float64))
            if keep:
                worst = sorted([*worst, *_examples(row, out, terms)], key=lambda e: -e.loss)[:keep]
    return Measured(total, weight, extras, worst, sum(r.tokens for r in rows))


def _examples(row: Row, out: torch.Tensor, terms: Terms) -> list[Example]:
    """The examples of a row, each with its mean loss; none where the values are neither of tokens nor of examples."""
    sizes = [len(t.tgt) for t in row.trees]
    values, weights = (t.double().cpu().numpy() for t in (terms.values, terms.weights))
    ends = np.cumsum(sizes)[:-1]
    scored = len(out) == sum(sizes)
    tokens = np.split(-out.double().cpu().numpy(), ends) if scored else [None] * len(sizes)
    if len(values) == sum(sizes):
        of_trees = [(v.sum(), w.sum()) for v, w in zip(np.split(values * weights, ends), np.split(weights, ends), strict=True)]  # fmt: skip
    elif len(values) == len(sizes):
        of_trees = list(zip(values * weights, weights, strict=True))
    else:
        return []
    found = zip(row.trees, of_trees, tokens, strict=True)
    return [Example(tree, float(v / w), t) for tree, (v, w), t in found if w > 0]
