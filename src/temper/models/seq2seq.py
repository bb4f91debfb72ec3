"""Encoder–decoders: the root of a tree is what the encoder reads, each branch is what the decoder writes.

The encoder runs once a tree, however many completions hang on it. Where a model counts positions as distances (T5), prompts
stand one after another in a line of the encoder, their completions in a line of the decoder, each seeing itself and its
prompt alone: nothing is padded but the ends of lines, and a prompt's keys and values are made once for all its completions.
Else each prompt, and each completion, has a line of its own.

Legend: N trees of a row, S scored tokens, P and W the longest lines of encoder and decoder, in tokens.
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
LANE = 384  # tokens of prompts and answers that share a line: more would be attended to in vain, fewer leave padding


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
    """Trees laid out for an encoder and its decoder. Padding has the owner −1; what is owned is a tree or a branch."""

    prompts: np.ndarray  # [lines of the encoder, P] token ids; 0 for virtual tokens too
    readers: np.ndarray  # [lines of the encoder, P] whose prompt it is, by tree
    virtual: np.ndarray  # bool [lines of the encoder, P]
    answers: np.ndarray  # [lines of the decoder, W] token ids, moved by the start token
    writers: np.ndarray  # [lines of the decoder, W] whose answer it is, by branch
    asked: np.ndarray  # [lines of the decoder, W] which tree that branch belongs to
    read: np.ndarray  # [lines of the decoder] the encoder's line that each looks at
    at: np.ndarray  # [S] where in the decoder's lines, laid end to end, each scored token is predicted


def lines_of(row: Row, start: int, *, in_line: bool, virtual: int = 0) -> Lines:
    """Trees → lines. In line, each holds the prompts, or answers, of some trees; else one prompt, or one branch.

    A token that branches share is scored on the first of them.

    Args:
        virtual: virtual tokens before each prompt.
    """
    trees = row.trees
    branches = [(n, b) for n, tree in enumerate(trees) for b in range(len(tree.tips))]
    lanes = (
        _lanes([(t.root + virtual, len(t) - t.root) for t in trees]) if in_line else [[n] for n in range(len(trees))]
    )
    lane_of = {n: k for k, lane in enumerate(lanes) for n in lane}
    of_branch = [lane_of[n] for n, _ in branches] if in_line else list(range(len(branches)))
    prompts = [(lane_of[n], n, [0] * virtual + t.ids[: t.root].tolist()) for n, t in enumerate(trees)]
    own = [trees[n].ids[trees[n].path(b)[trees[n].root :]].tolist() for n, b in branches]
    answers = [(of_branch[k], k, [start, *ids[:-1]]) for k, ids in enumerate(own)]
    read_ids, readers, begins = _laid(prompts, len(lanes))
    ids, writers, places = _laid(answers, max(of_branch) + 1)
    soft = np.zeros(read_ids.shape, bool)
    for (lane, _, _), at in zip(prompts, begins, strict=True):
        soft[lane, at : at + virtual] = True
    tree_of = np.array([n for n, _ in branches])
    read = np.zeros(len(ids), np.int64)
    read[of_branch] = [lane_of[n] for n, _ in branches]
    roots = np.concatenate([np.full(len(t.tgt), t.root, np.int64) for t in trees])
    depth = np.concatenate([t.pos[t.tgt] for t in trees]) - roots
    scored = row.branch.cpu().numpy()
    at = np.array(of_branch)[scored] * ids.shape[1] + np.array(places)[scored] + depth
    return Lines(read_ids, readers, soft, ids, writers, np.where(writers < 0, -1, tree_of[writers]), read, at)


def _lanes(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Trees of (prompt, answers) tokens dealt out to lanes of about LANE tokens, so that the longest line of prompts and the
    longest of answers are short: the largest first, each to the lane that it lengthens least."""
    tokens = np.array(sizes, np.float64)
    count = max(1, round(tokens.sum() / LANE))
    share = tokens.sum(0).clip(1) / count
    lanes: list[list[int]] = [[] for _ in range(count)]
    load = np.zeros((count, 2))
    for n in np.argsort(-(tokens / share).max(1), kind="stable").tolist():
        k = int(np.argmin(((load + tokens[n]) / share).max(1)))
        lanes[k].append(n)
        load[k] += tokens[n]
    return [sorted(lane) for lane in lanes if lane]


