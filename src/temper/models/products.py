"""Products with the weights of linear layers on processors: by oneDNN, and LoRA's update within the product it belongs to.

The same sums as torch's own and PEFT's. In float32, which torch leaves to MKL, oneDNN is 5 to 15 % faster in the shapes of a
step where a processor computes 256 bits at a time (Zen 4), and twice as fast where it computes 512 (Zen 5), of which MKL
uses half. What decides is whether the products are right on this machine, not how fast they are, so that a run that is
resumed computes as before.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.activations import NewGELUActivation

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # relative error of a sound product


_in_place = False  # whether the backward pass under way may add to `.grad` itself


@contextlib.contextmanager
def added_in_place(wanted: bool = True) -> Iterator[None]:
    """Within, if `wanted`, backward passes add the gradients of weights to `.grad` as they are computed, where this module has them.

    torch makes each gradient apart and adds it: for every micro-batch a copy of the weights' size, written and read once
    more. Only for `.backward()` that ends in `.grad`: hooks on the weights are not called, so not while another process
    waits for them.
    """
    global _in_place
    _in_place = wanted
    try:
        yield
    finally:
        _in_place = False


def by_onednn(wanted: bool) -> bool:
    """Send torch's own products of two float32 matrices to oneDNN, or to MKL; where they were sent before.

    Few and large shapes gain; for each shape that is new oneDNN makes a kernel, half a millisecond. On a machine where the
    products would be less than exact (AMX computes them in bfloat16) nothing changes.
    """
    try:
        setting = _matmul()
        before = setting.fp32_precision == "bf16"
        if before != wanted and (not wanted or exact()):
            setting.fp32_precision = "bf16" if wanted else "none"
    except (AttributeError, RuntimeError):  # a torch without the setting, or without oneDNN
        return False
    return before


def _matmul() -> Any:
    """torch's settings of products by oneDNN, of which it declares no types."""
    mkldnn: Any = torch.backends.mkldnn
    return mkldnn.matmul


@functools.cache
def exact() -> bool:
    """Whether float32 products of matrices are as exact by oneDNN as they should be: float64 says so."""
    if not torch.backends.mkldnn.is_available():
        return False
    setting = _matmul()
    before = setting.fp32_precision
    generator = torch.Generator().manual_seed(0)
    try:
        setting.fp32_precision = "bf16"
        for rows, inner, columns in ((256, 300, 128), (64, 512, 256), (512, 64, 8)):
            a, b = (torch.randn(2, *shape, generator=generator) for shape in ((inner, rows), (inner, columns)))
            wanted = a.double().transpose(1, 2) @ b.double()
            added = torch.ones(rows, columns).addmm_(a[0].t(), b[0])
            for got, right in ((a.transpose(1, 2) @ b, wanted), (added, wanted[0] + 1)):
                if float((got - right).norm() / right.norm()) > DTYPES[torch.float32]:
                    return False
    except RuntimeError:
        return False
    finally:
        setting.fp32_precision = before
    return True


@contextlib.contextmanager
def sent(wanted: bool) -> Iterator[None]:
    """Within, products of two float32 matrices go to oneDNN if `wanted`, else to MKL."""
    before = by_onednn(wanted)
    try:
        yield
    finally:
        by_onednn(before)


class _Linear(torch.autograd.Function):
    """x·Wᵀ + b."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.weight = weight  # the leaf itself: what was saved may come back as a copy
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), (x, weight) = gradients, ctx.saved_tensors
        asked, rows = ctx.needs_input_grad, grad.flatten(0, -2)
        of_weight = None
        if asked[1] and _in_place and ctx.weight.is_leaf and ctx.weight.grad is not None:
            ctx.weight.grad.addmm_(rows.t(), x.flatten(0, -2))
        elif asked[1]:
            of_weight = _outer(rows, x.flatten(0, -2))
            if _in_place and ctx.weight.is_leaf:
                ctx.weight.grad, of_weight = of_weight.contiguous(), None  # the fused AdamW takes it for that
        return product(grad, weight.t(), None) if asked[0] else None, of_weight, rows.sum(0) if asked[2] else None


class _Looked(torch.autograd.Function):
    """Rows of an embedding. Its gradient is nothing but in the rows that were looked up, so only these are added to."""

    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: torch.Tensor, padding: int | None) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, padding
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), (ids,) = gradients, ctx.saved_tensors
        into = ctx.weight.grad if _in_place and ctx.weight.is_leaf else None
        if into is None:
            into = torch.zeros_like(ctx.weight)
        rows = grad.flatten(0, -2).to(into.dtype)
        if ctx.padding is not None:
            rows = rows.masked_fill((ids == ctx.padding).flatten()[:, None], 0)
        into.index_add_(0, ids.flatten(), rows)
        if _in_place and ctx.weight.is_leaf:
            ctx.weight.grad = into
            return None, None, None
        return None, into, None


class _Adapted(torch.autograd.Function):
    """x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ, computed in one type; W and b are not trained.

    PEFT's layer makes the update apart, scales it and adds it: three more passes over the output, and three over its
    gradient. Here it is added to the product in place.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:  # fmt: skip
        with torch.autocast("cpu", enabled=False):
            given, weight, a, b = (t.to(dtype) for t in (x, weight, a, b))
            out = product(given, weight, None if bias is None else bias.to(dtype))
            down = product(given.flatten(0, -2), a, None)
            out.flatten(0, -2).addmm_(down, b.t(), alpha=scale)
        ctx.save_for_backward(given, weight, a, b, down)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), (given, weight, a, b, down) = gradients, ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            rows = grad.flatten(0, -2)
            up = product(rows, b.t().contiguous(), None).mul_(ctx.scale)  # of narrow factors it likes these
            of_x = None
            if ctx.needs_input_grad[0]:
                of_x = product(grad, weight.t(), None)
                of_x.flatten(0, -2).addmm_(up, a)
            of_b = _outer(rows, down).mul_(ctx.scale)
            return of_x, None, None, _outer(up, given.flatten(0, -2)), of_b, None, None


