"""The model that a policy is held close to: what it was before training, or the average of what it has been since."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from temper.models import adapted
from temper.models.scores import Policy
from temper.trees import Row


class Reference:
    """Log-probabilities under the weights that a policy has now, however it is trained afterwards.

    With an adapter these are the weights without it; with full fine-tuning a frozen copy. Make it before the first
    step, and before a checkpoint is read.

    Args:
        rate: None: the reference stays. μ: after each optimiser step θ_ref ← (1 − μ)·θ_ref + μ·θ, an exponential moving
            average of the policy (Ramé et al. 2024, equation EMA). It is one of whole weights: of an adapter's it
            averages the products that the factors stand for, since the product of averaged factors is another matrix.
    """

    def __init__(self, policy: Policy, rate: float | None = None) -> None:
        self.policy, self.rate = policy, rate
        self.copy: Policy | None = None
        if rate is not None or not isinstance(policy.hf, PeftModel):
            self.copy = Policy(_frozen(policy.hf), policy.layout)
            self.copy.temperature, self.copy.segments = policy.temperature, policy.segments

    @torch.no_grad()
    def __call__(self, row: Row) -> torch.Tensor:
        """Log-probability of every scored token, float32 [S]."""
        if self.copy is not None:
            self.copy.train(self.policy.training)
            return self.copy(row)  # type: ignore[no-any-return]
        with adapted.off(self.policy.hf):
            return self.policy(row)  # type: ignore[no-any-return]

    @torch.no_grad()
    def follow(self) -> None:
        """Take one step of the average towards the policy."""
        if self.rate is not None:
            mine = self._parameters()
            for name, weight in _trained(self.policy.hf):
                mine[name].lerp_(weight.to(mine[name].dtype), self.rate)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The averages, by name; what does not move is not among them."""
        if self.rate is None:
            return {}
        mine = self._parameters()
        return {name: mine[name].detach() for name in _names(self.policy.hf)}

    def _parameters(self) -> dict[str, nn.Parameter]:
        assert self.copy is not None
        return dict(self.copy.hf.named_parameters())


def _frozen(hf: nn.Module) -> nn.Module:
    """A copy without an adapter, whose product is in its weights. What an adapter leaves alone is shared, not copied."""
    if not isinstance(hf, PeftModel):
        return copy.deepcopy(hf).requires_grad_(False)
    adapted = {id(weight) for _, weight in _places(hf)}
    shared = {id(p): p for p in hf.parameters() if not p.requires_grad and id(p) not in adapted}
    out = copy.deepcopy(hf, shared)
    for _, weight in _places(out):
        weight.data = weight.data.float()  # in half precision a small step of the average would round away
    return out.merge_and_unload().requires_grad_(False)  # type: ignore[operator]


def _trained(hf: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Each whole weight that training moves, by its name in the model without an adapter.

    PEFT folds the adapter into the layer and takes it out again, of a copy: the base is to stay as it is to the bit.
    """
    if not isinstance(hf, PeftModel):
        yield from ((name, p.detach()) for name, p in hf.named_parameters() if p.requires_grad)
        return
    for (name, weight), layer in zip(_places(hf), _layers(hf).values(), strict=True):
        before = weight.data
        weight.data = before.float()
        layer.merge(safe_merge=True)  # type: ignore[operator]
        product, weight.data = weight.data, weight.data.clone()
        layer.unmerge()  # type: ignore[operator]
        weight.data = before
        yield name, product


def _names(hf: nn.Module) -> list[str]:
    if isinstance(hf, PeftModel):
        return [name for name, _ in _places(hf)]
    return [name for name, p in hf.named_parameters() if p.requires_grad]


def _layers(hf: PeftModel) -> dict[str, BaseTunerLayer]:
    """PEFT's layers by their names in the model without an adapter."""
    return {name: m for name, m in hf.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)}


def _places(hf: PeftModel) -> list[tuple[str, nn.Parameter]]:
    """(name without an adapter, weight) of every adapted layer; experts of a mixture are one parameter of its own name."""
    out = []
    for name, layer in _layers(hf).items():
        of = getattr(layer, "parameter_name", "weight")
        name = name.replace(".base_layer", "")  # of an expert's matrix the wrapper stands within another's
        out.append((f"{name}.{of}", getattr(layer.get_base_layer(), of)))  # type: ignore[operator]
    return out
