"""Optimisers and learning-rate schedules, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from temper.errors import ModelError
from temper.registry import Registry

optimizers: Registry[Callable[..., torch.optim.Optimizer]] = Registry("optimizer")
schedules: Registry[Callable[..., float]] = Registry("schedule")


@optimizers.register("adamw")
def adamw(groups: Any, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019): decoupled weight decay, bias-corrected moments."""
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


@optimizers.register("sgd")
def sgd(groups: Any, *, momentum: float = 0.0) -> torch.optim.Optimizer:
    """Stochastic gradient descent."""
    return torch.optim.SGD(groups, momentum=momentum)


@optimizers.register("adamw_8bit")
def adamw_8bit(groups: Any, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits (Dettmers et al. 2022); needs the extra `bnb`."""
    try:
        import bitsandbytes  # type: ignore[import-not-found]
    except ImportError:
        raise ModelError(
            "adamw_8bit needs bitsandbytes", do="pip install 'temper-lm[bnb]', or optimizer: adamw"
        ) from None
    return bitsandbytes.optim.AdamW8bit(groups, betas=betas, eps=eps)


def groups(named: Iterable[tuple[str, torch.nn.Parameter]], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms do not."""
    trained = [p for _, p in named if p.requires_grad]
    out = [
        {"params": [p for p in trained if p.ndim >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
    ]
    return [g for g in out if g["params"]]


def warmed(step: int, warmup: int) -> float:
    """Linear warm-up: the factor of step 0, 1, … rises to 1 at step `warmup`."""
    return min(1.0, (step + 1) / (warmup + 1))


@schedules.register("constant")
def constant(step: int, steps: int, warmup: int) -> float:
    """Warm-up, then 1.

    >>> constant(0, 100, 3), constant(50, 100, 3)
    (0.25, 1.0)
    """
    return warmed(step, warmup)


@schedules.register("linear")
def linear(step: int, steps: int, warmup: int, *, floor: float = 0.0) -> float:
    """Warm-up, then a straight line to `floor` at the last step.

    >>> linear(60, 110, 10)
    0.5
    """
    if step < warmup:
        return warmed(step, warmup)
    return floor + (1 - floor) * max(0.0, 1 - (step - warmup) / max(1, steps - warmup))


@schedules.register("cosine")
def cosine(step: int, steps: int, warmup: int, *, floor: float = 0.0) -> float:
    """Warm-up, then half a cosine to `floor` (Loshchilov and Hutter 2017).

    >>> round(cosine(60, 110, 10), 12)
    0.5
    """
    if step < warmup:
        return warmed(step, warmup)
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


def warmup_steps(warmup: int | float, steps: int) -> int:
    """A number of steps, or a share of them.

    >>> warmup_steps(0.1, 200), warmup_steps(5, 200)
    (20, 5)
    """
    return int(warmup) if warmup >= 1 or warmup == 0 else round(warmup * steps)
