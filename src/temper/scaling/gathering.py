"""What FSDP2 holds beside its shards while a micro-batch goes forwards and backwards."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from temper.engine.processes import layers_of
from temper.models.scores import Policy
from temper.scaling.heap import Noted

ROOT = -1


class Gathering:
    """Notes it from hooks where FSDP2's own would be.

    Of a layer that is computed: its weights, and the buffer in which they came together, which is kept until the next are
    there; backwards, when the layer before it is gathered ahead, that one's buffer. Of a layer whose gradients are complete:
    these, and the buffer from which they go out, kept until the next go. The root (embeddings, head, last norm) is held
    from first to last.

    Args:
        gloo: it copies whatever it gathers and scatters.
    """

    def __init__(self, noted: Noted, policy: Policy, size: int, *, gloo: bool) -> None:
        self.noted, self.size, self.gloo = noted, size, gloo
        self.parameters = {k: list(layer.parameters()) for k, layer in enumerate(layers_of(policy))}
        inner = {id(p) for some in self.parameters.values() for p in some}
        self.parameters[ROOT] = [p for p in policy.parameters() if id(p) not in inner]
        self.held: dict[Any, tuple[int, float]] = {}  # a layer's number, or a buffer's name → piece, bytes
        self.backwards = False
        self._gather(ROOT)
        for k, layer in enumerate(layers_of(policy)):
            layer.register_forward_pre_hook(functools.partial(self._before, k))
            layer.register_forward_hook(functools.partial(self._after, k))
        for k, some in self.parameters.items():
            self._follow(k, [p for p in some if p.requires_grad])

    def _hold(self, name: Any, size: float) -> None:
        self._let_go(name)
        self.held[name] = (self.noted.hold(size, "exchanged"), size)

    def _exchange(self, name: Any, size: float) -> None:
        self._hold(name, size)
        if self.gloo:
            self._hold("copy", size)
            self._let_go("copy")

    def _let_go(self, name: Any) -> None:
        if name in self.held:
            self.noted.let_go(*self.held.pop(name))

    def _bytes(self, k: int) -> float:
        return float(sum(p.numel() * p.element_size() for p in self.parameters[k]))

    def _gather(self, k: int) -> None:
        self._exchange("gathered", self._bytes(k))
        self._hold(k, self._bytes(k))

    def _before(self, k: int, *_: Any) -> None:
        if not self.backwards:  # a layer that is computed again is there already
            self._gather(k)

    def _after(self, k: int, layer: nn.Module, given: Any, out: Any) -> None:
        state = out[0] if isinstance(out, tuple) else out
        if not self.backwards:
            self._let_go(k)
            if state.requires_grad:
                state.register_hook(functools.partial(self._again, k))

    def _again(self, k: int, _: torch.Tensor) -> None:
        """Before a layer's backward pass."""
        self.backwards = True
        self._let_go(k + 1)
        self._let_go("gathered")
        self._hold(k, self._bytes(k))
        if k:
            self._exchange("gathered", self._bytes(k - 1))

    def _follow(self, k: int, trained: list[nn.Parameter]) -> None:
        left = len(trained)

        def arrived(_: torch.Tensor) -> None:
            nonlocal left
            left -= 1
            if not left:
                self._scatter(k, trained)

        for p in trained:
            p.register_post_accumulate_grad_hook(arrived)

    def _scatter(self, k: int, trained: list[nn.Parameter]) -> None:
        size = 4.0 * sum(p.numel() for p in trained)
        for p in trained:
            if p.grad is not None:
                self.noted.piece(p.grad, "exchanged")
        self.noted.hold(size / self.size, "gradients")
        self._exchange("leaving", size)
        for p in trained:
            p.grad = None
        if k != ROOT:
            self._let_go(k)
