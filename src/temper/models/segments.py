"""Attention of a row's trees piece by piece, for processors: nothing is computed between trees, and no lane is padded.

A dense mask costs a lane's width squared and every shorter lane its padding. Here the trees of a row stand end to end
in one line, matrix products run over the line, and attention over segments of it: a long tree, or a few short ones. Of a
segment a block of queries meets only the keys up to its own end, since nobody sees what comes later. Query heads that
share a key head are laid under one another, so that keys and values are not copied for each, and the kernel's blocks are
larger: together a quarter less time (430 tokens, 8 heads of 64 over 2, forward and backward on two cores). Up to `KEPT`
tokens plain products that keep their probabilities are faster than torch's fused kernel, which computes them again: in
bfloat16 1.3 to 2 times, in float32 up to a fifth (64 to 512 tokens, forward and backward on two cores). Longer segments
go to the kernel, for probabilities grow with the square.

The segments travel with the mask: what transformers is given is a mask of full shape that occupies no memory, on which
they are written. The attention function named sdpa looks for them; without them it is transformers' own. A model that
slices or rebuilds its mask loses them and is found out by the proof on the model itself (`scores.prove`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from temper.models import flex, products
from temper.trees import Row, rounded

LEAST = 128  # tokens: shorter trees share a segment
LARGE = 192  # keys from which on a kernel of oneDNN is worth making, though lengths vary
KEPT = 512  # tokens of a segment up to which the probabilities are kept for the backward pass
BLOCK = 224  # queries that are given their keys at once; a rest of less than half of it joins the block before
SMALL = 128  # the same where probabilities are kept
READ = 0.8  # share of a row's tokens that are read at its end, above which leaving the others out saves nothing


@dataclasses.dataclass
class Segments:
    """Where the segments of a line begin and end, and which of their tokens see which.

    `visible`: boolean [n, n] of each; `read`: of each the tokens whose output of the last layer is read, None: all.
    """

    bounds: list[tuple[int, int]]
    visible: list[torch.Tensor]
    read: list[torch.Tensor] | None = None
    _masks: dict[tuple[int, torch.dtype, bool], list[list[torch.Tensor]]] = dataclasses.field(default_factory=dict)

    def masks(self, groups: int, dtype: torch.dtype, *, last: bool) -> list[list[torch.Tensor]]:
        """Additive masks [groups·queries, keys] of every block of every segment; made once for all layers.

        Args:
            last: those of the tokens that are read alone, in one block.
        """
        if (groups, dtype, last) not in self._masks:
            if last and self.read is not None:
                parts = [[seen[r]] for seen, r in zip(self.visible, self.read, strict=True)]
            else:
                parts = [[seen[a:b, :b] for a, b in blocks(len(seen))] for seen in self.visible]
            kinds = [torch.float32 if keeps(dtype, len(seen)) else dtype for seen in self.visible]
            self._masks[groups, dtype, last] = [
                [_additive(p, kind).repeat(groups, 1) for p in seen] for seen, kind in zip(parts, kinds, strict=True)
            ]
        return self._masks[groups, dtype, last]


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)


def keeps(dtype: torch.dtype, n: int) -> bool:
    """Whether a segment of n tokens keeps its probabilities."""
    return n <= KEPT and dtype in (torch.float32, torch.bfloat16)


def blocks(n: int) -> list[tuple[int, int]]:
    """Where blocks of n queries begin and end.

    >>> blocks(180), blocks(300), blocks(600)
    ([(0, 180)], [(0, 128), (128, 300)], [(0, 224), (224, 448), (448, 600)])
    """
    size = SMALL if n <= KEPT else BLOCK
    starts = list(range(0, n, size))
    if len(starts) > 1 and n - starts[-1] < size // 2:
        starts.pop()
    return list(zip(starts, [*starts[1:], n], strict=True))


def bounds(row: Row) -> list[tuple[int, int]]:
    """Segments of a row in one line: whole trees, neighbours together until they are `LEAST` tokens, then what is unused."""
    out: list[tuple[int, int]] = []
    begin = stop = 0
    for start, tree in zip(row.starts, row.trees, strict=True):
        stop = start + len(tree)
        if stop - begin >= LEAST:
            out.append((begin, stop))
            begin = stop
    if begin < stop:
        out.append((begin, stop))
    return out if stop == len(row.ids) else [*out, (stop, len(row.ids))]


def in_line(row: Row) -> Row:
    """The trees of a row end to end in one lane, in the same order: no lane's padding is left, but for `trees.ROUND`."""
    sizes = [len(t) for t in row.trees]
    starts = np.cumsum([0, *sizes])[:-1]
    total = sum(sizes)
    width = rounded(total)
    if row.lanes == 1 and width >= len(row.ids):
        return row
    device = row.ids.device
    taken = torch.from_numpy(np.concatenate([np.arange(s, s + n) for s, n in zip(row.starts, sizes, strict=True)]))
    taken = taken.to(device)
    shift = torch.from_numpy(np.repeat(np.asarray(row.starts) - starts, sizes)).to(device)
    place = torch.zeros(len(row.ids), dtype=torch.long, device=device)
    place = place.index_copy(0, taken, torch.arange(total, device=device))
    more = torch.arange(total, width, device=device) + 1
    return dataclasses.replace(
        row,
        ids=functional.pad(row.ids[taken], (0, width - total)),
        pos=functional.pad(row.pos[taken], (0, width - total)),
        end=torch.cat([row.end[taken] - shift, more]),
        **{name: place[getattr(row, name)] for name in ("tgt", "src", "tips")},
        starts=tuple(int(s) for s in starts),
        lanes=1,
    )


