"""Attention of a row's trees piece by piece, for processors: nothing is computed between trees, and no lane is padded.

A dense mask costs a lane's width squared and every shorter lane its padding. Here the trees of a row stand end to end
in one line, matrix products run over the line, and attention over segments of it: a long tree, or a few short ones. Of a
segment a block of queries meets only the keys up to its own end, since nobody sees what comes later; in a long segment,
where a block ends where a branch does, only those that any of it sees: a completion not its siblings. Query heads that
share a key head are laid under one another, so that keys and values are not copied for each, and the kernel's blocks are
larger: together a quarter less time (430 tokens, 8 heads of 64 over 2, forward and backward on two cores). Plain products
are faster than torch's fused kernel, for which they are made if the allocator keeps its memory (`device.keep_memory`):
forwards and backwards in float32 1.5 to 1.9 times, in bfloat16 1.8 to 2.6 times where the probabilities are kept, and 1.2 to
1.5 and 1.2 to 1.9 times where they are computed again (448 to 4,096 keys, two cores). They are kept up to `KEPT` keys, for
they grow with the square.

The segments travel with the mask: what transformers is given is a mask of full shape that occupies no memory, on which
they are written. The attention function named sdpa looks for them; without them it is transformers' own. A model that
slices or rebuilds its mask loses them and is found out by the proof on the model itself (`scores.prove`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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
KEPT = 640  # keys that a segment's tokens are given on average up to which probabilities are kept for the backward pass
MOST = 2**25  # scores of a block, of all heads, up to which there is memory for plain products: 128 MiB in float32
SMALL = 128  # queries that are given their keys at once; a rest of less than half of it joins the block before
LONG = 512  # tokens of a segment above which its blocks follow its branches
BLOCK = 224  # queries of a block in a long segment
STEP = 32  # tokens: blocks begin at multiples of it
FEWER = 0.85  # share of the keys up to a block's end below which those that it sees are copied together
READ = 0.8  # share of a row's tokens that are read at its end, above which leaving the others out saves nothing


class Block(NamedTuple):
    """Queries of a segment that are given their keys at once.

    `queries`: how many; `keys`: how many of the segment's first keys they meet, or which; `mask`: additive,
    [groups·queries, keys]; `plain`: by products, which keep their probabilities if `kept`, or by torch's kernel.
    """

    queries: int
    keys: int | torch.Tensor
    mask: torch.Tensor
    plain: bool
    kept: bool

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """Those of the keys or values [1, heads, n, D] of the segment that the block meets."""
        if isinstance(self.keys, torch.Tensor):
            return x.index_select(2, self.keys)
        return x if self.keys == x.shape[2] else x[:, :, : self.keys]


@dataclasses.dataclass
class Segments:
    """Where the segments of a line begin and end, and which of their tokens see which.

    `visible`: boolean [n, n] of each; `read`: of each the tokens whose output of the last layer is read, None: all.
    """

    bounds: list[tuple[int, int]]
    visible: list[torch.Tensor]
    read: list[torch.Tensor] | None = None
    _blocks: dict[tuple[int, int, torch.dtype, bool], list[list[Block]]] = dataclasses.field(default_factory=dict)

    def blocks(self, shared: int, groups: int, dtype: torch.dtype, *, last: bool) -> list[list[Block]]:
        """The blocks of every segment, with their masks; made once for all layers.

        Args:
            shared: key heads.
            groups: query heads that share one.
            last: of the tokens that are read alone.
        """
        asked = (shared, groups, dtype, last)
        if asked not in self._blocks:
            reads: list[Any] = self.read if last and self.read is not None else [None] * len(self.visible)
            both = zip(self.visible, reads, strict=True)
            self._blocks[asked] = [_cut(seen, shared, groups, dtype, read) for seen, read in both]
        return self._blocks[asked]


def _cut(seen: torch.Tensor, shared: int, groups: int, dtype: torch.dtype, read: torch.Tensor | None) -> list[Block]:
    """Blocks of a segment's queries, or of the tokens of it that are `read`."""
    n, found = len(seen), []
    for a, b in [(0, n)] if read is not None and len(read) <= BLOCK else blocks(seen):
        asked = seen[a:b] if read is None else seen[read[(read >= a) & (read < b)]]
        keys: int | torch.Tensor = b
        if n > LONG:
            met = asked.any(0)
            count = rounded(int(met.sum()), 2 * STEP)
            if count < FEWER * b:  # filled up with some that nobody sees
                keys = met.int().argsort(descending=True, stable=True)[:count].sort().values
        if len(asked):
            found.append((keys, asked[:, keys] if isinstance(keys, torch.Tensor) else asked[:, :keys]))
    scores = [mask.numel() for _, mask in found]
    plain = dtype in (torch.float32, torch.bfloat16) and shared * groups * max(scores, default=0) <= MOST
    kept = plain and sum(scores) <= KEPT * n
    kind = torch.float32 if plain else dtype
    return [Block(len(mask), keys, _additive(mask, kind).repeat(groups, 1), plain, kept) for keys, mask in found]


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)


