"""Rollouts by a server, to which the policy is handed over before each: its adapter, or all its weights.

Legend: S scored tokens of a rollout (a completion with its end token).
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel
from pydantic import model_validator

from temper import hub
from temper.address import Address, endpoint
from temper.engine import device as devices
from temper.errors import ModelError, RecipeError, nearest
from temper.job import Job
from temper.models import adapted, adapters, load
from temper.models.methods import Adapter
from temper.models.scores import Policy
from temper.recipe import Config, detail
from temper.rollouts.decoding import Completion, Decoding
from temper.rollouts.vllm import Card, Vllm
from temper.stages.agreement import LEAST_MOVED, at_one, compare
from temper.stages.rollout import Rollout
from temper.trees import Row, group, join

PROBE = {"prompts": 4, "completions": 2, "tokens": 8}  # what is sampled from the base to see whether it is the policy's


class Rollouts(Config):
    """Who samples the completions."""

    engine: Literal["native", "vllm"] = detail(
        "native", "native: this process; vllm: a vLLM server (or `temper serve`) that serves the base and is handed the policy."
    )
    url: str | None = detail(
        None,
        "Of vllm: the base URL, ending in /v1; with #NAME behind it where the server serves several bases.",
        affects_result=False,
    )
    bound: float = detail(
        0.1,
        "Of vllm: the run stops where log-probabilities of sampled tokens differ by more than so many nats on average between "
        "the server and the policy. vLLM comes to 1e-6 in float32, and to 0.02 or 0.03 in bf16.",
        gt=0,
        affects_result=False,
    )

    @model_validator(mode="after")
    def _fits(self) -> Rollouts:
        if self.engine == "native":
            if odd := sorted(self.model_fields_set & {"url", "bound"}):
                raise ValueError(f"{odd[0]} belongs to engine: vllm, and the engine is native")
        elif not self.url:
            raise ValueError("engine: vllm needs a url, such as http://127.0.0.1:8000/v1")
        elif endpoint(self._whole) is None:
            raise ValueError(f"«{self.url}» is no URL: write http://HOST:PORT/v1")
        return self

    @property
    def _whole(self) -> str:
        return f"{self.url}{'' if '#' in (self.url or '') else '#*'}"

    @property
    def address(self) -> Address:
        """The server; the model's name is * where the recipe names none."""
        found = endpoint(self._whole)
        assert found is not None
        return found


def check(rollouts: Rollouts, adapter: Adapter | None, quantize: str | None, decoding: Decoding) -> None:
    """RecipeError where a server cannot be handed what is trained, or cannot sample as it is asked to."""
    if rollouts.engine == "native":
        return
    if adapter is not None and (adapter.method != "lora" or adapter.dora):
        raise RecipeError(
            f"vLLM serves plain LoRA adapters, and this one is {'DoRA' if adapter.dora else adapter.method}",
            where="adapter.dora" if adapter.dora else "adapter.method",
            do="method: lora, or leave rollouts out",
        )
    if quantize:
        raise RecipeError(
            f"the policy's base is rounded ({quantize}), and the server's is not: it would sample from another distribution",
            where="quantize",
            do="leave quantize out, or rollouts",
        )
    if decoding.stop:
        raise RecipeError(
            "stop strings are found in text, and an engine elsewhere may find them at another token",
            where="decoding.stop",
            do="leave it out: completions end at the model's end tokens",
        )