def _laid(pieces: Sequence[tuple[int, int, list[int]]], lines: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Pieces of (line, owner, ids) one after another: ids [lines, width], owners, and where each piece begins in its line."""
    filled = [0] * lines
    begins = []
    for line, _, ids in pieces:
        begins.append(filled[line])
        filled[line] += len(ids)
    shape = (lines, rounded(max(filled), FEW))
    out, owners = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    for (line, owner, ids), at in zip(pieces, begins, strict=True):
        out[line, at : at + len(ids)], owners[line, at : at + len(ids)] = ids, owner
    return out, owners, begins


def states(hf: Any, row: Row, *, in_line: bool) -> torch.Tensor:
    """The decoder's last hidden states where scored tokens are predicted, [S, width], in the order of `row.tgt`.

    Args:
        hf: a transformers model, or a PEFT model around one.
    """
    model: Any = adapted.inner(hf)
    soft, device = adapted.soft(hf), row.ids.device
    lines = lines_of(row, start_of(model), in_line=in_line, virtual=0 if soft is None else len(soft))
    readers, writers, asked, prompts, answers, at = (
        torch.from_numpy(part.astype(np.int64)).to(device)
        for part in (lines.readers, lines.writers, lines.asked, lines.prompts, lines.answers, lines.at)
    )
    given: dict[str, Any] = {"input_ids": prompts}
    if soft is not None:
        words = model.get_input_embeddings()(prompts)
        places = torch.from_numpy(lines.virtual).to(device)
        words = words.masked_scatter(places[..., None], soft.to(words.dtype).repeat(len(row.trees), 1))
        given = {"inputs_embeds": words}

    def mask(seen: torch.Tensor, seers: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
        """Who sees whom, [lines, 1, seers, seen]; padding sees all, so that no line of it is empty. Where each line has one
        owner, no more than where there is padding: [lines, seen]."""
        if not in_line:
            return (seen >= 0).long()
        out = (seen[:, None, :] == seers[:, :, None]) | (seers < 0)[:, :, None]
        return in_form((out & torch.ones_like(out[0]).tril() if causal else out)[:, None], model, dtype)

    dtype = next(model.parameters()).dtype
    states = model.get_encoder()(**given, attention_mask=mask(readers, readers)).last_hidden_state
    if not in_line:
        read = torch.from_numpy(lines.read).to(device)
        states, readers = states.index_select(0, read), readers.index_select(0, read)
    own, more = mask(writers, writers, causal=True), dict[str, Any]()
    if (past := adapted.past(hf, len(answers))) is not None:
        more, own = {"past_key_values": past}, widened(own, adapted.virtual(hf))
    out = model.get_decoder()(
        input_ids=answers, attention_mask=own, encoder_hidden_states=states,
        encoder_attention_mask=mask(readers, asked), use_cache=False, **more,
    )  # fmt: skip
    return out.last_hidden_state.flatten(0, 1).index_select(0, at)


@torch.no_grad()
def alone(hf: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of an answer's tokens by the model's own forward pass, without padding; float32."""
    device = next(hf.parameters()).device
    given = torch.tensor([[start_of(adapted.inner(hf)), *answer[:-1]]], device=device)
    out = hf(input_ids=torch.tensor([list(prompt)], device=device), decoder_input_ids=given, use_cache=False)
    return out.logits[0].float().log_softmax(-1).gather(-1, torch.tensor(answer, device=device)[:, None])[:, 0]
