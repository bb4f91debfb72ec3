"""Activations that are made again: the same values and gradients as torch's own, in less memory, and never a wrong tensor."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from temper.models.products import Halves, own_products
from temper.models.remade import Remade, _Gated, _Normed, is_gated, is_norm, kept_less
from test_products import far
from tiny_models import TREES, build


def test_norm_and_its_gradients_are_those_of_float64() -> None:
    torch.manual_seed(0)
    x, weight, slope = torch.randn(3, 7, 33), torch.randn(33), torch.randn(3, 7, 33)

    def both(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        out, _ = _Normed.apply(x, weight, 1e-2)
        return [out, *torch.autograd.grad(out, (x, weight), slope.to(x.dtype))]

    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = exact_x / (exact_x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * exact_weight
    wanted = [exact, *torch.autograd.grad(exact, (exact_x, exact_weight), slope.double())]
    for got, right in zip(both(x.requires_grad_(), weight.requires_grad_()), wanted, strict=True):
        assert far(got.detach(), right.detach()) < 1e-6


def test_formulas_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    x, up = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: _Normed.apply(a, b, 1e-3)[0], (x, weight))
    assert torch.autograd.gradcheck(_Gated.apply, (x, up))


EXPERTS = {name for name in TREES if "moe" in name or "mixtral" in name}  # torch has no grouped products in float64


def trained(model: nn.Module, within: bool, halves: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.arange(40).reshape(2, 20) % 90 + 4
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=halves):
        if within:
            with own_products(model, Halves()), kept_less(model):
                out = model(input_ids=ids).logits
        else:
            out = model(input_ids=ids).logits
    out.float().square().mean().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("family", sorted(set(TREES) - EXPERTS))
def test_models_compute_the_same(family: str, halves: bool) -> None:
    model = build(family).train()
    exact = trained(copy.deepcopy(model).double(), False, False)
    usual, got = trained(model, False, halves), trained(model, True, halves)
    assert set(got[1]) == set(usual[1])
    for name, right in exact[1].items():
        if float(right.norm()) > 1e-9:
            assert far(got[1][name], right) < max(1.5 * far(usual[1][name], right), 2e-2 if halves else 1e-5), name


@pytest.mark.parametrize(("family", "norms", "gates"), [("qwen2", True, True), ("llama", True, True), ("gemma3", False, False), ("gpt2", False, False), ("phi3", True, False)])  # fmt: skip
def test_what_is_recognised(family: str, norms: bool, gates: bool) -> None:
    parts = list(build(family).modules())
    assert any(map(is_norm, parts)) == norms
    assert any(map(is_gated, parts)) == gates


def test_a_class_is_known_by_what_it_computes() -> None:
    class Shifted(Qwen2RMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + 1e-2  # type: ignore[no-any-return]

    class Doubled(Qwen2MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)  # type: ignore[no-any-return]

    assert is_norm(Qwen2RMSNorm(8)) and is_norm(T5LayerNorm(8))
    assert not is_norm(GemmaRMSNorm(8)) and not is_norm(Shifted(8))
    config = build("qwen2").config
    assert is_gated(Qwen2MLP(config)) and not is_gated(Doubled(config))
    other = Qwen2MLP(config)
    other.act_fn = nn.GELU()
    assert not is_gated(other)


class Layer(nn.Module):
    """A norm that three linear layers read, and a gated part."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = Qwen2RMSNorm(width)
        self.reads = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(3)])
        self.mlp = Qwen2MLP(build("qwen2").config)
        self.mlp.gate_proj, self.mlp.up_proj = nn.Linear(width, 176, bias=False), nn.Linear(width, 176, bias=False)
        self.mlp.down_proj = nn.Linear(176, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x)
        return self.mlp(sum(read(n) for read in self.reads))  # type: ignore[no-any-return]


def kept(model: nn.Module, x: torch.Tensor, within: bool) -> int:
    """Bytes that a graph holds on to besides the weights and x: of storages that are different."""
    known = {p.untyped_storage().data_ptr() for p in [x, *model.parameters()]}
    packed: list[torch.Tensor] = []

    def note(t: torch.Tensor) -> torch.Tensor:
        packed.append(t)
        return t

    class Watched(Remade):
        def pack(self, kept: torch.Tensor) -> Any:
            out = super().pack(kept)
            if isinstance(out, torch.Tensor):
                packed.append(out)
            else:
                packed.extend(out.given)
            return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("temper.models.remade.Remade", Watched)
        if within:
            with own_products(model, Halves()), kept_less(model):
                out = model(x)
        else:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                out = model(x)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in packed}
    del out
    return sum(size for at, size in sizes.items() if at not in known)


def test_less_is_kept() -> None:
    """Of a norm nothing but its input's scale, of a gated part its two factors and its input."""
    model, x = Layer(), torch.randn(1, 512, 64, requires_grad=True)
    floats = kept(model, x, True) / 4 / 512
    assert floats == 1 + 64 + 2 * 176
    assert kept(model, x, False) / 4 / 512 >= 2 * 64 + 64 + 4 * 176


def test_another_tensor_in_the_same_place_is_kept_itself() -> None:
    """Memory that a known tensor has left is used again, and then what is known of it says nothing."""
    remade, x, source = Remade(), torch.randn(64, 64, requires_grad=True), torch.randn(64, 64)
    room = torch.empty(64, 64)
    known = remade.know(room.view(64, 64), lambda t: t * 2, source, often=False)
    with remade.noted():
        assert not torch.is_tensor(remade.pack(known))
        del known
        gc.collect()
        assert remade.pack(room) is room
        other = room.normal_()
        (x * other).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, other)


def test_what_was_changed_in_place_is_kept_or_refused() -> None:
    remade, x = Remade(), torch.randn(4, 4, requires_grad=True)
    with remade.noted():
        made = remade.know(x.detach() * 2, lambda t: t * 2, x, often=False)
        made += 1
        out = (x * made).sum()
    out.backward()
    assert x.grad is not None and torch.equal(x.grad, x.detach() * 2 + 1)
    source = torch.randn(4, 4)
    with remade.noted():
        out = (x * remade.know(source * 2, lambda t: t * 2, source, often=False)).sum()
    source += 1
    with pytest.raises(RuntimeError, match="changed in place"):
        out.backward()


def test_memory_is_let_go_of_while_the_backward_pass_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the notes of all layers would hold their tensors until the last."""
    alive: list[int] = []
    remade, x = Remade(), torch.randn(8, 8, requires_grad=True)

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            gc.collect()
            alive.append(sum(torch.is_tensor(o) and o.shape == (8, 8, 3) for o in gc.get_objects()))
            return gradients[0]

    def make(t: torch.Tensor) -> torch.Tensor:
        return t.sum(-1)

    y: torch.Tensor = x
    with remade.noted():
        for _ in range(3):
            given = torch.randn(8, 8, 3)
            y = Counted.apply(y * remade.know(make(given), make, given, often=False))
            del given
    y.sum().backward()
    assert alive == [3, 2, 1]


def test_others_hooks_and_no_gradients() -> None:
    remade = Remade()
    with torch.no_grad(), remade.noted():
        made: Callable[..., torch.Tensor] = lambda t: t * 2  # noqa: E731
        x = torch.ones(3)
        assert torch.equal(remade.know(x * 2, made, x, often=True), x * 2) and not remade._notes