def carrier(row: Row, own_rule: Callable[..., Any]) -> torch.Tensor:
    """A mask [1, 1, T, T] of no memory that carries the segments of a row in one line.

    Args:
        own_rule: (lane, head, query's position, key's position) → whether the model's windows and chunks let it see.
    """
    found = bounds(row)
    visible = []
    for a, b in found:
        i, pos = torch.arange(a, b), row.pos[a:b]
        zero = i.new_zeros(1, 1, 1, 1)
        own = own_rule(zero, zero, pos[None, None, :, None], pos[None, None, None, :])
        visible.append(((i <= i[:, None]) & (i[:, None] < row.end[a:b]) & own).reshape(b - a, b - a))
    places = row.src.unique()
    read = [places[(places >= a) & (places < b)] - a for a, b in found] if len(places) <= READ * len(row.ids) else None
    mask = torch.ones((), dtype=torch.bool).expand(1, 1, len(row.ids), len(row.ids))
    mask.segments = Segments(found, visible, read)  # type: ignore[attr-defined]
    return mask


class _Kept(torch.autograd.Function):
    """Attention [heads, n, D] that keeps its probabilities, in the type of the queries; the scores are float32."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:  # fmt: skip
        with torch.autocast("cpu", enabled=False):  # it would round the scores to half precision
            ctx.large = k.shape[1] >= LARGE
            with products.sent(ctx.large):
                scores = torch.baddbmm(mask.expand(len(q), -1, -1), q.float(), k.float().transpose(1, 2), alpha=scale)
                seen = scores.softmax(-1).to(q.dtype)
                ctx.save_for_backward(q, k, v, seen)
                ctx.scale = scale
                return seen @ v

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (q, k, v, seen), (grad,) = ctx.saved_tensors, gradients
        with products.sent(ctx.large):
            slopes = torch.ops.aten._softmax_backward_data.default(grad @ v.transpose(1, 2), seen, -1, q.dtype)
            of_q, of_k = ctx.scale * (slopes @ k), ctx.scale * (slopes.transpose(1, 2) @ q)
            return of_q, of_k, seen.transpose(1, 2) @ grad, None, None


def _attend(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, dropout: float = 0.0, scaling: float | None = None, **more: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention [1, T, heads, D] by what the mask carries, segments or blocks, else transformers' own."""
    segments: Segments | None = getattr(attention_mask, "segments", None)
    carried: Any = getattr(attention_mask, "blocks", None)
    if segments is None and carried is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )  # type: ignore[no-any-return]
    if more.get("softcap") is not None or more.get("position_bias") is not None:
        raise ValueError("attention in pieces knows neither soft caps nor biases of positions")
    if segments is None:
        if dropout:
            raise ValueError("FlexAttention knows no dropout of attention")
        return flex.attend(carried, query, key, value, scaling), None
    if torch.is_autocast_enabled("cpu"):  # as it would for the fused kernel: queries come in float32, values in half
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    heads, shared, width = query.shape[1], key.shape[1], query.shape[3]
    groups = heads // shared
    last = segments.read is not None and getattr(module, "layer_idx", None) == module.config.num_hidden_layers - 1  # type: ignore[union-attr]
    masks = segments.masks(groups, query.dtype, last=last)

    def meet(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[1, heads, n, D] → [1, n, heads, D]; the heads that share keys stand under one another."""
        n = q.shape[2]
        q = q.reshape(1, shared, groups * n, width)
        if kept:
            found = _Kept.apply(q[0], k[0], v[0], mask, width**-0.5 if scaling is None else scaling)
        else:
            mask = mask.to(q.dtype)
            found = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
        return found.reshape(1, heads, n, v.shape[3]).transpose(1, 2)

    sizes, out = [b - a for a, b in segments.bounds], []
    for s, (q, k, v) in enumerate(zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)):
        n = q.shape[2]
        kept = keeps(q.dtype, n) and not dropout
        if last:
            read = segments.read[s]  # type: ignore[index]
            none = q.new_zeros(1, n, heads, v.shape[3])
            out.append(
                none.index_copy(1, read, meet(q.index_select(2, read), k, v, masks[s][0])) if len(read) else none
            )
            continue
        cuts = blocks(n)
        for part, (_, b), mask in zip(q.split([b - a for a, b in cuts], 2), cuts, masks[s], strict=True):
            out.append(meet(part, k if b == n else k[:, :, :b], v if b == n else v[:, :, :b], mask))
    return torch.cat(out, 1), None


AttentionInterface.register("sdpa", _attend)


@contextlib.contextmanager
def read_at(backbone: nn.Module, places: torch.Tensor, tokens: int) -> Iterator[None]:
    """Compute the last layer's queries, output of attention and feed-forward part only where the output is read.

    They matter to nobody but the token itself. Of a pair of texts two tokens are read by a
    reward model's head, of a prompt with answers those of the answers. Mixtures of experts are left alone: their router
    may look at all tokens. So are models that compute activations again in the backward pass, when this is over.

    Args:
        places: indices of the tokens that are read, in the flattened row; some may stand there several times.
        tokens: of the row.
    """
    parts = _at_the_end(backbone)
    places = places.unique()
    if len(places) > READ * tokens:
        parts = []

    def select(_: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        lanes[:] = given[0].shape[:1]
        return (given[0].flatten(0, 1).index_select(0, places)[None], *given[1:])

    def put(_: nn.Module, given: tuple[torch.Tensor, ...], found: torch.Tensor) -> torch.Tensor:
        whole = found.new_zeros(tokens, found.shape[-1]).index_copy(0, places, found[0])
        return whole.view(lanes[0], -1, found.shape[-1])

    lanes: list[int] = []
    handles = [h for p in parts for h in (p.register_forward_pre_hook(select), p.register_forward_hook(put))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _at_the_end(backbone: nn.Module) -> list[nn.Module]:
    """What a decoder's last layer does to each token for itself alone: all but keys and values, and attention."""
    layers = next((m for n in ("layers", "h") if isinstance(m := getattr(backbone, n, None), nn.ModuleList)), None)
    if not layers or getattr(backbone, "gradient_checkpointing", False):
        return []
    last = layers[-1]
    own = getattr(last, "self_attn", None)
    parts = [getattr(last, "mlp", None), getattr(own, "q_proj", None), getattr(own, "o_proj", None)]
    found = [p for p in parts if isinstance(p, nn.Module)]
    experts = any("expert" in n or "router" in n for p in found for n, _ in p.named_modules())
    return [] if experts else found
