"""A search by beams and limits of length, against transformers' own on the same models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from temper.address import Address
from temper.errors import ModelError
from temper.rollouts.decoding import Decoding
from temper.rollouts.endpoint import Endpoint
from temper.rollouts.sampler import Sampler
from test_chat import small
from test_methods import PROMPTS
from tiny_models import build

END = 2


def theirs(model: Any, prompt: list[int], **how: Any) -> list[int]:
    """One prompt alone, by `generate` as its documentation has it; without what comes before the answer."""
    ids = torch.tensor([prompt])
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=END, pad_token_id=0, **how)[0]  # fmt: skip
    tokens = found.tolist()[1 if model.config.is_encoder_decoder else len(prompt) :]
    return tokens[: tokens.index(END)] if END in tokens else tokens


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
@pytest.mark.parametrize(
    "how",
    [
        {"beams": 3},
        {"beams": 4, "length_penalty": 2.0},
        {"beams": 3, "min_new_tokens": 9},
        {"min_new_tokens": 9},
    ],
)
def test_answers_are_those_of_transformers(family: str, how: dict[str, Any]) -> None:
    model: Any = build(family)
    found = Sampler(model, small(), end_ids={END}).sample(PROMPTS, Decoding(max_new_tokens=12, **how))
    names = {"beams": "num_beams"}
    early = {"early_stopping": True} if "beams" in how else {}
    settings = {**{names.get(k, k): v for k, v in how.items()}, **early}
    assert [one.ids for (one,) in found] == [theirs(model, p, max_new_tokens=12, **settings) for p in PROMPTS]
    if "min_new_tokens" in how:
        assert all(len(one.ids) >= 9 for (one,) in found)
    if "beams" in how:
        assert all(np.isnan(one.logps).all() for (one,) in found)


def test_the_penalty_of_a_search_counts_the_prompt_and_no_padding() -> None:
    """Of a decoder, as transformers counts it where no prompt is padded."""
    model: Any = build("llama")
    how = Decoding(max_new_tokens=12, beams=3, repetition_penalty=1.7)
    found = Sampler(model, small(), end_ids={END}).sample(PROMPTS, how)
    settings = {"num_beams": 3, "repetition_penalty": 1.7, "early_stopping": True}
    assert [one.ids for (one,) in found] == [theirs(model, p, max_new_tokens=12, **settings) for p in PROMPTS]


def test_sampling_does_not_end_early() -> None:
    """Both samplers; the log-probability of what was sampled from leaves the end token out, the plain one does not."""
    ends = set(range(3, 80))  # an end at nearly every step
    for family in ("llama", "t5"):
        (many,) = Sampler(build(family), small(), end_ids=ends).sample(
            PROMPTS[:1], Decoding(max_new_tokens=8, min_new_tokens=5, temperature=1.0), completions=20, seed=2
        )
        assert all(len(one.ids) >= 5 for one in many) and any(one.end is not None for one in many)
        assert all((one.logps[:5] > one.raw[:5]).all() for one in many)


@pytest.mark.parametrize(
    "how",
    [{"beams": 2, "temperature": 1.0}, {"beams": 2, "stop": ["."]}, {"length_penalty": 2.0}, {"min_new_tokens": 200}],
)
def test_what_cannot_go_together(how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"beams|min_new_tokens"):
        Decoding(**how)


def test_an_endpoint_does_not_search() -> None:
    with pytest.raises(ModelError, match="does not search by beams"):
        Endpoint(Address("http://127.0.0.1:1/v1", "x")).answer(["a"], Decoding(beams=2))
