"""Decoding by transformers' `generate`: slower, and right for every model that it can decode.

Only the forward passes are its own. Tokens are drawn by the same code and the same noise as in the native sampler.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.modeling_outputs import BaseModelOutput

from temper.models import adapted, seq2seq
from temper.rollouts.decoding import Decoding, Draft
from temper.rollouts.distribution import drawn, warped

Together = Literal["any length", "equal length", "none"]


class _Drawn(LogitsProcessor):
    """Draws each row's token and leaves `generate` no other choice."""

    def __init__(self, before: Sequence[Sequence[int]], drafts: list[Draft]) -> None:
        self.before, self.drafts = before, drafts
        self.penalised = any(draft.decoding.repetition_penalty != 1 for draft in drafts)
        self.seen: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = scores.float()
        if self.penalised and self.seen is None:
            self.seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, written in enumerate(self.before):  # not `input_ids`, which holds padding
                self.seen[row, torch.tensor(written, device=logits.device, dtype=torch.long)] = True
        live = [n for n, draft in enumerate(self.drafts) if not draft.over]
        tokens = torch.zeros(len(scores), dtype=torch.long, device=scores.device)  # of those that are over: any
        if live:
            rows = torch.tensor(live, device=scores.device)
            mine = [self.drafts[n] for n in live]
            seen = None if self.seen is None else self.seen.index_select(0, rows)
            drawn(logits.index_select(0, rows), mine, seen)
            if self.seen is not None and seen is not None:
                self.seen[rows] = seen
            tokens[rows] = torch.tensor([draft.latest for draft in mine], device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class _Penalised(LogitsProcessor):
    """The repetition penalty for a search: on tokens of each prompt and of what its beams have written, never on padding."""

    def __init__(self, before: Sequence[Sequence[int]], skipped: int, decoding: Decoding) -> None:
        self.before, self.skipped, self.decoding = before, skipped, decoding

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        beams = len(scores) // len(self.before)
        seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, input_ids[:, self.skipped :], True)
        for row in range(len(scores)):
            seen[row, torch.tensor(self.before[row // beams], device=scores.device, dtype=torch.long)] = True
        return warped(scores, self.decoding, seen)


class _Done(StoppingCriteria):
    """A row ends when its draft does."""

    def __init__(self, drafts: list[Draft]) -> None:
        self.drafts = drafts

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        return torch.tensor([d.over for d in self.drafts], device=input_ids.device)


def decode(
    hf: Any,
    prompts: Sequence[Sequence[int]],
    drafts: list[Draft],
    *,
    pad_id: int,
    slots: int,
    together: Together = "any length",
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Write every draft to its end, batches of up to `slots` prompts of like length together, padded on the left.

    An encoder–decoder's encoder reads each prompt of a batch once, padded on the right.

    Args:
        hf: a transformers model, or a PEFT model around one.
        prompts: one a draft, token ids.
        drafts: of a search by beams all with the same settings.
        together: which prompts share a batch; some models see padding, and some lose their state in any batch.
        progress: called with the number of drafts that a batch finished.
    """
    model: Any = adapted.inner(hf)
    decoding = drafts[0].decoding
    settings = GenerationConfig(
        max_new_tokens=max(d.decoding.max_new_tokens for d in drafts), do_sample=False, num_beams=decoding.beams, use_cache=True, pad_token_id=pad_id,
        decoder_start_token_id=seq2seq.start_of(model) if model.config.is_encoder_decoder else None,
    )  # fmt: skip
    kept = model.generation_config
    # What the model's own settings ask for (a penalty, forced tokens) would fill whatever ours leave open.
    model.generation_config = settings
    try:
        with _past_given(hf, model):
            for taken in _batches([len(p) for p in prompts], slots, together):
                mine, some = [drafts[i] for i in taken], [prompts[i] for i in taken]
                given = (_read if model.config.is_encoder_decoder else _padded)(hf, model, some, pad_id)
                before = [()] * len(some) if model.config.is_encoder_decoder else some
                if decoding.beams > 1:
                    _searched(model, given, settings, before, mine)
                else:
                    model.generate(
                        **given,
                        generation_config=settings,
                        logits_processor=[_Drawn(before, mine)],
                        stopping_criteria=[_Done(mine)],
                    )
                if progress is not None:
                    progress(len(taken))
    finally:
        model.generation_config = kept


def _searched(
    model: Any, given: dict[str, Any], settings: GenerationConfig, before: Sequence[Sequence[int]], drafts: list[Draft]
) -> None:
    """The answers that a search by beams finds. transformers searches; where an answer ends is looked up by its draft."""
    decoding, ends = drafts[0].decoding, sorted(drafts[0].ends)
    settings = copy.deepcopy(settings)
    settings.length_penalty, settings.early_stopping = decoding.length_penalty, True
    settings.eos_token_id = ends or None  # type: ignore[assignment]
    settings.min_new_tokens = decoding.min_new_tokens or None
    written = next((given[k].shape[1] for k in ("decoder_input_ids", "input_ids") if k in given), 0)
    penalised = [_Penalised(before, written, decoding)] if decoding.repetition_penalty != 1 else []
    found = model.generate(**given, generation_config=settings, logits_processor=penalised)
    for draft, line in zip(drafts, found[:, written:].tolist(), strict=True):
        for token in line:
            if draft.add(token, math.nan, math.nan):
                break


def _padded(hf: Any, model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """Prompts for a decoder: padded on the left, virtual tokens between the padding and each."""
    words, width, device = adapted.soft(hf), max(len(p) for p in prompts), next(model.parameters()).device
    first = 0 if words is None else len(words)
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros(len(prompts), first + width, dtype=torch.long)
    for line, prompt in enumerate(prompts):
        ids[line, width - len(prompt) :] = torch.tensor(prompt)
        mask[line, width - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    if words is None:
        return {"input_ids": ids, "attention_mask": mask}
    embedded = model.get_input_embeddings()(ids)
    lines = [
        torch.cat([line[: width - len(p)], words.to(line.dtype), line[width - len(p) :]])
        for line, p in zip(embedded, prompts, strict=True)
    ]
    return {"inputs_embeds": torch.stack(lines), "attention_mask": mask}


def _read(hf: Any, model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, Any]:
    """What the encoder made of prompts; equal ones, which stand beside one another, are read once."""
    different = list(dict.fromkeys(tuple(p) for p in prompts))
    device = next(model.parameters()).device
    states, mask = seq2seq.encoded(model, different, adapted.soft(hf), device)
    place = {prompt: n for n, prompt in enumerate(different)}
    lines = torch.tensor([place[tuple(p)] for p in prompts], device=device)
    start = torch.full((len(prompts), 1), seq2seq.start_of(model), device=device)
    return {
        "encoder_outputs": BaseModelOutput(last_hidden_state=states.index_select(0, lines)),  # type: ignore[arg-type]
        "attention_mask": mask.index_select(0, lines),
        "decoder_input_ids": start,
    }


@contextlib.contextmanager
def _past_given(hf: Any, model: Any) -> Iterator[None]:
    """Within, `generate` begins with the keys and values of a prefix, where the model has one: PEFT puts them in."""
    outer = adapted.prompting(hf)
    if outer is None or adapted.soft(hf) is not None:
        yield
        return
    model.prepare_inputs_for_generation = outer.prepare_inputs_for_generation
    try:
        yield
    finally:
        del model.prepare_inputs_for_generation


def _batches(lengths: list[int], slots: int, together: Together) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    batch: list[int] = []
    for i in order:
        apart = together == "none" or (together == "equal length" and bool(batch) and lengths[i] != lengths[batch[0]])
        if batch and (len(batch) == slots or apart):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
