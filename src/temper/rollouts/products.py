"""float32 matrix products by oneDNN instead of MKL, where that loses nothing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

FEW = 128  # rows; more of them are multiplied as usual
FULL = 2e-6  # relative error of a float32 product; bfloat16's would be 3e-3


_before: list[str] = []  # what the switch stood at, while fast products are on


@contextlib.contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Within, a CPU's float32 products go to oneDNN: 1.1 to 1.6 times as fast where few rows meet large weights.

    The switch allows oneDNN to compute in bfloat16, which it does only on processors with units for that (AMX). There
    it is left alone: a probe at the first use decides. Restored in any case.
    """
    if device.type != "cpu" or not _keeps_accuracy():
        yield
        return
    switch = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    _before.append(switch.fp32_precision)
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = _before.pop()


@contextlib.contextmanager
def plain_products() -> Iterator[None]:
    """Within fast products, the usual ones: oneDNN takes 2 to 4 times as long for the many small products of attention."""
    if not _before:
        yield
        return
    switch = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    switch.fp32_precision = _before[-1]
    try:
        yield
    finally:
        switch.fp32_precision = "bf16"


@contextlib.contextmanager
def turned_linears(model: torch.nn.Module) -> Iterator[None]:
    """Within, linear layers compute (W·xᵀ)ᵀ instead of x·Wᵀ where x has few rows and fast products are on.

    The same sums, but oneDNN streams large weights in their own order: a quarter faster than fast products alone.
    Layers whose forward somebody else has replaced keep it.
    """
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear and "forward" not in vars(m)]
    layers = [m for m in layers if m.weight.dtype == torch.float32 and m.weight.device.type == "cpu"]
    for layer in layers:
        layer.forward = functools.partial(_turned, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _turned(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    rows = x.numel() // x.shape[-1]
    if not _before or rows > FEW or torch.is_autocast_enabled("cpu"):
        return torch.nn.functional.linear(x, layer.weight, layer.bias)
    out = (layer.weight @ x.reshape(rows, -1).T).T.contiguous()
    if layer.bias is not None:
        out += layer.bias
    return out.view(*x.shape[:-1], -1)


@functools.cache
def _keeps_accuracy() -> bool:
    """Whether products with the switch on equal float64's, in shapes like those of decoding and of a prefill."""
    switch = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if not torch.backends.mkldnn.is_available() or not hasattr(switch, "fp32_precision"):
        return False
    before = switch.fp32_precision
    generator = torch.Generator().manual_seed(0)
    switch.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            for shape in ((8, 256, 1024), (256, 512, 256)):
                x = torch.randn(shape[0], shape[1], generator=generator)
                w = torch.randn(shape[2], shape[1], generator=generator)
                b = torch.randn(shape[2], generator=generator)
                exact = torch.nn.functional.linear(x.double(), w.double(), b.double())
                turned = (w @ x.T).T + b
                for got in (torch.nn.functional.linear(x, w, b), torch.bmm(x[None], w.T[None])[0] + b, turned):
                    if float((got - exact).norm() / exact.norm()) > FULL:
                        return False
    finally:
        switch.fp32_precision = before
    return True