def blocks(seen: torch.Tensor) -> list[tuple[int, int]]:
    """Where blocks of queries begin and end: in a long segment every `BLOCK`, or before it where a branch begins; in others
    every `SMALL`. All but the last have multiples of `STEP`, so that there are few shapes (see `LARGE`).

    Args:
        seen: boolean [n, n], which token (first) sees which.

    >>> [blocks(torch.ones(n, n).tril().bool()) for n in (180, 300, 600)]
    [[(0, 180)], [(0, 128), (128, 300)], [(0, 224), (224, 448), (448, 600)]]
    """
    n, starts = len(seen), [0]
    size, begun = SMALL, torch.empty(0, dtype=torch.long)
    if n > LONG:
        size, begun = BLOCK, (~seen.diagonal(-1)).nonzero().flatten() + 1
        begun = ((begun + STEP - 1) // STEP * STEP).unique()
    while n - starts[-1] >= size + size // 2:
        a = starts[-1]
        near = begun[(begun >= a + size // 2) & (begun < a + size + size // 2)]
        starts.append(int(near[0]) if len(near) else a + size)
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


class _Plain(torch.autograd.Function):
    """Attention [heads, n, D] by products; its probabilities are kept, in the type of the queries, or computed again.

    The scores are float32.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, kept: bool) -> torch.Tensor:  # fmt: skip
        with torch.autocast("cpu", enabled=False):  # it would round the scores to half precision
            ctx.scale, ctx.large = scale, k.shape[1] >= LARGE
            with products.sent(ctx.large):
                seen = _probabilities(q, k, mask, scale)
                ctx.save_for_backward(q, k, v, *((seen,) if kept else (mask, None)))
                return seen @ v

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (q, k, v, seen, *again), (grad,) = ctx.saved_tensors, gradients
        with torch.autocast("cpu", enabled=False), products.sent(ctx.large):
            if again:
                seen = _probabilities(q, k, seen, ctx.scale)
            slopes = torch.ops.aten._softmax_backward_data.default(grad @ v.transpose(1, 2), seen, -1, q.dtype)
            of_q, of_k = ctx.scale * (slopes @ k), ctx.scale * (slopes.transpose(1, 2) @ q)
            return of_q, of_k, seen.transpose(1, 2) @ grad, None, None, None


def _probabilities(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    scores = torch.baddbmm(mask.expand(len(q), -1, -1), q.float(), k.float().transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1, out=scores).to(q.dtype)


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

    def meet(q: torch.Tensor, block: Block, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[1, heads, n, D] → [1, n, heads, D]; the heads that share keys stand under one another."""
        k, v, n = block.seen(k), block.seen(v), q.shape[2]
        q = q.reshape(1, shared, groups * n, width)
        if block.plain and not dropout:
            scale = width**-0.5 if scaling is None else scaling
            found = _Plain.apply(q[0], k[0], v[0], block.mask, scale, block.kept)
        else:
            mask = block.mask.to(q.dtype)
            found = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
        return found.reshape(1, heads, n, v.shape[3]).transpose(1, 2)

    sizes, out = [b - a for a, b in segments.bounds], []
    found = segments.blocks(shared, groups, query.dtype, last=last)
    for s, (q, k, v) in enumerate(zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)):
        read = segments.read[s] if last else None  # type: ignore[index]
        parts = (q if read is None else q.index_select(2, read)).split([block.queries for block in found[s]], 2)
        met = [meet(part, block, k, v) for part, block in zip(parts, found[s], strict=True)]
        if read is not None:
            none = q.new_zeros(1, sizes[s], heads, v.shape[3])
            met = [none.index_copy(1, read, torch.cat(met, 1)) if met else none]
        out += met
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
