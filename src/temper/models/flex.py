"""Attention of a row's trees by FlexAttention, for graphics cards: blocks that nobody sees are not computed.

A dense mask costs a row's width squared in memory and time. Here the rule of the trees is a function of two places, out
of which PyTorch compiles a kernel (He et al. 2024, arXiv 2412.05496) that leaves out whole blocks: all that lies between
trees, between branches and behind windows. So the trees of a row stand end to end in one line, as in `segments`.

What a layer needs travels on its mask, of full shape and no memory, and no global is read: activation checkpointing
computes with the same one again. Used only where compiling works and its numbers are those of dense attention, forward
and backward (`refused`), and where the model as a whole passes the proof (`scores.prove`); else masks are dense.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from temper.trees import Node, Row, flatten, join, rounded

BLOCK = 128  # queries and keys of a block: FlexAttention's own
CAPABLE = (8, 0)  # compute capability: older cards (T4: 7.5) lack what the compiled kernels are written for
VARIANTS = 64  # compiled kernels kept: precisions, windows, with gradients and without, fixed and changing widths
APART = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}  # of the largest number: rounding alone

Rule = Callable[..., Any]  # (lane, head, query's place, key's place) → whether the query sees the key


def visible(row: Row, own_rule: Rule) -> Rule:
    """The rule of a row in one line, j ≤ i < end[j], and the layer's own in path positions, as a `mask_mod`."""
    more = rounded(len(row.ids), BLOCK) - len(row.ids)  # the kernel asks for whole blocks: nobody sees what is added
    pos, end = (functional.pad(x.int(), (0, more)) for x in (row.pos, row.end))

    def rule(lane: Any, head: Any, i: Any, j: Any) -> Any:
        return (j <= i) & (i < end[j]) & own_rule(lane, head, pos[i], pos[j])

    return rule


def carrier(row: Row, own_rule: Rule) -> torch.Tensor:
    """A mask [1, 1, T, T] of no memory that carries the visible blocks of a row in one line, for all layers of a kind.

    Args:
        own_rule: the model's windows and chunks, asked in path positions.
    """
    n, device = len(row.ids), row.ids.device
    mask = torch.ones((), dtype=torch.bool, device=device).expand(1, 1, n, n)
    blocks = create_block_mask(visible(row, own_rule), 1, None, n, n, device=str(device), BLOCK_SIZE=BLOCK)
    mask.blocks = blocks  # type: ignore[attr-defined]
    return mask


def attend(
    blocks: BlockMask,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Attention [1, T, heads, D] of queries [1, heads, T, D] to keys and values [1, key heads, T, D].

    Under autocast in its precision, as SDPA: positions leave queries and keys in float32.
    """
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    query, key, value = (x.to(dtype) for x in (query, key, value))
    compute: Any = _compiled() if query.device.type == "cuda" else flex_attention
    shared = query.shape[1] != key.shape[1]
    found = compute(
        query, key, value, block_mask=blocks, scale=scaling, enable_gqa=shared, kernel_options={"FORCE_USE_FLEX_ATTENTION": True}
    )  # fmt: skip  # forced: short rows would get another kernel, made for decoding, that nobody tried
    return found.transpose(1, 2).contiguous()


@functools.cache
def _compiled() -> Any:
    # past the limit PyTorch would compute all of T × T without a word
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)  # type: ignore[attr-defined]
    return torch.compile(flex_attention)


def refused(config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model's rows do not go through FlexAttention here; None where they do.

    Args:
        config: the model's.
        dtype: in which it computes.
    """
    if device.type != "cuda":
        return f"no kernels are compiled for {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABLE:
        return f"compute capability {'.'.join(map(str, capability))} is below 8.0"
    text = config.get_text_config()
    if any(getattr(text, name, 0) for name in ("attention_dropout", "attn_pdrop", "attn_dropout")):
        return "it knows no dropout of attention"
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return _failure(heads, getattr(text, "num_key_value_heads", None) or heads, size, device, dtype)


@functools.cache
def _failure(heads: int, shared: int, size: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Compile and compare with dense attention, in two widths: what changes is compiled anew, once for all others."""
    with warnings.catch_warnings(), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        warnings.simplefilter("ignore")  # advice on precision, from the compiler
        for width in (150, 300):
            try:
                apart = difference(width, heads, shared, size, device, dtype)
            except Exception as error:  # compilers fail in as many ways as there are machines
                return f"it failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''}"
            if not apart <= APART[dtype]:
                return f"it differs from dense attention by {apart:.1e} of the largest number"
    return None


def difference(
    width: int, heads: int, shared: int, size: int, device: torch.device, dtype: torch.dtype, *, backward: bool = True
) -> float:
    """Largest difference to dense attention on a tree of random vectors, outputs and gradients, as a share of the largest."""
    third = width // 3
    row = join([flatten(Node([0] * third, None, (Node([0] * third), Node([0] * (width - 2 * third)))))]).to(device)
    draw = torch.Generator(device).manual_seed(0)

    def own(*_: Any) -> Any:
        return _[2] >= _[3]

    def vectors(h: int) -> torch.Tensor:
        found = torch.randn(1, h, width, size, generator=draw, device=device).to(dtype)
        return found.requires_grad_(backward)

    q, k, v, wanted = vectors(heads), vectors(shared), vectors(shared), vectors(heads).detach().transpose(1, 2)
    blocks = carrier(row, own).blocks  # type: ignore[attr-defined]
    dense = create_mask(visible(row, own), 1, 1, width, width, device=str(device))
    ours = attend(blocks, q, k, v, None)
    theirs = functional.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True).transpose(1, 2)
    pairs = [(ours, theirs)]
    if backward:
        pairs += zip(*(torch.autograd.grad(x, (q, k, v), wanted) for x in (ours, theirs)), strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)
