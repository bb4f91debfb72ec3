"""Rewards of completions → what they are compared with → advantages. Legend: P prompts, k completions of each.

Each entry gives a `Baseline`; the advantage is (reward − mean) / spread. A reward that is nan (none could be given) takes
part in no mean, and its advantage is 0.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from temper.registry import Registry


class Baseline(NamedTuple):
    """What rewards are compared with, and in which unit."""

    mean: np.ndarray  # [P, k]
    spread: np.ndarray  # [P, k]

    def advantage(self, rewards: np.ndarray) -> np.ndarray:
        """(reward − mean) / spread [P, k]; 0 where there is no reward, or nothing to compare it with."""
        return np.nan_to_num((rewards - self.mean) / self.spread, nan=0.0)


advantages: Registry[Callable[..., Baseline]] = Registry("advantage")

EPSILON = 1e-4  # added to a standard deviation, as TRL does


@advantages.register("group")
def group(rewards: np.ndarray, past: float = np.nan, *, scale: Literal["group", "batch", "none"] = "group") -> Baseline:
    """Reward minus the mean of its group, over a standard deviation (Shao et al. 2024, "DeepSeekMath", section 4.1.2).

    Args:
        rewards: [P, k].
        past: mean reward of earlier rollouts, nan: there were none. Not looked at here.
        scale: by which standard deviation (of n − 1) to divide: the group's, the batch's, or by none
            (Liu et al. 2025, "Understanding R1-Zero-like training": dividing by the group's favours easy prompts).

    >>> rewards = np.array([[1.0, 0.0], [0.5, 0.5]])
    >>> group(rewards, scale="none").advantage(rewards).tolist()
    [[0.5, -0.5], [0.0, 0.0]]
    """
    with _missing():
        mean = np.nanmean(rewards, axis=1, keepdims=True)
        spread = np.ones_like(mean)
        if scale != "none":
            spread = np.nanstd(rewards, axis=1 if scale == "group" else None, ddof=1, keepdims=True) + EPSILON
    return _whole(rewards, mean, spread)


@advantages.register("leave_one_out")
def leave_one_out(rewards: np.ndarray, past: float = np.nan) -> Baseline:
    """Reward minus the mean of the prompt's other completions (Kool et al. 2019; Ahmadian et al. 2024, equation 8).

    It does not depend on the completion itself, so the gradient stays unbiased. It is k/(k − 1) times the reward minus
    the mean of the whole group.

    Args:
        rewards: [P, k].
        past: not looked at here.

    >>> rewards = np.array([[1.0, 0.0, 0.5]])
    >>> leave_one_out(rewards).advantage(rewards).tolist()
    [[0.75, -0.75, 0.0]]
    """
    others = (~np.isnan(rewards)).sum(axis=1, keepdims=True) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = (np.nansum(rewards, axis=1, keepdims=True) - rewards) / np.where(others > 0, others, np.nan)
    return _whole(rewards, mean, np.ones_like(rewards))


@advantages.register("baseline")
def baseline(
    rewards: np.ndarray, past: float = np.nan, *, mean: Literal["none", "running", "batch"] = "running"
) -> Baseline:
    """Reward minus the mean of earlier rollouts, or of this one, or as it is; no comparison within a prompt.

    Args:
        rewards: [P, k].
        past: mean reward of all completions of earlier rollouts, nan: there were none.
        mean: running: of earlier rollouts (Williams 1992, section 6, "reinforcement comparison"; Ahmadian et al. 2024,
            equation 5), of which the first, having none before it, takes its own mean; batch: of all completions of the
            rollout, each its own among them, which makes the gradient 1 − 1/N of what it would be; none: 0.

    >>> rewards = np.array([[1.0, 0.0]])
    >>> [baseline(rewards, 0.25, mean=m).advantage(rewards).tolist() for m in ("none", "running", "batch")]
    [[[1.0, 0.0]], [[0.75, -0.25]], [[0.5, -0.5]]]
    """
    with _missing():
        own = float(np.nanmean(rewards))
    value = 0.0 if mean == "none" else own if mean == "batch" or np.isnan(past) else past
    return _whole(rewards, value, 1.0)


@advantages.register("global")
def over_batch(rewards: np.ndarray, past: float = np.nan, *, mean: Literal["batch", "group"] = "batch") -> Baseline:
    """Reward minus a mean, over the standard deviation of all that is left (Hu et al. 2025, "REINFORCE++", equation 10).

    Mean and deviation are taken over the completions of a rollout, not over their tokens.

    Args:
        rewards: [P, k].
        past: not looked at here.
        mean: batch: of the whole rollout, which needs no groups; group: of the prompt's completions
            ("REINFORCE++ with baseline").

    >>> rewards = np.array([[1.0, 0.0], [3.0, 2.0]])
    >>> over_batch(rewards).advantage(rewards).round(3).tolist()
    [[-0.387, -1.162], [1.162, 0.387]]
    """
    with _missing():
        middle = np.nanmean(rewards, axis=1 if mean == "group" else None, keepdims=True)
        spread = float(np.nanstd(rewards - middle, ddof=1)) + EPSILON
    return _whole(rewards, middle, spread)


def without_variance(rewards: np.ndarray) -> np.ndarray:
    """Which groups say nothing, because all their rewards are equal or missing: bool [P].

    >>> without_variance(np.array([[1.0, 0.0], [0.5, 0.5], [1.0, np.nan]])).tolist()
    [False, True, True]
    """
    low = np.where(np.isnan(rewards), np.inf, rewards).min(axis=1)
    high = np.where(np.isnan(rewards), -np.inf, rewards).max(axis=1)
    return np.asarray(~(high - low > 1e-8))


def _whole(rewards: np.ndarray, mean: np.ndarray | float, spread: np.ndarray | float) -> Baseline:
    return Baseline(np.broadcast_to(mean, rewards.shape), np.broadcast_to(spread, rewards.shape))


@contextlib.contextmanager
def _missing() -> Iterator[None]:
    """Silences numpy on groups without any reward: their mean is nan, and their advantage 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
