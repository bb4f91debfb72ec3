"""Activations that are made again in the backward pass instead of kept, where that costs a pass over them and no product.

Of a layer's activations the normalised input and the gated product of the feed-forward part are the largest that are
nothing but a few sums of what is kept anyway. torch keeps them, and what lies between: of a Qwen2 layer two fifths of all
that it keeps. Here norms keep their input, gates their two factors, and the linear layers that read the result a note of
how it is made.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from temper.models.products import place


class _Note:
    """How a tensor is made of others that are kept."""

    def __init__(self, make: Callable[..., torch.Tensor], given: tuple[torch.Tensor, ...], often: bool) -> None:
        self.make, self.given, self.often = make, tuple(t.detach() for t in given), often
        self.versions = [t._version for t in self.given]

    def __call__(self) -> torch.Tensor:
        if [t._version for t in self.given] != self.versions:
            raise RuntimeError("an activation cannot be made again: what it is made of was changed in place")
        return self.make(*self.given)


class Remade:
    """What is made again, of one forward pass. Hooks of torch put notes in the place of tensors that are known here."""

    def __init__(self) -> None:
        self._notes: dict[tuple[int, int], tuple[weakref.ref[torch.Tensor], int, _Note]] = {}
        self._last: tuple[_Note, torch.Tensor] | None = None  # queries, keys and values ask for the same in turn

    def know(self, made: torch.Tensor, make: Callable[..., torch.Tensor], *given: torch.Tensor, often: bool) -> torch.Tensor:  # fmt: skip
        """Have `made` not kept: make(*given) is the same. `often`: several layers read it, one after another."""
        if torch.is_grad_enabled():
            self._notes[place(made)] = (weakref.ref(made), made._version, _Note(make, given, often))
        return made

    def pack(self, kept: torch.Tensor) -> torch.Tensor | _Note:
        """What torch keeps of a tensor. Another that has since come to lie in the same place is no known one."""
        made, version, note = self._notes.get(place(kept), (_nothing, 0, None))
        known = made()
        if note is None or known is None:
            return kept
        same = known.shape == kept.shape and known.stride() == kept.stride() and known.dtype == kept.dtype
        return note if same and known._version == version and kept._version == version else kept

    def unpack(self, kept: torch.Tensor | _Note) -> torch.Tensor:
        """The tensor that `pack` was given."""
        if isinstance(kept, torch.Tensor):
            return kept
        if self._last is None or self._last[0] is not kept:
            self._last = None  # its memory may serve the next
            if not kept.often:
                return kept()
            self._last = (kept, kept())
        return self._last[1]

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Within, what is known here is not kept."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                yield
        finally:
            self._notes.clear()  # the graph holds the notes now, and lets go of them one by one


def _nothing() -> None:
    return None


class _Normed(torch.autograd.Function):
    """x / √(mean x² + ε) · w along the last dimension (Zhang and Sennrich 2019, «Root Mean Square Layer Normalization»,
    equation 4); gives 1 / √(…) too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        return _scaled(x, scale, weight), scale

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, weight, scale), grad = ctx.saved_tensors, gradients[0]
        unit = x * scale
        of_weight = (grad * unit).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        of_x = grad * weight
        along = torch.linalg.vecdot(of_x, unit).div_(x.shape[-1])[..., None]
        return of_x.sub_(unit.mul_(along)).mul_(scale), of_weight, None


def _scaled(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x * scale).mul_(weight)


class _Gated(torch.autograd.Function):
    """silu(gate)·up (Shazeer 2020, «GLU Variants Improve Transformer», equation 6)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _opened(gate, up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (grad,), (gate, up) = gradients, ctx.saved_tensors
        of_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return of_gate, nn.functional.silu(gate).mul_(grad)


def _opened(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return nn.functional.silu(gate).mul_(up)


@contextlib.contextmanager
def kept_less(model: nn.Module) -> Iterator[None]:
    """Within, norms and gated feed-forward parts of a model on a processor keep less for the backward pass, and give the same.

    What a class computes is seen by trying it, not by its name. Models that compute whole layers again in the backward
    pass are left alone, and modules whose forward somebody else has replaced.
    """
    recomputes = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if recomputes or next(model.parameters()).device.type != "cpu":
        yield
        return
    remade, replaced = Remade(), []
    for module in model.modules():
        forward = _norm if is_norm(module) else _feed if is_gated(module) else None
        if forward is not None and "forward" not in vars(module):
            module.forward = functools.partial(forward, module, remade)  # type: ignore[method-assign]
            replaced.append(module)
    try:
        with remade.noted():
            yield
    finally:
        for module in replaced:
            del module.forward


def _norm(module: Any, remade: Remade, x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32 or module.weight.dtype != torch.float32:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    out, scale = _Normed.apply(x, module.weight, module.variance_epsilon)
    return remade.know(out, _scaled, x, scale, module.weight, often=True)


def _feed(module: Any, remade: Remade, x: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    h = remade.know(_Gated.apply(gate, up), _opened, gate, up, often=False)
    return module.down_proj(h)  # type: ignore[no-any-return]


def is_norm(module: nn.Module) -> bool:
    """Whether this is a norm by the root of the mean square, times its weight."""
    own = hasattr(module, "variance_epsilon") and not module._modules and not module._buffers
    return own and list(module._parameters) == ["weight"] and _norms(type(module))


@functools.cache
def _norms(kind: type[nn.Module]) -> bool:
    draw, epsilon = torch.Generator().manual_seed(0), 0.1
    x, weight = torch.randn(5, 8, generator=draw), torch.randn(8, generator=draw)
    tried: Any = _bare(kind)
    tried.weight, tried.variance_epsilon = nn.Parameter(weight), epsilon
    wanted = x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight
    return _gives(tried, x, wanted)


PARTS = ("gate_proj", "up_proj", "down_proj")


def is_gated(module: nn.Module) -> bool:
    """Whether this computes down(silu(gate(x))·up(x)) with its own linear layers."""
    own = set(module._modules) == {*PARTS, "act_fn"} and not module._parameters and not module._buffers
    return own and _gates(type(module), type(module.act_fn))


@functools.cache
def _gates(kind: type[nn.Module], activation: type[nn.Module]) -> bool:
    draw = torch.Generator().manual_seed(0)
    x, *weights = (torch.randn(*shape, generator=draw) for shape in ((5, 4), (6, 4), (6, 4), (4, 6)))
    tried: Any = _bare(kind)
    for name, weight in zip(PARTS, weights, strict=True):
        part = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        part.weight = nn.Parameter(weight)
        setattr(tried, name, part)
    try:
        tried.act_fn = activation()
    except TypeError:  # it wants more than a SiLU does
        return False
    gate, up, down = weights
    return _gives(tried, x, (nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t())


def _bare(kind: type[nn.Module]) -> nn.Module:
    """A module of a class without what its constructor would give it."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    return made


def _gives(tried: nn.Module, x: torch.Tensor, wanted: torch.Tensor) -> bool:
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return torch.allclose(tried(x), wanted, rtol=1e-5, atol=1e-6)
    except Exception:  # whatever else a forward of its own needs: it is not this one
        return False
