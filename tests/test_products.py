"""Linear layers by oneDNN against float64, forwards and backwards; and heads that keep no logits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from temper.models.products import own_products, sound
from temper.models.scores import Policy
from temper.trees import rounded
from test_scores import compare, forest, three_at_a_time, with_adapter
from tiny_models import build


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 400), (400, 96), (512, 8), (8, 512), (3, 5)])
def test_values_and_gradients_are_those_of_float64(inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(inputs, outputs, bias=bias), torch.randn(2, 33, inputs, requires_grad=True)
    slope = torch.randn(2, 33, outputs)
    with own_products(layer):
        assert ("forward" in vars(layer)) == sound(torch.float32)
        got = layer(x)
    assert "forward" not in vars(layer) and got.shape == slope.shape
    found = torch.autograd.grad(got, [x, *layer.parameters()], slope)  # after it, as the backward pass is
    exact, y = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    wanted = torch.autograd.grad(exact(y), [y, *exact.parameters()], slope.double())
    for a, b in zip([got, *found], [exact(y), *wanted], strict=True):
        assert a.dtype == torch.float32 and float(((a - b).norm() / b.norm()).detach()) < 2e-6


def test_frozen_weights_have_no_gradient_and_nothing_is_kept_for_them() -> None:
    layer, x = nn.Linear(64, 64), torch.randn(7, 64, requires_grad=True)
    layer.weight.requires_grad_(False)
    with own_products(layer):
        layer(x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None and x.grad is not None


def test_other_precisions_and_replaced_layers_are_left_alone() -> None:
    replaced, halves = nn.Linear(64, 64), nn.Linear(64, 64).bfloat16()
    replaced.forward = lambda x: x  # type: ignore[method-assign,assignment]
    x = torch.randn(4, 64)
    with own_products(nn.ModuleList([replaced, halves])):
        assert replaced(x) is x and halves(x.bfloat16()).dtype == torch.bfloat16
    layer = nn.Linear(64, 64)
    with torch.autocast("cpu", torch.bfloat16), own_products(layer):
        assert layer(x).dtype == torch.bfloat16
    with own_products(layer):
        assert layer(x.double().float()).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16  # begun within


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_a_frozen_head_makes_its_logits_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With adapters, three positions at a time: each is made once and its slope laid by; a trained head makes it again."""
    made = three_at_a_time(monkeypatch)
    row, times = forest(), []
    for model in (with_adapter(build(family)), build(family)):
        compare(model, row, ["tree"])
        made.clear()
        Policy(model)(row).sum().backward()
        assert max(made) == 3
        times.append(sum(made) / rounded(len(row.tgt)))
    assert times == [1, 2]
