"""Encoder–decoders: the root of a tree is what the encoder reads, each branch is what the decoder writes.

The encoder runs once a tree, however many completions hang on it. Where a decoder counts positions as distances (T5), the
completions of a prompt stand in one line, each seeing itself alone, and the prompt's keys and values are made once for all
of them; else each completion has a line of its own.

Legend: N trees of a row, B branches of all of them, S scored tokens, P and W the longest prompt and line, in tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from temper.errors import ModelError
from temper.models import adapted
from temper.models.attention import in_form, widened
from temper.trees import Row, rounded

FEW = 16  # widths are rounded up to this: see `trees.ROUND`; lines here are short


def start_of(model: PreTrainedModel) -> int:
    """The token that a decoder begins with.

    Raises:
        ModelError: the model names none.
    """
    for config in (model.config, model.generation_config):
        if (found := getattr(config, "decoder_start_token_id", None)) is not None:
            return found
    raise ModelError(
        "the model does not say which token its decoder begins with",
        do="set decoder_start_token_id in its config.json (T5: that of padding)",
    )


def encoded(
    model: Any, prompts: Sequence[Any], soft: torch.Tensor | None = None, device: Any = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the encoder makes of prompts [N, P, width], which of it is no padding [N, P]).

    Args:
        soft: virtual tokens before every prompt [V, width]; P then counts them too.
    """
    width = rounded(max(len(p) for p in prompts), FEW)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for line, prompt in enumerate(prompts):
        ids[line, : len(prompt)] = torch.as_tensor(np.asarray(prompt, np.int64))
        mask[line, : len(prompt)] = 1
    ids, mask = ids.to(device), mask.to(device)
    if soft is None:
        return model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state, mask
    words = model.get_input_embeddings()(ids)
    mask = torch.cat([mask.new_ones(len(prompts), len(soft)), mask], 1)
    words = torch.cat([soft.to(words.dtype).expand(len(prompts), -1, -1), words], 1)
    return model.get_encoder()(inputs_embeds=words, attention_mask=mask).last_hidden_state, mask


@dataclasses.dataclass(frozen=True)
class Lines:
    """What a decoder is given of a row."""

    ids: torch.Tensor  # [lines, W]
    tree: torch.Tensor  # [lines] whose prompt each line looks at
    mask: torch.Tensor  # bool [lines, W] no padding; or bool [lines, 1, W, W] who sees whom
    at: torch.Tensor  # [S] where in the lines, laid end to end, each scored token is predicted


def lines_of(row: Row, start: int, *, in_line: bool) -> Lines:
    """Branches → lines. A token that branches share is scored on the first of them."""
    own = [(n, tree.ids[tree.path(b)[tree.root :]]) for n, tree in enumerate(row.trees) for b in range(len(tree.tips))]
    begins, line_of, widths = [], [], []
    for n, ids in own:  # where each branch begins, and in which line
        if in_line and line_of and own[len(line_of) - 1][0] == n:
            begins.append(widths[-1])
            widths[-1] += len(ids)
        else:
            begins.append(0)
            widths.append(len(ids))
        line_of.append(len(widths) - 1)
    width = rounded(max(widths), FEW)
    ids, owner = np.zeros((len(widths), width), np.int64), np.full((len(widths), width), -1, np.int64)
    tree_of = np.zeros(len(widths), np.int64)
    for branch, ((n, answer), line, at) in enumerate(zip(own, line_of, begins, strict=True)):
        ids[line, at : at + len(answer)] = [start, *answer[:-1]]
        owner[line, at : at + len(answer)] = branch
        tree_of[line] = n
    roots = np.concatenate([np.full(len(t.tgt), t.root, np.int64) for t in row.trees])
    branches = row.branch.cpu().numpy()
    depth = np.concatenate([t.pos[t.tgt] for t in row.trees]) - roots
    places = np.array(line_of)[branches] * width + np.array(begins)[branches] + depth
    device = row.ids.device
    owners = torch.from_numpy(owner)
    mask = owners >= 0
    if max(line_of.count(k) for k in set(line_of)) > 1:
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        mask = ((owners[:, :, None] == owners[:, None, :]) & causal)[:, None]  # padding sees padding: no line is empty
    made = (torch.from_numpy(ids), torch.from_numpy(tree_of), mask, torch.from_numpy(places.astype(np.int64)))
    return Lines(*(part.to(device) for part in made))


def states(hf: Any, row: Row, *, in_line: bool) -> torch.Tensor:
    """The decoder's last hidden states where scored tokens are predicted, [S, width], in the order of `row.tgt`.

    Args:
        hf: a transformers model, or a PEFT model around one.
    """
    model: Any = adapted.inner(hf)
    lines = lines_of(row, start_of(model), in_line=in_line)
    read, seen = encoded(model, [t.ids[: t.root] for t in row.trees], adapted.soft(hf), row.ids.device)
    if not in_line:
        read, seen = read.index_select(0, lines.tree), seen.index_select(0, lines.tree)
    mask: Any = in_form(lines.mask, model, read.dtype) if lines.mask.ndim == 4 else lines.mask.long()
    more: dict[str, Any] = {}
    if (past := adapted.past(hf, len(lines.ids))) is not None:
        more, mask = {"past_key_values": past}, widened(mask, adapted.virtual(hf))
    out = model.get_decoder()(
        input_ids=lines.ids, attention_mask=mask, encoder_hidden_states=read, encoder_attention_mask=seen,
        use_cache=False, **more,
    )  # fmt: skip
    return out.last_hidden_state.flatten(0, 1).index_select(0, lines.at)


@torch.no_grad()
def alone(hf: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of an answer's tokens by the model's own forward pass, without padding; float32."""
    device = next(hf.parameters()).device
    given = torch.tensor([[start_of(adapted.inner(hf)), *answer[:-1]]], device=device)
    out = hf(input_ids=torch.tensor([list(prompt)], device=device), decoder_input_ids=given, use_cache=False)
    return out.logits[0].float().log_softmax(-1).gather(-1, torch.tensor(answer, device=device)[:, None])[:, 0]
