"""Fields of the stages that train: what the loop reads of a recipe."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, field_validator

from temper.engine import optim
from temper.engine.device import Precision
from temper.recipe import Config, detail

ON_A_CARD = 4096  # tokens of one forward pass on a graphics card


def at_once(on_processor: int) -> Any:
    """The field `micro_tokens`: on a processor more tokens than these take memory and save no time."""
    return Field(
        default_factory=lambda: ON_A_CARD if torch.cuda.is_available() else on_processor,
        description="Tokens of one forward pass, rows stacked: it sets the memory, not the result. By default "
        f"{on_processor} on a processor, {ON_A_CARD} on a graphics card.",
        ge=16,
        json_schema_extra={"affects_result": False},
    )


class Training(Config):
    """Fields that every training stage shares."""

    epochs: float = detail(1.0, "Passes over the data; max_steps overrides it.", gt=0)
    max_steps: int | None = detail(None, "Optimiser steps, whatever the number of epochs.", ge=1)
    batch_size: int = detail(
        16, "Examples a micro-step; an optimiser step takes batch_size × accumulation of them.", ge=1
    )
    accumulation: int = detail(
        1, "Multiplies batch_size. Memory is set by micro_tokens alone; results do not depend on the cut.", ge=1
    )
    row_tokens: int = detail(256, "Examples are packed into rows of this many tokens; a longer one has its own.", ge=16)
    micro_tokens: int = at_once(2048)
    lr: float = detail(1e-4, "Peak learning rate.", gt=0)
    optimizer: str = detail("adamw", "adamw, sgd, adafactor, or adamw_8bit (extra bnb).")
    schedule: str | dict[str, Any] = detail(
        "cosine", "cosine, linear, constant, wsd or plateau, or {name: {option: value}}; see `temper list schedules`."
    )
    warmup: float = detail(0.03, "Warm-up: steps, or a share of them when below 1.", ge=0)
    weight_decay: float = detail(0.0, "Decoupled weight decay of matrices.", ge=0)
    clip: float = detail(1.0, "Largest gradient norm; 0: no clipping.", ge=0)
    precision: Precision = detail(
        "auto", "float32, bf16, fp16 (with loss scaling), or auto: bf16 on GPUs that have it, else float32."
    )
    activation_checkpointing: bool = detail(
        False, "Recompute activations in the backward pass: less memory, a third more time."
    )
    checkpoint_every: int | None = detail(
        None, "Steps between checkpoints; null: by time, at most 5 % of it.", ge=1, affects_result=False
    )
    keep_checkpoints: int = detail(2, "Newest checkpoints kept while training.", ge=1, affects_result=False)

    @field_validator("schedule")
    @classmethod
    def _scheduled(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        optim.named(value)
        return value


class Validated(Training):
    """Fields of the stages that look at a validation split while they train."""

    validation_budget: float = detail(
        0.05,
        "Share of all work that validation may take, in forward-token equivalents (a trained token counts 3, a scored one "
        "1): how often it happens, ten times at most, and on which part of the rows, follow from it. The last is on all.",
        gt=0,
        le=1,
    )
    evaluate_every: int | None = detail(
        None, "Steps between validations, each on all rows, whatever they cost; null: by validation_budget.", ge=1
    )
    keep_best: bool = detail(True, "End with the weights of the best validation instead of the last.")
    patience: int | None = detail(None, "Stop after this many validations without improvement.", ge=1)
    worst: int = detail(
        5,
        "Examples of the highest loss that each validation keeps, with every token's loss.",
        ge=0,
        affects_result=False,
    )
