"""The tree's visibility as a mask that a model's own attention takes.

The model's own mask function (sliding windows, chunks) is asked in path positions, so no architecture is known here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, create_masks_for_generate

from temper.trees import Row

Mask = torch.Tensor | dict[str, torch.Tensor]

# Layers that carry a state from token to token would run through sibling branches.
TREE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", None}

# Wrong without an error although their layer types look right (measured): positions or windows by row index,
# offset positions, sparsity that depends on the row.
NOT_TREES = {
    "bloom", "mpt", "falcon_alibi", "gpt_neo", "xlnet", "openai-gpt", "rwkv", "roberta", "xlm-roberta", "camembert",
    "deepseek_v32", "minimax", "lfm2", "recurrent_gemma", "bart", "t5",
}  # fmt: skip

# (a row in one line, the model's own rule) → a mask that carries what attends instead of it: `segments`, `flex`
Carrier = Callable[[Row, Callable[..., Any]], torch.Tensor]
_pending: list[tuple[Row, Carrier | None]] = []


def _tree_rule(
    batch_size: int, q_length: int, kv_length: int, mask_function: Any = None, device: Any = "cpu", **_: Any
) -> torch.Tensor:
    row, carrier = _pending[-1]
    if carrier is not None:
        return carrier(row, mask_function)
    grid = (row.lanes, q_length)
    lane = torch.arange(row.lanes, device=device)[:, None] * q_length
    pos, end = row.pos.view(grid), row.end.view(grid) - lane
    i = torch.arange(q_length, device=device)[None, None, :, None]
    j = torch.arange(kv_length, device=device)[None, None, None, :]
    zero = i.new_zeros(1, 1, 1, 1)
    own_rule = mask_function(zero, zero, pos[:, None, :, None], pos[:, None, None, :])
    return (j <= i) & (i < end[:, None, None, :]) & own_rule


AttentionMaskInterface.register("temper_tree", _tree_rule)


def tree_mask(model: PreTrainedModel, row: Row, dtype: torch.dtype, *, carrier: Carrier | None = None) -> Mask:
    """The mask(s) [lanes, 1, width, width] of one row, in the form that this model and its attention implementation take.

    Boolean for SDPA; additive for eager, which adds a boolean mask as +1 without a word. A dict by layer type for
    models that mix windows. Masks are arguments, not globals: recomputation under checkpointing sees the same ones.

    Args:
        carrier: makes masks that carry something else to attend by, of a row in one line; see `segments` and `flex`.
    """
    config = copy.copy(model.config.get_text_config())
    config._attn_implementation = "temper_tree"
    width = len(row.pos) // row.lanes
    _pending.append((row, carrier))
    try:
        # A 2D mask of ones must be given: without it, positions that start again are read as packed sequences.
        made = create_masks_for_generate(
            config,
            torch.empty(row.lanes, width, 1, dtype=dtype, device=row.pos.device),
            torch.ones(row.lanes, width, dtype=torch.bool, device=row.pos.device),
            None,
        )
    finally:
        _pending.pop()
    assert made is not None  # only implementations without masks answer None, and this one has masks
    if isinstance(made, dict):
        return {k: in_form(m, model, dtype) for k, m in made.items()}
    return in_form(made, model, dtype)


def in_form(mask: torch.Tensor, model: PreTrainedModel, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as this model's attention takes it: SDPA as it is, eager additive."""
    if model.config._attn_implementation == "sdpa":
        return mask
    # the smallest number, not -inf: a fully masked line of -inf gives nan
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def widened(mask: Mask, n: int) -> Mask:
    """The mask (boolean, additive, or 1 where there is no padding) with n more keys before all others, seen by every token."""
    if isinstance(mask, dict):
        return {kind: one for kind, m in mask.items() if torch.is_tensor(one := widened(m, n))}
    return torch.nn.functional.pad(mask, (n, 0), value=0.0 if mask.is_floating_point() else 1)


def refuses_trees(model: PreTrainedModel) -> str | None:
    """Why this model cannot be given trees, as far as its configuration tells; None where nothing speaks against it."""
    config = model.config.get_text_config()
    kind = getattr(config, "model_type", "")
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder–decoder"
    if kind in NOT_TREES or (kind == "falcon" and getattr(config, "alibi", False)):
        return f"{kind} takes positions or masks in its own way"
    if model._is_stateful or (set(getattr(config, "layer_types", None) or [None]) - TREE_LAYERS):
        return f"{kind} has layers that carry a state from token to token"
    return None


def smallest_window(model: PreTrainedModel) -> int | None:
    """The smallest sliding window or chunk in tokens, None where every layer sees everything."""
    config = model.config.get_text_config()
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "local_attention")]
    sizes = [size for size in found if isinstance(size, int) and size > 0]
    return min(sizes) if sizes else None
