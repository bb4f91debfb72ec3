"""Adapter methods by name: what a recipe may say of each, and the PEFT configuration that it becomes."""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from pydantic import Field, model_validator
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from temper.errors import ModelError
from temper.recipe import Config

Task = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS"]

LAYERS = {  # methods that change layers → the keys that they take
    "lora": ("r", "alpha", "dropout", "targets", "rslora", "dora"),
    "adalora": ("r", "first_r", "alpha", "dropout", "targets"),
    "ia3": ("targets", "feedforward"),
}
VIRTUAL = {  # methods that add virtual tokens → the keys that they take
    "prompt": ("tokens", "text"),
    "p_tuning": ("tokens", "hidden"),
    "prefix": ("tokens",),
}
TOGETHER = [f"{one}+{other}" for one in LAYERS for other in VIRTUAL]
METHOD = f"^({'|'.join(re.escape(method) for method in (*LAYERS, *VIRTUAL, *TOGETHER))})$"


class Adapter(Config):
    """What is trained instead of the whole model."""

    method: str = Field(
        default="lora",
        pattern=METHOD,
        description="lora (Hu et al. 2021: W + (alpha / r)·B·A, B and A trained), adalora (Zhang et al. 2023: ranks move to "
        "where they matter), ia3 (Liu et al. 2022: activations scaled); prompt (Lester et al. 2021: virtual tokens), "
        "p_tuning (virtual tokens made by a network), prefix (Li & Liang 2021: virtual keys and values); or one of the first "
        "three with one of the last, trained together: lora+prompt.",
    )
    r: int = Field(
        default=16, ge=1, description="Of lora and adalora: rank of the update; of adalora on average, at the end."
    )
    alpha: float | None = Field(
        default=None, description="Of lora and adalora: scale of the update; null: twice the rank."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Of lora and adalora: dropout on the adapter's input.")
    targets: str | list[str] | None = Field(
        default=None,
        description="Layers to adapt: all-linear, a regular expression, or names; null: all-linear, of ia3 keys, values and "
        "the feed-forward part as PEFT knows them of this kind of model.",
    )
    feedforward: list[str] | None = Field(
        default=None,
        description="Of ia3 with targets of one's own: those of the feed-forward part, whose input is scaled.",
    )
    rslora: bool = Field(default=False, description="Of lora: scale by alpha / √r (Kalajdzievski 2023).")
    dora: bool = Field(default=False, description="Of lora: weight-decomposed (Liu et al. 2024).")
    first_r: int | None = Field(
        default=None, ge=2, description="Of adalora: rank that each layer begins with; null: half as much again as r."
    )
    tokens: int = Field(default=20, ge=1, description="Of prompt, p_tuning and prefix: how many virtual tokens.")
    text: str | None = Field(
        default=None,
        description="Of prompt: virtual tokens begin as this text's embeddings, repeated or cut to `tokens`; null: at random.",
    )
    hidden: int | None = Field(
        default=None, ge=1, description="Of p_tuning: width of its network; null: the model's own."
    )

    @model_validator(mode="after")
    def _fits(self) -> Adapter:
        allowed = {"method", *self.takes}
        if odd := sorted(self.model_fields_set - allowed):
            raise ValueError(f"{self.method} takes {', '.join(self.takes)}, and not {', '.join(odd)}")
        if self.first_r is not None and self.first_r <= self.r:
            raise ValueError(f"first_r {self.first_r} is not above r {self.r}: there would be no rank to take away")
        return self

    @property
    def layers(self) -> str | None:
        """The method that changes layers, if there is one."""
        return next((m for m in self.method.split("+") if m in LAYERS), None)

    @property
    def virtual(self) -> str | None:
        """The method that adds virtual tokens, if there is one."""
        return next((m for m in self.method.split("+") if m in VIRTUAL), None)

    @property
    def takes(self) -> list[str]:
        return [key for m in self.method.split("+") for key in (LAYERS | VIRTUAL)[m]]


def of_layers(adapter: Adapter, model: PreTrainedModel, task: Task) -> PeftConfig:
    """PEFT's configuration of the method that changes layers.

    Raises:
        ModelError: ia3 without targets on a kind of model that PEFT does not know.
    """
    # GPT-2 keeps its matrices transposed; PEFT finds that out by itself too, with a warning
    transposed = any(isinstance(m, Conv1D) for m in model.modules())
    if adapter.layers == "ia3":
        return IA3Config(task_type=task, fan_in_fan_out=transposed, **_ia3(adapter, model.config.model_type))
    alpha: Any = adapter.alpha if adapter.alpha is not None else 2 * adapter.r
    common: dict[str, Any] = {
        "lora_alpha": alpha, "lora_dropout": adapter.dropout, "target_modules": adapter.targets or "all-linear",
        "fan_in_fan_out": transposed, "task_type": task,
    }  # fmt: skip
    if adapter.layers == "adalora":
        first = adapter.first_r or max(adapter.r + 1, adapter.r * 3 // 2)
        # the schedule follows from the number of steps, which is known later: `allocation.Allocation`
        return AdaLoraConfig(target_r=adapter.r, init_r=first, total_step=10**9, **common)
    return LoraConfig(r=adapter.r, use_rslora=adapter.rslora, use_dora=adapter.dora, **common)


def _ia3(adapter: Adapter, kind: str) -> dict[str, Any]:
    if adapter.targets is not None:
        return {"target_modules": adapter.targets, "feedforward_modules": adapter.feedforward or []}
    if kind not in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        raise ModelError(
            f"which layers ia3 scales in a model of kind {kind} is not known",
            do="name them: targets, and those of the feed-forward part in feedforward too",
        )
    return {
        "target_modules": TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[kind],
        "feedforward_modules": TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[kind],
    }


def of_tokens(adapter: Adapter, model: PreTrainedModel, task: Task) -> PeftConfig:
    """PEFT's configuration of the method that adds virtual tokens: an encoder–decoder has them in its encoder alone, but of
    `prefix`, which PEFT gives to the decoder."""
    common: dict[str, Any] = {"task_type": task, "num_virtual_tokens": adapter.tokens}
    if adapter.virtual == "prefix":
        return PrefixTuningConfig(**common)
    common["num_transformer_submodules"] = 1
    if adapter.virtual == "p_tuning":
        return PromptEncoderConfig(encoder_hidden_size=adapter.hidden or model.config.hidden_size, **common)  # type: ignore[arg-type]
    return PromptTuningConfig(**common)


def begin_as(part: Any, model: PreTrainedModel, tokenizer: Any, text: str) -> None:
    """Make virtual tokens those of a text, repeated or cut to as many.

    Raises:
        ModelError: a text without tokens.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ModelError(f"adapter.text {text!r} has no tokens", do="write some words, or leave it out")
    table = part.prompt_encoder[part.active_adapter].embedding.weight
    chosen = torch.tensor([ids[k % len(ids)] for k in range(len(table))], device=table.device)
    with torch.no_grad():
        table.copy_(model.get_input_embeddings()(chosen))
