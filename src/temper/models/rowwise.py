"""LoRA adapters side by side on one base: in one forward pass each row has its own, or none.

The base is computed once for all rows; what each adapter adds is added to its rows alone. (S-LoRA, Sheng et al. 2023,
and Punica, Chen et al. 2023, do so in kernels of their own.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from torch import nn
from transformers import PreTrainedModel

from temper import hub
from temper.errors import ModelError
from temper.models import adapted, adapters, stacks
from temper.models.products import update_of

Factors = dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]  # layer → A [rank, inputs], scale · B [outputs, rank]

# What a configuration may say beside rank, alpha and targets; all else changes more than products.
PLAIN = {
    "bias": ("none",), "use_dora": (False,), "modules_to_save": (None,), "trainable_token_indices": (None,),
    "target_parameters": (None, []), "layer_replication": (None,), "lora_bias": (False,), "alora_invocation_tokens": (None,),
    "init_lora_weights": (True, False, "gaussian"),
}  # fmt: skip


class Rowwise:
    """The adapters of a base that is decoded with; the base itself is never changed.

    Called with one name (or None) a row before each forward pass, whose inputs then have as many rows; where all rows have
    the same, any shape will do.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.factors: dict[str, Factors] = {}
        self.wrapped: dict[nn.Module, Any] = {}  # layer → the forward that it had of its own, if it had one
        self.now: list[tuple[str, torch.Tensor | None]] = []

    def __call__(self, names: Sequence[str | None]) -> None:
        places: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            if name is not None:
                places.setdefault(name, []).append(row)
        device = next(self.model.parameters()).device
        self.now = [
            (name, None if len(rows) == len(names) else torch.tensor(rows, device=device))
            for name, rows in places.items()
        ]

    def add(self, name: str, factors: Factors) -> None:
        self.factors[name] = factors
        for layer in factors:
            if layer not in self.wrapped:
                own = vars(layer).get("forward")
                self.wrapped[layer] = own
                inner = own or functools.partial(type(layer).forward, layer)
                layer.forward = functools.partial(self._applied, layer, inner)

    def remove(self, name: str) -> None:
        del self.factors[name]

    def close(self) -> None:
        """Leave the layers as they were."""
        for layer, own in self.wrapped.items():
            if own is None:
                del layer.forward
            else:
                layer.forward = own
        self.wrapped = {}

    def _applied(self, layer: nn.Module, inner: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = inner(x, *args, **kwargs)
        for name, rows in self.now:
            found = self.factors[name].get(layer)
            if found is None:
                continue
            mine = x if rows is None else x.index_select(0, rows)
            update = nn.functional.linear(nn.functional.linear(mine.to(found[0].dtype), found[0]), found[1])
            if rows is None:
                out += update.to(out.dtype)
            else:
                out.index_add_(0, rows, update.to(out.dtype))
        return out


def plain(source: hub.Source) -> bool:
    """Whether the adapter of a source only adds products of two small matrices to outputs of layers."""
    if len(source.adapters) != 1 or "parts" in adapters.belongs(source):
        return False
    config: Any = PeftConfig.from_pretrained(source.adapters[0])
    return config.peft_type == PeftType.LORA and all(
        getattr(config, field, values[0]) in values for field, values in PLAIN.items()
    )


def factors_of(model: PreTrainedModel, source: hub.Source) -> Factors | None:
    """What an adapter adds to each layer of its base, as PEFT reads it; None where it does something else as well.

    Raises:
        ModelError: it was trained on another base; its weights are not numbers.
    """
    if not plain(source):
        return None
    try:
        wrapped = adapters.put_on(model, source)
    except BaseException:
        stacks.cleared(model)  # PEFT has put layers of its own in before it finds that the weights do not fit
        raise
    found: Factors | None = {}
    try:
        assert len(adapted.parts(wrapped)) == 1
        for module in wrapped.modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            update = update_of(module) if type(module).__name__ in ("Linear", "Linear4bit", "Linear8bitLt") else None
            if update is None:
                found = None
                break
            a, b, scale = update
            pair = (a.detach().clone(), b.detach() * scale)
            if not all(bool(torch.isfinite(x).all()) for x in pair):
                raise ModelError(f"the adapter {source.adapters[0]} has weights that are not numbers", do="look at its training")  # fmt: skip
            assert found is not None
            found[module.get_base_layer()] = pair
    finally:
        stacks.taken_off(wrapped)
    return found
