"""Whether samples of a server are the policy's: its log-probabilities of the tokens against the policy's own.

Legend: S scored tokens of a rollout (a completion with its end token).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np

from temper.errors import TrainingError
from temper.models.scores import Policy

LEAST = 32  # tokens below which nothing is said of a lag
SURE = 6.0  # standard errors of a lag: tokens of one completion are not independent
# Nats a token, root mean square, by which an adapter must have moved the policy before its lack can be told from the rounding
# of the policy's own passes, which is in both sides of the comparison.
LEAST_MOVED = {"float32": 2e-4, "fp16": 0.01, "bf16": 0.05}


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What a comparison found.

    `gap` and `to_base` are the mean absolute differences of the server's log-probabilities from the policy's and from those of
    its base without the adapter, in nats a token; `lag` is as of `lag_of`. The last two are None of a policy without an adapter.
    """

    gap: float
    to_base: float | None
    lag: float | None

    def check(self, bound: float, where: str, name: str) -> None:
        """
        Args:
            bound: of the gap.
            name: what the policy is called at the server.

        Raises:
            TrainingError: the samples are not the policy's.
        """
        if self.lag is not None and self.lag > 0.5:
            raise TrainingError(
                f"the engine does not sample from the policy: {self.lag:.0%} of what the adapter has learnt is missing from the "
                f"log-probabilities of its samples, which are {self.gap:.2g} nats a token from the policy's and "
                f"{self.to_base:.2g} from those of the base without the adapter",
                where=where,
                do=f"the engine said that it had loaded «{name}»: look at its log, and start it anew",
            )
        aside = "" if self.to_base is None else f", and by {self.to_base:.2g} from those of the base without the adapter"
        if not self.gap <= bound:
            raise TrainingError(
                f"the engine does not sample from the policy: log-probabilities of its samples differ by {self.gap:.2g} nats a token "
                f"on average from the policy's own{aside}; rollouts.bound allows {bound:g}",
                where=where,
                do="is the engine's base the policy's, in a precision close to it, and its --logprobs-mode raw_logprobs?",
            )


def compare(theirs: np.ndarray, own: np.ndarray, base: np.ndarray | None, floor: float) -> Agreement:
    """What is found between log-probabilities [S] of a server, of the policy, and of its base if it has one beneath an adapter;
    `floor` as of `lag_of`."""
    theirs, own = theirs.astype(np.float64), own.astype(np.float64)
    gap = float(np.abs(theirs - own).mean())
    if base is None:
        return Agreement(gap, None, None)
    return Agreement(gap, float(np.abs(theirs - base).mean()), lag_of(theirs, own, base.astype(np.float64), floor))


@contextlib.contextmanager
def at_one(policy: Policy) -> Iterator[None]:
    """Within, a policy's log-probabilities are those of the plain softmax."""
    before, policy.temperature = policy.temperature, 1.0
    try:
        yield
    finally:
        policy.temperature = before


def lag_of(theirs: np.ndarray, own: np.ndarray, base: np.ndarray, floor: float) -> float | None:
    """How much of what an adapter does is missing from a server's log-probabilities: 0, nothing; 1, all, it is the base's. None
    where that cannot be told, for the adapter does too little yet.

    The least-squares slope of (theirs − own) on (base − own): the server's noise has no part in it, however much larger than the
    adapter's doing it is, once there are tokens enough.

    Args:
        floor: root mean square of base − own below which nothing is said.

    >>> draw = np.random.default_rng(0)
    >>> base = draw.normal(size=5000) - 3
    >>> own = base + 0.01 * draw.normal(size=5000)
    >>> noise = 0.02 * draw.normal(size=5000)
    >>> abs(round(lag_of(own + noise, own, base, 1e-3), 1)), round(lag_of(base + noise, own, base, 1e-3), 1)
    (0.0, 1.0)
    >>> lag_of((own + noise)[:100], own[:100], base[:100], 1e-3) is None
    True
    """
    moved, off = base - own, theirs - own
    size = float(moved @ moved)
    if len(moved) < LEAST or size < floor**2 * len(moved):
        return None
    slope = float(off @ moved) / size
    error = float(np.sqrt(((off - slope * moved) ** 2).sum() / (len(moved) - 1) / size))
    return slope if SURE * error < 0.5 else None
