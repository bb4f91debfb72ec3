"""The sampler: prompts as token ids in, completions with their log-probabilities out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from temper.errors import DataError
from temper.models.scores import Policy
from temper.rollouts import fallback, native
from temper.rollouts.decoding import Completion, Decoding, Draft
from temper.rollouts.distribution import uniforms
from temper.rollouts.proof import prove, trusted


class Sampler:
    """Samples from one model, whose weights may change between calls: nothing that depends on them is kept.

    Make it in the precision (autocast) in which it will be called. `layout` and `reason` say how it decodes, and why.

    Args:
        hf: a transformers model, or a PEFT model around one, whose active adapter takes part.
        tokenizer: for stop strings and padding.
        end_ids: tokens that end a completion; none: only the limit does.
        slots: completions decoded together.
    """

    def __init__(self, hf: Any, tokenizer: Any, *, end_ids: Iterable[int], slots: int = 64) -> None:
        self.hf, self.tokenizer, self.slots = hf, tokenizer, slots
        self.ends = frozenset(end_ids)
        self.policy = Policy(hf, "padded")
        with _evaluating(hf), torch.no_grad():
            self.layout, why = prove(self.policy)
            if self.layout == "generate":
                why += self.trust[1]
        self.reason = f"{'native sampler' if self.layout == 'native' else 'by generate'}: {why}"

    @functools.cached_property
    def trust(self) -> tuple[fallback.Together, str]:
        """Which prompts `generate` may decode together, and what is wrong with it all the same."""
        with _evaluating(self.hf), torch.no_grad():
            return trusted(self.policy)

    @contextlib.contextmanager
    def reading(self, hf: Any) -> Iterator[None]:
        """Within, another model of the same kind is sampled from: the same weights, gathered in one place."""
        before = self.hf
        self.hf = self.policy.hf = hf
        try:
            yield
        finally:
            self.hf = self.policy.hf = before

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        *,
        completions: int = 1,
        seed: int = 0,
        step: int = 0,
        numbers: Sequence[int] | None = None,
        progress: Callable[[int], Any] | None = None,
        heard: Callable[[Sequence[int]], Any] | None = None,
    ) -> list[list[Completion]]:
        """`completions` answers to every prompt, in their order.

        The noise of a token is a function of (seed, step, the prompt's number, the completion's, the token's place):
        a sample does not change with what else is asked for, with the order or with `slots`, but for ties within
        rounding. A caller that draws different prompts under one seed and step gives them different `numbers`.
        Whether a prompt and `max_new_tokens` fit the model's context is the caller's to check.

        Args:
            numbers: one a prompt; by default its index.
            progress: called with a number of newly finished completions.
            heard: called with the tokens so far of the completion that grew; useful with one completion. Not by beams.

        Raises:
            DataError: an empty prompt.
        """
        for k, prompt in enumerate(prompts):
            if not len(prompt):
                raise DataError("a prompt has no tokens", where=f"prompt {k}")
        named = range(len(prompts)) if numbers is None else numbers
        asked = [(i, k) for i in range(len(prompts)) for k in range(completions)]
        length = decoding.max_new_tokens
        drafts = [
            Draft(decoding, self.ends, self.tokenizer, uniforms(length, seed, step, named[i], k), heard) for i, k in asked
        ]
        with _evaluating(self.hf):
            self._decode([prompts[i] for i, _ in asked], drafts, progress)
        done = [d.done for d in drafts]
        return [
            [c for c in done[i * completions : (i + 1) * completions] if c is not None] for i in range(len(prompts))
        ]

    def _decode(
        self,
        prompts: list[Sequence[int]],
        drafts: list[Draft],
        progress: Callable[[int], Any] | None,
    ) -> None:
        model = self.policy.inner
        if not drafts:
            return
        if self.layout == "native" and drafts[0].decoding.beams == 1:
            native.decode(model, prompts, drafts, slots=self.slots, progress=progress)
            return
        pad = self.tokenizer.pad_token_id
        fallback.decode(
            self.hf, prompts, drafts, pad_id=0 if pad is None else pad, slots=self.slots, together=self.trust[0],
            progress=progress,
        )  # fmt: skip


@contextlib.contextmanager
def _evaluating(hf: torch.nn.Module) -> Iterator[None]:
    """Dropout off; afterwards every module is in the mode in which it was."""
    modes = [(m, m.training) for m in hf.modules()]
    hf.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
