"""rl: a policy learns from rewards of its own completions."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import field_validator, model_validator

from temper import hub, rewards
from temper.advantages import advantages
from temper.engine import device as devices
from temper.engine.loop import Loop
from temper.engine.settings import at_once
from temper.errors import RecipeError, TrainingError
from temper.job import Job
from temper.losses import Terms, policy_losses, summed, with_divergence
from temper.losses.divergence import Estimator, Level
from temper.models import load
from temper.models.reference import Reference
from temper.models.scores import Policy
from temper.recipe import ClassifierRef, Config, DataRef, RewardRef, detail, stages
from temper.rollouts.decoding import Decoding
from temper.rollouts.sampler import Sampler
from temper.stages import algorithms, handover
from temper.stages.experience import Experience, Plan, Prompt
from temper.stages.judge import Judge, Rewarder, check_reward_model
from temper.stages.rollout import Collapse
from temper.stages.seen import note_trained_on
from temper.stages.sft import encoder_of, warn_of_unknown
from temper.stages.start import GAP, check_room, check_start, tell_of
from temper.stages.training import TrainingStage, finish, open_policy, read_split
from temper.trees import Row
from temper.types import Record


class Kl(Config):
    """How far the policy is held to the model it started from."""

    beta: float = detail(0.04, "Weight of the KL term; 0: none.", ge=0)
    place: Literal["loss", "reward"] = detail("loss", "loss: beside the policy's; reward: taken off it.")
    level: Level = detail(
        "token",
        "In the reward, sequence (the default there): a completion bears the KL of all its tokens; token: a token bears its own "
        "and what comes after it. In the loss, token (the default there): each token's own; sequence: the completion's.",
    )
    estimator: Estimator = detail(
        "k3",
        "k1 = −r, k2 = r²/2, k3 = eʳ − r − 1 with r = log p_ref − log p. In the reward k1; in the loss k3, at level "
        "sequence k2.",
    )
    samples: Literal["all", "one"] = detail(
        "all",
        "Measure it on all completions of a prompt, or on one drawn at random, for fewer passes of the reference.",
    )
    corrected: bool = detail(True, "Multiply k3 by the ratio p / p_old: its gradient is then the KL's own.")

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, value: Any) -> Any:
        """What follows from the place and the level."""
        if not isinstance(value, dict):
            return value
        in_reward = value.get("place") == "reward"
        level = value.get("level", "sequence" if in_reward else "token")
        return {"level": level, "estimator": "k1" if in_reward else "k2" if level == "sequence" else "k3", **value}

    @model_validator(mode="after")
    def _sound(self) -> Kl:
        if self.place == "loss" and self.estimator == "k1":
            raise RecipeError(
                "kl: k1 in the loss has no gradient in expectation: it would hold the policy to nothing",
                where="kl.estimator",
                do="estimator: k2 or k3, or place: reward",
            )
        if self.place == "reward" and self.estimator in ("k2", "k3"):
            raise RecipeError(
                f"kl: {self.estimator} in the reward is not an unbiased estimate of the KL's gradient",
                where="kl.estimator",
                do="estimator: k1, or place: loss",
            )
        if self.place == "loss" and self.level == "sequence" and self.estimator == "k3":
            raise RecipeError(
                "kl: k3 of a whole completion grows with e to the sum of its tokens' log-ratios",
                where="kl.estimator",
                do="estimator: k2, or level: token",
            )
        return self


@dataclasses.dataclass(frozen=True)
class Trained:
    """A policy after its last step, and what saving it takes."""

    policy: Policy
    tokenizer: Any
    source: hub.Source  # of its base
    ends: set[int]
    probe: Row  # a group of one prompt


@stages.register("rl")
class Rl(TrainingStage):
    """Sample completions, reward them, and make the better ones of a prompt more likely."""

    together = True
    kind = "rl"

    data: DataRef = detail(..., "A data stage whose prompts (its split train) are answered.")
    algorithm: str | dict[str, Any] = detail("grpo", "A name or {name: {option: value}}; see `temper list algorithms`.")
    advantage: str | dict[str, Any] = detail(
        "group",
        "How rewards become advantages; see `temper list advantages`. A name or {name: {option: value}}. Its default is "
        "the algorithm's.",
    )
    reward: list[str | dict[str, Any]] = detail(
        ..., "[{NAME: {option: value}, weight: 1}]; see `temper list rewards`; or MODULE:FUNCTION.", min_length=1
    )
    classifier: ClassifierRef | None = detail(None, "The classifier that the reward «toxicity» asks.")
    toxic_label: str = detail("toxic", "The classifier's label whose probability is the toxicity.")
    reward_model: RewardRef | None = detail(
        None, "What the reward «model» asks: a stage of kind reward or classifier, a folder, or a hub id (id@revision)."
    )
    reward_label: str | None = detail(None, "Of a reward model with several labels: the one whose logit is the reward.")
    completions: int = detail(8, "Completions of each prompt (k); advantages over a group need 2 or more.", ge=1)
    batch_size: int = detail(8, "Prompts of an optimiser step, with k completions each.", ge=1)
    rollout_steps: int = detail(1, "Optimiser steps that the prompts of one rollout fill.", ge=1)
    iterations: int = detail(1, "Passes over each rollout.", ge=1)
    decoding: Decoding = detail(Decoding(temperature=1.0), "How completions are sampled.")
    rollouts: handover.Rollouts = detail(handover.Rollouts(), "Who samples them: {engine: vllm, url: …} hands the policy to a server.")
    average: algorithms.Average = detail(
        "sequence",
        "sequence: every completion counts alike, by the mean of its tokens (GRPO); sum: by their sum (RLOO, REINFORCE); "
        "constant: by their sum over max_new_tokens (Dr. GRPO); token: every token counts alike (DAPO). Its default is the "
        "algorithm's.",
    )
    mask_cut: bool = detail(False, "Do not train on completions that max_new_tokens cut. On by default in dapo alone.")
    kl: Kl = detail(
        Kl(), "The KL term to the model before training. Its defaults are the algorithm's; these are of grpo."
    )
    collapse: Collapse = detail(Collapse(), "When to warn that variety is lost.", affects_result=False)
    lr: float = detail(1e-5, "Peak learning rate.", gt=0)
    schedule: str | dict[str, Any] = detail(
        "constant", "constant, cosine, linear or wsd, or {name: {option: value}}; see `temper list schedules`."
    )
    row_tokens: int = detail(1024, "Prompts with their completions are packed into rows of this many tokens.", ge=16)
    micro_tokens: int = at_once(1024)
    slots: int = detail(64, "Completions sampled at once.", ge=1, affects_result=False)
    samples: int = detail(4, "Completions of each rollout kept in samples.jsonl.", ge=0, affects_result=False)

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, value: Any) -> Any:
        """What the algorithm sets where the recipe does not."""
        return algorithms.filled(value) if isinstance(value, dict) else value

    @field_validator("decoding", mode="before")
    @classmethod
    def _sampled(cls, value: Any) -> Any:
        """A recipe that sets other options of decoding only still samples."""
        return {"temperature": 1.0, **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _sound(self) -> Rl:
        updates = self.rollout_steps * self.iterations
        batch = self.batch_size * self.accumulation * self.completions * self.rollout_steps
        algorithms.check(
            self.algorithm, self.advantage, self.average, completions=self.completions, batch=batch, updates=updates
        )
        d = self.decoding
        if d.temperature == 0:
            raise RecipeError(
                "greedy sampling gives every prompt k equal completions, whose advantages are all 0",
                where="decoding.temperature",
                do="temperature: 1.0",
            )
        changed = [
            n
            for n in ("top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens")
            if getattr(d, n) != type(d)().__dict__[n]
        ]
        if changed:
            raise RecipeError(
                f"{', '.join(changed)} would sample from another distribution than the one that is trained",
                where=f"decoding.{changed[0]}",
                do="leave it out; temperature may be set, for the policy is scored at the same one",
            )
        handover.check(self.rollouts, self.adapter, self.quantize, d)
        asked = any(p.name == "toxicity" for p in rewards.read(self.reward))
        if self.classifier is not None and not asked:
            raise RecipeError(
                f"classifier: {self.classifier} is named, and no reward asks it",
                where="classifier",
                do="add toxicity to reward, or leave classifier out",
            )
        if self.classifier is None and asked:
            raise RecipeError(
                "the reward «toxicity» asks a classifier", where="reward", do="classifier: STAGE or a hub id"
            )
        asked = any(p.name == "model" for p in rewards.read(self.reward))
        check_reward_model(self.reward_model, self.reward_label, asked=asked, by="the reward «model»")
        return self

    @field_validator("algorithm", "advantage")
    @classmethod
    def _known(cls, value: str | dict[str, Any], info: Any) -> str | dict[str, Any]:
        algorithms.named(policy_losses if info.field_name == "algorithm" else advantages, value, info.field_name)
        return value

    def fingerprint(self, folder: Path) -> dict[str, Any]:
        names = [p.name for p in rewards.read(self.reward) if ":" in p.name]
        return {f"reward {name}": rewards.source_hash(name, folder) for name in names}

    def run(self, job: Job) -> None:
        t = self.train(job)
        finish(job, t.policy, t.tokenizer, t.source, merge=self.merge, ends=t.ends, probe=t.probe)

    def train(self, job: Job, *, rate: float | None = None, tell: bool = True) -> Trained:
        """From the last good checkpoint in the job's folder to the last step.

        Args:
            rate: of the moving average that the policy is held close to; None: to the model before training.
            tell: say before what is about to happen.
        """
        records = read_split(job, self.data, "train")
        experience, source, ends = self.practice(job, records, rate=rate)
        note_trained_on(job, records)
        policy, precision, reference = experience.policy, experience.precision, experience.reference
        follower = reference if rate is not None else None
        loop = Loop(job, policy, self._loss(precision), experience, self, precision, follower=follower)
        experience.wrapped = loop.wrapped
        job.counts["examples"] = len(experience.prompts)
        with contextlib.closing(experience):
            seconds, rows = experience.trial()
            check_start(loop, rows, reference)
            if tell:
                tell_of(job, loop, experience, self.kl, seconds, rows)
            loop.run()
        policy.temperature = 1.0
        return Trained(policy, experience.sampler.tokenizer, source, ends, rows[0])

    def practice(
        self, job: Job, records: Sequence[Record], *, rate: float | None = None
    ) -> tuple[Experience, hub.Source, set[int]]:
        """The policy, opened, with what answers prompts and rewards the answers; where it is from; its end tokens."""
        judge = Judge(job, self.classifier, self.toxic_label).checked() if self.classifier else None
        encoder = encoder_of(job, self.model, self.data)
        ids = encoder.prompts(records)
        warn_of_unknown(job, encoder)
        prompts = [
            Prompt(r, i, encoder.prompt_text(r.row), encoder.reference_text(r.row))
            for r, i in zip(records, ids, strict=True)
        ]
        parts = rewards.read(self.reward, folder=job.recipe.folder)
        longest = max(len(i) for i in ids) + self.decoding.max_new_tokens
        policy, tokenizer, source, precision = open_policy(job, self, longest)
        encoder.end_ids |= set(load.end_ids(policy.inner))
        check_room(policy, prompts, self.decoding.max_new_tokens)
        load.no_dropout(policy.hf)  # a ratio, a reference or a sample under dropout is another policy's
        policy.temperature = self.decoding.temperature
        job.facts["written_as"] = encoder.description
        if self.rollouts.engine == "native":
            with devices.autocast(policy.device, precision):
                sampler: Any = Sampler(policy.hf, tokenizer, end_ids=encoder.end_ids, slots=self.slots)
        else:
            sampler = handover.Handover(
                job, self.rollouts, policy, tokenizer, source, encoder.end_ids, slots=self.slots,
                completions=self.completions, precision=precision,
            )  # fmt: skip
            sampler.prove(ids, self.decoding.max_new_tokens)
        job.facts["sampler"] = sampler.reason
        reference = Reference(policy, rate) if self.kl.beta else None
        experience = Experience(job, policy, sampler, prompts, self._plan(job), parts, judge, reference, precision)
        experience.scores = Rewarder(job, self.reward_model, self.reward_label) if self.reward_model else None
        return experience, source, encoder.end_ids

    def _plan(self, job: Job) -> Plan:
        return Plan(
            prompts=self.batch_size * self.accumulation,
            completions=self.completions,
            steps=self.rollout_steps,
            iterations=self.iterations,
            row_tokens=self.row_tokens,
            micro_tokens=self.micro_tokens,
            decoding=self.decoding,
            advantages=algorithms.configured(advantages, self.advantage, "advantage"),
            compares=algorithms.compares(self.advantage),
            token_weights=self.average == "token",
            mask_cut=self.mask_cut,
            reward_beta=self.kl.beta if self.kl.place == "reward" else 0.0,
            kl_level=self.kl.level,
            kl_one=self.kl.samples == "one",
            seed=job.seed,
            samples=self.samples,
            collapse=self.collapse,
        )

    def _loss(self, precision: str) -> Callable[..., Terms]:
        inner, kl = algorithms.configured(policy_losses, self.algorithm, "algorithm"), self.kl
        if kl.beta and kl.place == "loss":
            inner = with_divergence(inner, kl.beta, kl.estimator, corrected=kl.corrected, level=kl.level)
        if self.average in ("sum", "constant"):
            inner = summed(inner, 1.0 if self.average == "sum" else self.decoding.max_new_tokens)
        # What a server samples was compared as a whole when it came.
        allowed = GAP[precision] if self.rollouts.engine == "native" else max(GAP[precision], 2 * self.rollouts.bound)

        def loss(
            logps: torch.Tensor, weights: torch.Tensor, *, sampled: torch.Tensor, **columns: torch.Tensor
        ) -> Terms:
            if kl.place == "reward":  # they have done their work in the reward
                columns = {n: v for n, v in columns.items() if n not in ("reference", "drawn")}
            terms = inner(logps, weights, **columns)
            gap = (columns.get("old", logps.detach()) - sampled).abs()
            if gap.mean() > allowed:
                raise TrainingError(
                    f"samples do not come from the policy that is trained: a token's log-probability differs by "
                    f"{gap.mean():.2g} nats on average between sampling and training",
                    do="precision: float32, if rounding is the cause; else please report this model",
                )
            return Terms(terms.values, terms.weights, {**terms.extras, "sampling_gap": gap})

        return loss
