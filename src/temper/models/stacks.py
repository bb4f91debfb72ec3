"""Several adapters on one base at once, and the base as it was without any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from transformers import PreTrainedModel

from temper import hub
from temper.errors import ModelError
from temper.models import adapted, adapters


def stacked(model: PreTrainedModel, sources: Sequence[hub.Source]) -> PeftModel:
    """Several LoRA adapters of one base on it at once: their updates add up, exactly, as one adapter of all their ranks.

    Args:
        model: the base.
        sources: each the base with one adapter on it.

    Raises:
        ModelError: one is no LoRA, or was trained on another base, or on one rounded otherwise.
    """
    folders = [source.adapters[-1] for source in sources]
    for source, folder in zip(sources, folders, strict=True):
        if "parts" in adapters.belongs(source) or PeftConfig.from_pretrained(folder).peft_type != PeftType.LORA:
            raise ModelError(f"only LoRA adapters add up, and {folder} is none", do="take one at a time")
    if len({adapters.held(source) for source in sources}) > 1:
        raise ModelError(
            "adapters of a base that was rounded in different ways cannot be stacked", do="take one at a time"
        )
    names = [f"adapter{k}" for k in range(len(folders))]
    with adapters.without_warnings():
        wrapped: Any = PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])
        for folder, name in zip(folders[1:], names[1:], strict=True):
            wrapped.load_adapter(folder, adapter_name=name)
        wrapped.add_weighted_adapter(names, [1.0] * len(names), "stack", combination_type="cat")
    wrapped.set_adapter("stack")
    for name in names:
        wrapped.delete_adapter(name)
    return wrapped  # type: ignore[no-any-return]


def cleared(model: PreTrainedModel) -> None:
    """Take out what PEFT left in a model when it failed half-way: there is no `PeftModel` to be asked for it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.get_base_layer())
    vars(model).pop("peft_config", None)


def taken_off(model: Any) -> PreTrainedModel:
    """The base as it was before adapters were put on it; nothing is folded in."""
    for part in adapted.parts(model):
        if adapted.kind(part) not in adapted.WORDS | adapted.KEYS:
            model = part.unload()
    return adapted.inner(model)
