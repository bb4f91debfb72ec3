"""Optimisers and learning-rate schedules, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import pydantic
import torch

from temper.errors import ModelError, RecipeError
from temper.registry import Registry

optimizers: Registry[Callable[..., torch.optim.Optimizer]] = Registry("optimizer")
schedules: Registry[Callable[..., float]] = Registry("schedule")
WATCHING = frozenset({"plateau"})  # schedules that are also given the validation losses so far
Rate = Callable[[int, Sequence[float]], float]  # (step from 0, validation losses so far) → factor of the learning rate
Share = Annotated[float, pydantic.Field(ge=0, le=1)]


@optimizers.register("adamw")
def adamw(groups: Any, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019): decoupled weight decay, bias-corrected moments."""
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


@optimizers.register("sgd")
def sgd(groups: Any, *, momentum: float = 0.0) -> torch.optim.Optimizer:
    """Stochastic gradient descent."""
    return torch.optim.SGD(groups, momentum=momentum)


@optimizers.register("adafactor")
def adafactor(groups: Any, *, d: float = 1.0, beta2_decay: float = -0.8) -> torch.optim.Optimizer:
    """Adafactor (Shazeer and Stern 2018): steps in proportion to each matrix, whose second moments are kept by rows and columns.

    T5's own: its matrices differ in size a hundredfold, and a step that suits one of them is too small or too large for
    another. The rate is relative: 0.01 to 0.03 where a whole model is trained.
    """
    return torch.optim.Adafactor(groups, d=d, beta2_decay=beta2_decay)


@optimizers.register("adamw_8bit")
def adamw_8bit(groups: Any, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits (Dettmers et al. 2022); needs the extra `bnb`."""
    return _bitsandbytes("adamw_8bit").AdamW8bit(groups, betas=betas, eps=eps)  # type: ignore[no-any-return]


@optimizers.register("paged_adamw_8bit")
def paged_adamw_8bit(
    groups: Any, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.Optimizer:
    """The same, its moments moved to the main memory where a graphics card has no room (Dettmers et al. 2023)."""
    if not torch.cuda.is_available():
        raise ModelError(
            "paged_adamw_8bit moves moments between a CUDA device and the main memory, and there is no such device",
            do="optimizer: adamw_8bit",
        )
    return _bitsandbytes("paged_adamw_8bit").PagedAdamW8bit(groups, betas=betas, eps=eps)  # type: ignore[no-any-return]


def _bitsandbytes(name: str) -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise ModelError(f"{name} needs bitsandbytes", do="pip install 'temper-lm[bnb]', or optimizer: adamw") from None
    return bitsandbytes.optim


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


@schedules.register("wsd")
def wsd(
    step: int,
    steps: int,
    warmup: int,
    *,
    decay: Annotated[float, pydantic.Field(gt=0)] = 0.2,
    floor: Share = 0.0,
) -> float:
    """Warm-up, a stable rate, then a straight line to `floor` over the last steps (warmup–stable–decay).

    Hu et al. 2024 ("MiniCPM", section 4); the straight line is that of Hägele et al. 2024 ("Scaling laws and
    compute-optimal training beyond fixed training durations"), who find a fifth of the steps enough.

    Args:
        decay: steps of the decay, or their share of all steps when below 1.
        floor: the factor at the end.

    >>> [wsd(step, 100, 10) for step in (4, 50, 80, 90)]
    [0.45454545454545453, 1.0, 1.0, 0.5]
    """
    if step < warmup:
        return warmed(step, warmup)
    start = max(warmup, steps - warmup_steps(decay, steps))
    return floor + (1 - floor) * min(1.0, 1 - (step - start) / max(1, steps - start))


@schedules.register("plateau")
def plateau(
    step: int,
    steps: int,
    warmup: int,
    losses: Sequence[float] = (),
    *,
    factor: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.5,
    patience: Annotated[int, pydantic.Field(ge=0)] = 2,
    threshold: Annotated[float, pydantic.Field(ge=0)] = 1e-4,
    floor: Share = 0.0,
) -> float:
    """Warm-up, then 1, and times `factor` whenever validation has not improved for a while.

    The rule of torch's ReduceLROnPlateau (mode min, relative threshold). It is a function of the losses so far, so
    there is no state but them, and they are in every checkpoint.

    Args:
        losses: of the validations so far.
        factor: what the rate is multiplied by.
        patience: validations without improvement that are borne; the next one lowers the rate.
        threshold: an improvement is a loss below the best one times 1 − threshold.
        floor: the rate does not fall below this factor.

    >>> plateau(50, 100, 0, [2.0, 1.0, 1.1, 1.2]), plateau(60, 100, 0, [2.0, 1.0, 1.1, 1.2, 1.0])
    (1.0, 0.5)
    """
    best, bad, rate = math.inf, 0, 1.0
    for loss in losses:
        if loss < best * (1 - threshold):
            best, bad = loss, 0
        else:
            bad += 1
        if bad > patience:
            rate, bad = max(floor, rate * factor), 0
    return warmed(step, warmup) * rate


def named(value: str | dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A recipe's `schedule`, a name or {name: {option: value}} → the name and all its options.

    Raises:
        RecipeError: there is no such schedule or option, or several stand there.
    """
    if isinstance(value, dict) and len(value) != 1:
        raise RecipeError(
            f"{value!r} is not one schedule", where="schedule", do="write a name, or {name: {option: value}}"
        )
    name, options = (value, {}) if isinstance(value, str) else next(iter(value.items()))
    return name, schedules.check(name, options or {}, where="schedule")


def rate_of(value: str | dict[str, Any], steps: int, warmup: int) -> Rate:
    """The schedule of a recipe as a function of the step and of the validation losses so far."""
    name, options = named(value)
    schedule = schedules.get(name)
    if name in WATCHING:
        return lambda step, losses: schedule(step, steps, warmup, losses, **options)
    return lambda step, losses: schedule(step, steps, warmup, **options)


def warmup_steps(warmup: int | float, steps: int) -> int:
    """A number of steps, or a share of them.

    >>> warmup_steps(0.1, 200), warmup_steps(5, 200)
    (20, 5)
    """
    return int(warmup) if warmup >= 1 or warmup == 0 else round(warmup * steps)
