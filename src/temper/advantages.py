"""Rewards of completions → advantages. Legend: P prompts, k completions of each.

A reward that is nan (none could be given) takes part in no mean, and its advantage is 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import numpy as np

from temper.registry import Registry

advantages: Registry[Callable[..., np.ndarray]] = Registry("advantage")


@advantages.register("group")
def group(rewards: np.ndarray, *, scale: Literal["group", "batch", "none"] = "group") -> np.ndarray:
    """Reward minus the mean of its group, over a standard deviation (Shao et al. 2024, "DeepSeekMath", section 4.1.2).

    Args:
        rewards: [P, k].
        scale: by which standard deviation (of n − 1) to divide: the group's, the batch's, or by none
            (Liu et al. 2025, "Understanding R1-Zero-like training": dividing by the group's favours easy prompts).

    >>> group(np.array([[1.0, 0.0], [0.5, 0.5]]), scale="none").tolist()
    [[0.5, -0.5], [0.0, 0.0]]
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a group without any reward has no mean: nan, made 0 below
        out = rewards - np.nanmean(rewards, axis=1, keepdims=True)
        if scale != "none":
            spread = np.nanstd(rewards, axis=1 if scale == "group" else None, ddof=1, keepdims=True)
            out = out / (spread + 1e-4)
    return np.nan_to_num(out, nan=0.0)


def without_variance(rewards: np.ndarray) -> np.ndarray:
    """Which groups say nothing, because all their rewards are equal or missing: bool [P].

    >>> without_variance(np.array([[1.0, 0.0], [0.5, 0.5], [1.0, np.nan]])).tolist()
    [False, True, True]
    """
    low = np.where(np.isnan(rewards), np.inf, rewards).min(axis=1)
    high = np.where(np.isnan(rewards), -np.inf, rewards).max(axis=1)
    return np.asarray(~(high - low > 1e-8))
