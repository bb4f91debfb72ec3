"""Sampling: 32 completions of prompts of 613 tokens (4 × 8) and of 32 (32 × 1), of 64 tokens each, and ragged ones.

Against `generate`, which computes a prompt once a completion and goes on until the last row ends, and against continuous
batching, which shares prompts in pages and lets rows leave. Weights are in the precision that is named; temperature 1,
nothing truncated. Of ragged completions every fiftieth token ends one, so that their lengths are near to geometric, of
46 tokens on average, and at most 128. Each side draws samples of its own: the seeds are such that none makes more or fewer
tokens than are expected by much, and that is asserted. (`generate` takes equally long for 1,092 and for 1,802 tokens: it
goes by the longest row.)
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contest import Contest, Settings, Side
from shapes import FIRST, VOCABULARY, operations


@dataclasses.dataclass(frozen=True)
class Work:
    """Prompts of one length, with completions of each."""

    length: int
    prompts: int
    completions: int
    new: int  # tokens of a completion, at most
    ends: tuple[int, ...] = ()

    def ids(self) -> list[list[int]]:
        draw = np.random.default_rng(self.length)
        return draw.integers(FIRST, VOCABULARY, (self.prompts, self.length)).tolist()  # type: ignore[no-any-return]

    def expected(self) -> float:
        """Tokens that all completions have together, their end tokens among them, were every token as likely."""
        goes_on = 1 - len(self.ends) / VOCABULARY
        return self.prompts * self.completions * sum(goes_on**t for t in range(self.new))

    def check(self, lengths: list[int]) -> None:
        """Both sides are to make equally many tokens."""
        assert len(lengths) == self.prompts * self.completions
        if not self.ends:
            assert set(lengths) == {self.new}
        assert abs(sum(lengths) / self.expected() - 1) < 0.15, f"{sum(lengths)} tokens, not {self.expected():.0f}"


WORK = {
    "long": Work(613, 4, 8, 64),
    "short": Work(32, 32, 1, 64),
    "ragged": Work(613, 4, 8, 128, tuple(range(FIRST, VOCABULARY, 50))),
}
GREEDY = 8  # tokens of each prompt that the sides are compared on


def made(which: str, folder: Path, settings: Settings) -> Side:
    del folder  # nothing is written
    work = WORK[settings["work"]]
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[settings["precision"]]
    kind = Sampled if which == "temper" else {"generate": Generated, "pages": Paged}[settings["by"]]
    return kind(work, dtype, settings.get("seed", 0))


class Answering:
    """A model with prompts before it; greedy decoding says whether both sides have the same."""

    def __init__(self, work: Work, dtype: torch.dtype, seed: int) -> None:
        from transformers import AutoModelForCausalLM

        self.work, self.prompts, self.seed = work, work.ids(), seed
        self.model: Any = AutoModelForCausalLM.from_pretrained(os.environ["TEMPER_BENCH_BASE"], dtype=dtype).eval()
        made = int(work.expected())
        self.tokens = work.prompts * work.length + made
        seen = work.prompts * work.length**2 / 2 + made * work.length
        # a forward pass: half of the four operations a weight, a third of those of attention
        self.flops = operations(self.tokens, made, 0, full=False) / 2 + operations(0, 0, seen, full=False) / 3

    def settings(self, **more: Any) -> Any:
        from transformers import GenerationConfig

        told = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": self.work.new}
        return GenerationConfig(**{**told, "eos_token_id": list(self.work.ends) or None, "pad_token_id": 0, **more})


class Sampled(Answering):
    """Temper's sampler."""

    def __init__(self, work: Work, dtype: torch.dtype, seed: int) -> None:
        from shapes import tokenizer

        from temper.engine import device
        from temper.rollouts.sampler import Sampler

        super().__init__(work, dtype, seed)
        device.setup("cpu", torch.get_num_threads(), halves=dtype is torch.bfloat16)  # as every stage does
        self.sampler = Sampler(self.model, tokenizer(), end_ids=work.ends)
        assert self.sampler.layout == "native", self.sampler.reason

    def epoch(self) -> None:
        from temper.rollouts.decoding import Decoding

        told = Decoding(max_new_tokens=self.work.new, temperature=1.0)
        answers = self.sampler.sample(self.prompts, told, completions=self.work.completions, seed=self.seed)
        self.work.check([len(one.logps) for some in answers for one in some])

    def loss(self) -> float:
        from temper.rollouts.decoding import Decoding

        answers = self.sampler.sample(self.prompts, Decoding(max_new_tokens=GREEDY))
        return float(np.concatenate([one.raw for some in answers for one in some]).mean())


class Generated(Answering):
    """transformers' `generate`."""

    @torch.no_grad()
    def epoch(self) -> None:
        torch.manual_seed(self.seed)
        ids = torch.tensor(self.prompts).repeat_interleave(self.work.completions, 0)
        out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=self.settings())
        self.work.check([self._length(row) for row in out[:, ids.shape[1] :].tolist()])

    def _length(self, row: list[int]) -> int:
        """Tokens up to the end token, that one among them; what follows is padding."""
        return next((k + 1 for k, token in enumerate(row) if token in self.work.ends), len(row))

    @torch.no_grad()
    def loss(self) -> float:
        ids = torch.tensor(self.prompts)
        told = self.settings(do_sample=False, max_new_tokens=GREEDY, output_logits=True, return_dict_in_generate=True)
        out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=told)
        tokens = out.sequences[:, ids.shape[1] :]
        logps = torch.stack(out.logits, 1).float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        kept = [logps[k, : self._length(row)] for k, row in enumerate(tokens.tolist())]
        return float(torch.cat(kept).mean())


class Paged(Answering):
    """transformers' continuous batching, its pages as many as are needed: by default they take the memory that is free."""

    def epoch(self) -> None:
        found = self._asked(num_return_sequences=self.work.completions)
        self.work.check([len(one.generated_tokens) for one in found])

    def loss(self) -> float:
        found = self._asked(do_sample=False, max_new_tokens=GREEDY)
        return float(np.concatenate([one.logprobs for one in found]).mean())

    def _asked(self, **told: Any) -> list[Any]:
        from transformers.generation import ContinuousBatchingConfig

        page = 64
        pages = self.work.prompts * self.work.completions * -(-(self.work.length + self.work.new) // page)
        config = ContinuousBatchingConfig(
            page_size=page, num_blocks=pages + 8, max_batch_tokens=4096, return_logprobs=not told.get("do_sample", True),
            seed=self.seed,
        )  # fmt: skip
        found = list(
            self.model.generate_batch(
                self.prompts, generation_config=self.settings(**told), continuous_batching_config=config
            ).values()
        )
        assert not any(one.error for one in found)
        return found


SEEDS = {"temper": 5, "generate": 1, "pages": 2}  # of ragged completions: see above


def _contests() -> list[Contest]:
    out = []
    asked = {"long": 5.0, "short": 3.0, "ragged": 4.0}
    for work in WORK:
        for precision in ("float32", "bf16"):
            if work == "ragged" and precision == "bf16":
                continue  # rounding to half precision would change which seeds make how much
            ours: Settings = {"work": work, "precision": precision, "seed": SEEDS["temper"]}
            for by, against in (("generate", "transformers generate"), ("pages", "transformers continuous batching")):
                theirs = {**ours, "by": by, "seed": SEEDS[by]}
                out.append(
                    Contest(
                        f"rollouts-{work}-{precision}", against, made, tool="transformers",
                        asked=asked[work] if precision == "float32" else None, ours=ours, theirs=theirs,
                    )
                )  # fmt: skip
    return out


CONTESTS = _contests()
