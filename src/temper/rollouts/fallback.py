"""Decoding by transformers' own `generate`: every model that it can decode, decoded as it would be elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field
from transformers import GenerationConfig

from temper.errors import DataError
from temper.recipe import Config


class Decoding(Config):
    """How answers are decoded. Temperature 0 is greedy."""

    max_new_tokens: int = Field(default=128, ge=1, description="Longest answer in tokens.")
    temperature: float = Field(default=0.0, ge=0, description="0: greedy; otherwise the softmax's temperature.")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Sample from the smallest set of tokens with this probability."
    )
    top_k: int | None = Field(default=None, ge=1, description="Sample from this many most likely tokens.")
    repetition_penalty: float = Field(
        default=1.0, gt=0, description="Above 1: tokens already there become less likely."
    )


@dataclasses.dataclass(frozen=True)
class Completion:
    """Token ids of an answer without its end token, and whether the model ended it itself."""

    ids: list[int]
    ended: bool


@torch.no_grad()
def generate(
    hf: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    end_ids: Sequence[int],
    pad_id: int,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> list[Completion]:
    """Answers to prompts, in their order. Prompts of like length are decoded together, padded on the left.

    Raises:
        DataError: an empty prompt.
    """
    hf.eval()
    device = next(hf.parameters()).device
    settings = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=decoding.temperature > 0,
        repetition_penalty=decoding.repetition_penalty,
        eos_token_id=sorted(end_ids),
        pad_token_id=pad_id,
        **(
            {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k or 0}
            if decoding.temperature > 0
            else {}
        ),
    )
    for k, prompt in enumerate(prompts):
        if not prompt:
            raise DataError("a prompt has no tokens", where=f"prompt {k}")
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    out: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        taken = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in taken)
        ids = torch.full((len(taken), width), pad_id)
        mask = torch.zeros_like(ids)
        for line, i in enumerate(taken):
            ids[line, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[line, width - len(prompts[i]) :] = 1
        torch.manual_seed(seed * 1_000_003 + start)
        found = hf.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings)
        for i, tokens in zip(taken, found[:, width:].tolist(), strict=True):
            out[i] = _until_end(tokens, set(end_ids))
        if progress is not None:
            progress(len(taken))
    return [out[i] for i in range(len(prompts))]


def _until_end(tokens: list[int], ends: set[int]) -> Completion:
    for k, token in enumerate(tokens):
        if token in ends:
            return Completion(tokens[:k], True)
    return Completion(tokens, False)
