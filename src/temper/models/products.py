"""Products with the weights of linear layers by oneDNN, on processors, forwards and backwards.

The same sums as torch's own in float32, which leaves them to MKL: on two cores of an EPYC with AVX-512 5 to 15 % faster
in the shapes of a step. What decides is whether the products are right on this machine, not how fast they
are, so that a run that is resumed computes as before.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # relative error of a sound product


class _Linear(torch.autograd.Function):
    """x·Wᵀ + b. The gradient of the weights is torch's own: of two transposed factors oneDNN is the slower."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), (x, weight) = gradients, ctx.saved_tensors
        asked, rows, given = ctx.needs_input_grad, grad.flatten(0, -2), x.flatten(0, -2)
        of_weight = None
        if asked[1]:  # the fewer columns transposed: the other way round LoRA's narrow factors take four times as long
            few = rows.shape[1] <= given.shape[1]
            of_weight = rows.t() @ given if few else (given.t() @ rows).t()
        return product(grad, weight.t(), None) if asked[0] else None, of_weight, rows.sum(0) if asked[2] else None


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x·Wᵀ + b, the weight as it is or packed by `_reorder_linear_weight`."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


@contextlib.contextmanager
def by_onednn(model: nn.Module) -> Iterator[None]:
    """Within, the linear layers of a model in float32 on a processor multiply by oneDNN, and so do their gradients after it.

    Under autocast they are left alone: bfloat16 goes there anyway. So are models that compute activations again in the
    backward pass, when this is over, and layers whose forward somebody else has replaced.
    """
    weight = next(model.parameters())
    layers: list[nn.Linear] = []
    recomputes = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not recomputes and sound(torch.float32):
        plain = (m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m))
        layers = [m for m in plain if m.weight.dtype == torch.float32]
        for layer in layers:
            layer.forward = functools.partial(_applied, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _applied(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(x, layer.weight, layer.bias)
    return _Linear.apply(x, layer.weight, layer.bias)  # type: ignore[no-any-return]


@functools.cache
def sound(dtype: torch.dtype) -> bool:
    """Whether this machine multiplies by oneDNN, and right: float64 says so, in the shapes of a step and a prefill."""
    if dtype not in DTYPES or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    try:
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            for rows, inputs, outputs in ((1, 512, 256), (8, 256, 1024), (256, 512, 256)):
                x, w, b = draw(rows, 1, inputs), draw(outputs, inputs), draw(outputs)
                exact = nn.functional.linear(x.double(), w.double(), b.double())
                back = nn.functional.linear(exact, w.double().t())
                packed = torch.ops.mkldnn._reorder_linear_weight(w, None)
                for got, wanted in (
                    (product(x, packed, b), exact),
                    (product(x, w, b), exact),
                    (product(exact.to(dtype), w.t(), None), back),
                ):
                    if got.shape != wanted.shape or float((got - wanted).norm() / wanted.norm()) > DTYPES[dtype]:
                        return False
    except (
        AttributeError,
        NotImplementedError,
        RuntimeError,
    ):  # built without it, or too old a processor for this type
        return False
    return True
