"""What would end well and leave a wrong model: found before the first step, or at the last."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from temper.errors import TrainingError


def before(
    *,
    steps: int,
    steps_per_epoch: int,
    warmup: int,
    asked: bool,
    validations: int = 0,
    needs: Mapping[str, int] | None = None,
) -> list[str]:
    """Warnings on a plan of steps.

    Args:
        asked: the recipe itself says for how many steps or epochs; then fewer than one epoch is its choice.
        validations: how many there will be.
        needs: what acts only after so many validations without improvement, which must follow a first one.
    """
    out = []
    if steps < steps_per_epoch and not asked:
        out.append(
            f"the run ends after {steps} steps, before the first epoch is through ({steps_per_epoch} steps): part of the data is never seen"
        )
    if warmup and warmup >= steps:
        out.append(f"warm-up takes {warmup} steps and the run has {steps}: the learning rate never reaches its value")
    for what, after in (needs or {}).items():
        if validations <= after:
            out.append(
                f"{what} acts after {after} validations without improvement, and there will be {validations}, the first of "
                "which sets the measure: it can do nothing; set evaluate_every, or give the data stage validation rows"
            )
    return out


def after(
    *,
    schedule: str,
    rates: Sequence[float],
    took: int,
    planned: int,
    steps_per_epoch: int = 0,
    warmup: int = 0,
    peak: float | None = None,
) -> list[str]:
    """Warnings on what a finished run did.

    Args:
        rates: learning rates of the first two steps and of the last.
        peak: the learning rate that warm-up leads to; None: not known.
    """
    out = []
    still = max(rates) == min(rates) or (rates[-1] == peak and took > warmup + 1) if len(rates) > 2 else False
    if schedule != "constant" and still:
        out.append(
            f"the schedule «{schedule}» never moved the learning rate from {rates[-1]:g}"
            + " after warm-up" * bool(warmup)
        )
    if took < planned:
        text = f"stopped early after {took} of {planned} steps: validation did not improve"
        if took <= warmup:
            text += f"; that is in the middle of the warm-up ({warmup} steps)"
        if took < steps_per_epoch:
            text += f"; the first epoch ({steps_per_epoch} steps) was not through"
        out.append(text)
    return out


def check_loss(value: float, step: int, origins: Sequence[str], checkpoints: str) -> None:
    """Stop at a loss that is no number, and name the batch."""
    if math.isfinite(value):
        return
    rows = ", ".join(origins[:6]) + (f" and {len(origins) - 6} more" if len(origins) > 6 else "")
    raise TrainingError(
        f"the loss of step {step} is {value}",
        where=f"rows of the batch: {rows}",
        do=f"lower lr, or use precision: float32 or bf16; look at these rows. The last good checkpoint is kept in {checkpoints}",
    )


def check_validation(value: float, step: int, checkpoints: str) -> None:
    """Stop at weights that score no number: they must neither count as the best nor be trained on."""
    if not math.isfinite(value):
        raise TrainingError(
            f"the validation loss after step {step} is {value}",
            do=f"lower lr, or use precision: float32 or bf16. The last good checkpoint is kept in {checkpoints}",
        )


def check_gradient(norm: float, step: int) -> None:
    """Stop when nothing can be learnt, or everything would be lost."""
    if norm == 0 and step == 1:
        raise TrainingError(
            "the gradient of the first step is exactly zero: nothing that is trained has an influence on the loss",
            do="check adapter targets, and that rows have a trained part",
        )
    if not math.isfinite(norm):
        raise TrainingError(
            f"the gradient norm of step {step} is {norm}", do="lower lr, or use precision: float32 or bf16"
        )
