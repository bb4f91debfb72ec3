"""Decoding by transformers' `generate`: slower, and right for every model that it can decode.

Only the forward passes are its own. Tokens are drawn by the same code and the same noise as in the native sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria

from temper.rollouts.decoding import Draft
from temper.rollouts.distribution import draw

Together = Literal["any length", "equal length", "none"]


class _Drawn(LogitsProcessor):
    """Draws each row's token and leaves `generate` no other choice."""

    def __init__(self, prompts: Sequence[Sequence[int]], noise: np.ndarray, drafts: list[Draft]) -> None:
        self.prompts, self.noise, self.drafts = prompts, torch.from_numpy(noise), drafts
        self.seen: torch.Tensor | None = None
        self.position = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = scores.float()
        decoding = self.drafts[0].decoding
        if decoding.repetition_penalty != 1 and self.seen is None:
            self.seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, prompt in enumerate(self.prompts):  # not `input_ids`, which holds padding
                self.seen[row, torch.tensor(prompt, device=logits.device)] = True
        noise = self.noise[:, self.position].to(logits.device)
        tokens, logps, raw = draw(logits, noise, decoding, self.seen)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        self.position += 1
        drawn = zip(self.drafts, tokens.tolist(), logps.tolist(), raw.tolist(), strict=True)
        for draft, token, logp, plain in drawn:
            if draft.done is None:
                draft.add(token, logp, plain)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class _Done(StoppingCriteria):
    """A row ends when its draft does."""

    def __init__(self, drafts: list[Draft]) -> None:
        self.drafts = drafts

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        return torch.tensor([d.done is not None for d in self.drafts], device=input_ids.device)


def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    noise: np.ndarray,
    drafts: list[Draft],
    *,
    pad_id: int,
    slots: int,
    together: Together = "any length",
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Write every draft to its end, batches of up to `slots` prompts of like length together, padded on the left.

    Args:
        prompts: one a draft, token ids.
        noise: float64 [drafts, max_new_tokens].
        together: which prompts share a batch; some models see padding, and some lose their state in any batch.
        progress: called with the number of drafts that a batch finished.
    """
    device = next(model.parameters()).device
    settings = GenerationConfig(
        max_new_tokens=drafts[0].decoding.max_new_tokens, do_sample=False, num_beams=1, use_cache=True, pad_token_id=pad_id
    )  # fmt: skip
    kept = model.generation_config
    # What the model's own settings ask for (a penalty, forced tokens) would fill whatever ours leave open.
    model.generation_config = settings
    try:
        for taken in _batches([len(p) for p in prompts], slots, together):
            width = max(len(prompts[i]) for i in taken)
            ids = torch.full((len(taken), width), pad_id)
            mask = torch.zeros_like(ids)
            for line, i in enumerate(taken):
                ids[line, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[line, width - len(prompts[i]) :] = 1
            mine = [drafts[i] for i in taken]
            model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                logits_processor=[_Drawn([prompts[i] for i in taken], noise[taken], mine)],
                stopping_criteria=[_Done(mine)],
            )
            if progress is not None:
                progress(len(taken))
    finally:
        model.generation_config = kept


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