def _outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """leftᵀ·right of [T, m] and [T, n], the fewer columns transposed: the other way round LoRA's narrow factors take four
    times as long."""
    return left.t() @ right if left.shape[1] <= right.shape[1] else (right.t() @ left).t()


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x·Wᵀ + b, the weight as it is or packed by `_reorder_linear_weight`."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def place(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a tensor begins: its memory, and how far into it. Fake tensors, which have no address, have this."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


class Halves:
    """Frozen weights as autocast would have them, kept: autocast casts them anew in every call, and the head in every chunk."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[torch.Tensor, tuple[Any, ...], torch.Tensor]] = {}

    def __call__(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight in another type; while it stays what it was, the same tensor each time."""
        now = (*place(weight), weight._version, dtype)
        found = self._kept.get(id(weight))
        if found is None or found[0] is not weight or found[1] != now:
            found = self._kept[id(weight)] = (weight, now, weight.detach().to(dtype))
        return found[2]


@contextlib.contextmanager
def own_products(model: nn.Module, halves: Halves) -> Iterator[None]:
    """Within, a model on a processor multiplies as this module has it, and so do the gradients after it: linear layers in
    float32, frozen ones under autocast, PEFT's LoRA layers around linear ones; and embeddings that are trained. An activation
    that transformers writes out is torch's own, the same function.

    Other layers under autocast are left alone: bfloat16 goes to oneDNN anyway. So are models that compute activations
    again in the backward pass, when this is over, layers whose forward somebody else has replaced, and those within PEFT's
    other adapters, some of which change what they are given in place.
    """
    replaced: list[nn.Module] = []
    others = {id(m.base_layer) for m in model.modules() if hasattr(m, "base_layer") and not is_lora(m)}
    recomputes = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if next(model.parameters()).device.type == "cpu" and not recomputes:
        for module in model.modules():
            if "forward" in vars(module) or id(module) in others:
                continue
            if is_lora(module) and "forward" not in vars(module.base_layer):
                module.forward = functools.partial(_adapted, module, halves)  # type: ignore[method-assign]
            elif type(module) is nn.Linear and module.weight.dtype == torch.float32:
                module.forward = functools.partial(_applied, module, halves)  # type: ignore[method-assign]
            elif type(module) is nn.Embedding and module.weight.requires_grad and _plain(module):
                module.forward = functools.partial(_found, module)  # type: ignore[method-assign]
            elif type(module) is NewGELUActivation:  # eight passes over its input, of GPT-2 and T5; here one
                module.forward = functools.partial(nn.functional.gelu, approximate="tanh")  # type: ignore[method-assign]
            else:
                continue
            replaced.append(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def _applied(layer: nn.Linear, halves: Halves, x: torch.Tensor) -> torch.Tensor:
    if torch.is_autocast_enabled("cpu") and not layer.weight.requires_grad:
        return nn.functional.linear(x, halves(layer.weight, torch.get_autocast_dtype("cpu")), layer.bias)
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not sound(torch.float32):
        return nn.functional.linear(x, layer.weight, layer.bias)
    return _Linear.apply(x, layer.weight, layer.bias)  # type: ignore[no-any-return]


def _plain(layer: nn.Embedding) -> bool:
    return not layer.sparse and not layer.scale_grad_by_freq and layer.max_norm is None


def _found(layer: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    return _Looked.apply(ids, layer.weight, layer.padding_idx)  # type: ignore[no-any-return]


def _adapted(layer: Any, halves: Halves, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    found = None if args or kwargs else update_of(layer)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if found is not None and sound(dtype):
        (a, b, scale), base = found, layer.base_layer
        frozen = not any(p.requires_grad for p in base.parameters())
        if frozen and (torch.is_autocast_enabled("cpu") or {base.weight.dtype, a.dtype, b.dtype} == {dtype}):
            weight = base.weight if base.weight.dtype == dtype else halves(base.weight, dtype)
            return _Adapted.apply(x, weight, base.bias, a, b, scale, dtype)  # type: ignore[no-any-return]
    return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]


def is_lora(module: Any) -> bool:
    """Whether this is PEFT's LoRA layer around a linear one."""
    ours = type(module).__name__ == "Linear" and type(module).__module__.startswith("peft.tuners.lora")
    return ours and type(module.base_layer) is nn.Linear and not module.fan_in_fan_out


def update_of(layer: Any) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """(A, B, scale) where all that a LoRA layer adds now is scale·B·A; None where it adds nothing, or something else.

    Something else: several adapters, DoRA and the other variants, dropout under way, biases of its own.
    """
    names = [n for n in layer.active_adapters if n in layer.lora_A]
    if layer.merged or layer.disable_adapters or len(names) != 1 or names[0] in layer.lora_variant:
        return None
    (name,) = names
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(a) is not nn.Linear or a.bias is not None or type(b) is not nn.Linear or b.bias is not None:
        return None
    if not isinstance(dropout, nn.Identity) and dropout.training:
        return None
    return a.weight, b.weight, layer.scaling[name]


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