class Handover:
    """Samples as a `Sampler` does, from a server that is handed the policy as it is at each call.

    Args:
        policy: as it was before the first step, with its adapter on if it has one.
        source: what it is trained from.
        ends: tokens that end a completion.
        slots: completions sampled at once, `completions` to a prompt.

    Raises:
        ModelError: the server could not be handed this policy.
    """

    def __init__(
        self, job: Job, rollouts: Rollouts, policy: Policy, tokenizer: Any, source: hub.Source, ends: set[int],
        *, slots: int, completions: int, precision: str,
    ) -> None:  # fmt: skip
        if source.adapters:
            raise ModelError(
                f"{source.adapters[-1]} is an adapter on top of which another is trained, and the server has its base alone",
                do="merge: true in the stage that made it, and serve that model",
            )
        if policy.inner.config.is_encoder_decoder:
            raise ModelError(
                f"{source.name} is an encoder–decoder, of which vLLM serves no adapters", do="leave rollouts out"
            )
        self.job, self.policy, self.tokenizer, self.source, self.ends = job, policy, tokenizer, source, ends
        self.hf: Any = policy.hf
        self.whole = not isinstance(policy.hf, PeftModel)
        self.base = ""  # its name at the server
        self.slots, self.precision, self.bound = slots, precision, rollouts.bound
        self.address = rollouts.address
        tell = lambda text: job.say(text, "yellow")  # noqa: E731
        self.server = Vllm(self.address.url, concurrency=max(1, slots // completions), tell=tell)
        self.identity = hub.identity(source)
        self.folder = job.kept / "rollouts" / "handed-over"
        # Names are of this folder and of this start: a server keeps what it has computed for an adapter by its name, and other
        # weights under the same one would be answered from there.
        self.mine = f"temper-{job.name}-{hashlib.sha256(str(job.kept.resolve()).encode()).hexdigest()[:8]}-"
        self.start, self.number, self.name = secrets.token_hex(4), 0, ""
        self.reason = ""

    # Before anything is sampled

    def prove(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        """The server answers, has room, and serves the base that the policy has without its adapter.

        Args:
            prompts: all of them, as token ids.

        Raises:
            ModelError: it is not so.
        """
        self.reason = self.job.world.told(lambda: self._proven(prompts, new_tokens))

    def _proven(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> str:
        cards = self.server.models()
        base = self._base(cards)
        longest = max(map(len, prompts)) + new_tokens
        if base.context is not None and longest > base.context:
            raise ModelError(
                f"the engine takes {base.context} tokens, and the longest prompt comes to {longest} with its completion",
                where=self.address.url,
                do=f"start it with --max-model-len {longest} or more, or drop longer prompts: longer_than in the data stage",
            )
        self.base = base.name
        if self.whole:  # whatever weights an earlier run has left there
            self._handed_over()
        for card in cards:  # what a start of this run that was killed has left there
            if card.name.startswith(self.mine):
                self.server.unload(card.name)
        some = [list(p) for p in dict.fromkeys(map(tuple, prompts))][: PROBE["prompts"]]
        asked = Decoding(max_new_tokens=min(PROBE["tokens"], new_tokens), temperature=1.0)
        groups = self.server.write(
            base.name, some, asked, self.ends, completions=PROBE["completions"], seed=self.job.seed, step=0, numbers=range(len(some))
        )  # fmt: skip
        theirs = np.concatenate([c.raw for g in groups for c in g])
        difference = float(np.abs(theirs - self._own(some, groups)).mean())
        if not difference <= self.bound:
            raise ModelError(
                f"the engine serves another base model than the policy's: «{base.name}» gives tokens log-probabilities that "
                f"differ by {difference:.2g} nats on average from those of {self.source.name}",
                where=self.address.url,
                do=f"serve {self.source.name}; if it is that model, its precision or quantisation differs: rollouts.bound is "
                f"{self.bound:g}, and vLLM's --logprobs-mode must be raw_logprobs",
            )
        return f"vLLM's protocol at {self.address.url}, base «{base.name}» equal to the policy's to {difference:.1e} nats a token"

    def _base(self, cards: Sequence[Card]) -> Card:
        bases = [card for card in cards if card.parent is None]
        named = [card for card in bases if card.name == self.address.model]
        if named or (self.address.model == "*" and len(bases) == 1):
            return (named or bases)[0]
        if self.address.model == "*":
            what = f"serves {len(bases)} base models" if bases else "serves no base model"
            raise ModelError(
                f"the engine {what}", where=self.address.url,
                do=f"say which: url: {self.address.url}#NAME, NAME being one of {', '.join(c.name for c in bases)}" if bases else "serve one",
            )  # fmt: skip
        raise ModelError(
            f"the engine serves no base model «{self.address.model}»",
            where=self.address.url,
            do=nearest(self.address.model, [c.name for c in bases]),
        )

    @torch.no_grad()
    def _own(self, prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[Completion]]) -> np.ndarray:
        """Log-probabilities of the policy without its adapter, under the plain softmax [S]."""
        self.policy.eval()
        rows = [join([group(p, [c.scored for c in g])]) for p, g in zip(prompts, groups, strict=True)]
        with at_one(self.policy), adapted.off(self.policy.hf), devices.autocast(self.policy.device, self.precision):
            return np.concatenate([self.policy(row.to(self.policy.device)).float().cpu().numpy() for row in rows])

    # Sampling

    @contextlib.contextmanager
    def reading(self, hf: Any) -> Iterator[None]:
        """Within, another model of the same kind is handed over: the same weights, gathered in one place."""
        before, self.hf = self.hf, hf
        try:
            yield
        finally:
            self.hf = before

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
    ) -> list[list[Completion]]:
        """As of `Sampler`, but that the noise is the server's, under seeds that are functions of (seed, step, number). All
        processes call it together; the main one hands over.

        Raises:
            ModelError: the server fails.
        """
        self.name = self.job.world.told(self._handed_over)
        return self.server.write(
            self.name, prompts, decoding, self.ends, completions=completions, seed=seed, step=step,
            numbers=range(len(prompts)) if numbers is None else numbers, progress=progress,
        )  # fmt: skip

    def _handed_over(self) -> str:
        """The policy as it is now, at the server: an adapter under a name of its own, whole weights in the base's place."""
        if self.whole:
            shutil.rmtree(self.folder, ignore_errors=True)
            load.save(self.hf, self.tokenizer, self.folder, ends=self.ends)
            self.server.reload(str(self.folder.resolve()))
            return self.base
        self._take_back()  # first, for a server may have room for one alone
        self.number += 1
        name, folder = f"{self.mine}{self.start}-{self.number}", self.folder / f"{self.start}-{self.number}"
        shutil.rmtree(self.folder, ignore_errors=True)
        folder.mkdir(parents=True)
        adapters.save(self.hf, folder, self.source, stage=None, identity=self.identity, ends=self.ends)
        self.server.load(name, str(folder.resolve()), rank=self.hf.active_peft_config.r)
        return name

    def _take_back(self) -> None:
        if self.name and not self.server.unload(self.name):  # of an adapter
            self.job.warn("the engine does not take adapters back that it was given; it keeps all of them")

    def close(self) -> None:
        """Have the last adapter served no more. Whole weights stay, for nobody here knows where the server has its own."""
        if self.name and not self.whole and self.job.world.main:
            with contextlib.suppress(ModelError):  # the run is over, well or not
                self.server.unload(self.name)
        self.name = ""

    def compared(self, rollout: Rollout, score: Callable[[Callable[[Row], torch.Tensor]], np.ndarray]) -> None:
        """Compare what the server says of the tokens with what the policy says, and note it in the rollout, with the policy's own
        log-probabilities as the column «old».

        Args:
            score: (a model) → its log-probabilities of all scored tokens [S].

        Raises:
            TrainingError: they differ by more than the bound, or what is lacking is what the adapter does.
        """
        theirs = np.concatenate([c.raw for c in rollout.done])
        with at_one(self.policy):
            own, base = score(self.policy), None if self.whole else score(self._without)
        found = compare(theirs, own, base, LEAST_MOVED[self.precision])
        found.check(self.bound, self.address.url, self.name)
        rollout.engine = np.array([found.gap, np.nan if found.lag is None else found.lag])
        if self.policy.temperature != 1:  # the server tells of the plain softmax alone
            own = score(self.policy)
            rollout.columns["sampled"] = own.copy()
        rollout.columns["old"] = own

    @torch.no_grad()
    def _without(self, row: Row) -> torch.Tensor:
        with adapted.off(self.policy.hf):
            return self.policy(row)  # type: ignore[no-any-return]
