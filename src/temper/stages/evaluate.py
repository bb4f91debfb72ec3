"""evaluate: several models on the same rows, with intervals and paired tests."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from pydantic import field_validator, model_validator

from temper import address, metrics, statistics
from temper.data.card import read_rows
from temper.data.chat import Encoder, is_text
from temper.data.formats import text_of
from temper.engine import device as devices
from temper.errors import DataError, RecipeError, nearest
from temper.job import Job
from temper.models import adapters, load
from temper.models.scores import Policy
from temper.recipe import ClassifierRef, Config, DataRef, ModelRef, Recipe, RewardRef, Stage, detail, replica, stages
from temper.rollouts.decoding import Decoding
from temper.rollouts.sampler import Sampler
from temper.runfolder import Result, read_sealed, write_json, write_sealed
from temper.stages import compare, scoring, summary
from temper.stages import judge as judging
from temper.stages.sft import format_of
from temper.stages.teacher import Served
from temper.stages.training import TRAINED_ON, fingerprint, settle
from temper.types import Outputs, Record, Scores


class Expectation(Config):
    """A bound that a score must keep, or the run stops: what comes later would have nothing to show."""

    model: str = detail(..., "One of the models evaluated.")
    metric: str = detail(..., "The name of a score, such as rougeL or toxicity_mean.")
    at_least: float | None = detail(None, "The score must not be lower.")
    at_most: float | None = detail(None, "The score must not be higher.")

    @model_validator(mode="after")
    def _bounds(self) -> Expectation:
        if self.at_least is None and self.at_most is None:
            raise ValueError("neither at_least nor at_most is given: nothing is expected")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least {self.at_least:g} is above at_most {self.at_most:g}")
        return self


@stages.register("evaluate")
class Evaluate(Stage):
    """Scores with intervals for every model, and paired comparisons with the first and with the one before."""

    kind = "evaluate"
    version = 3
    reads_replicas = True
    reads_split = "test"
    asks = ("models",)

    models: list[ModelRef] = detail(
        ..., "What is compared, in order: stages, base, folders, hub ids, endpoints (URL#MODEL).", min_length=1
    )
    data: DataRef = detail(..., "STAGE or STAGE.SPLIT; without a split: test.")
    metrics: list[str | dict[str, Any]] = detail(
        ["rouge"], "Names, or {name: {option: value}}; see `temper list metrics`.", min_length=1
    )
    classifier: ClassifierRef | None = detail(
        None, "What the metric toxicity asks: a classifier stage, a folder, or a hub id (id@revision)."
    )
    reward_model: RewardRef | None = detail(
        None, "What the metric reward asks: a stage of kind reward or classifier, a folder, or a hub id (id@revision)."
    )
    reward_label: str | None = detail(None, "Of a reward model with several labels: the one whose logit is the reward.")
    second_reward_model: RewardRef | None = detail(
        None, "A reward model that nothing was trained on, to see whether rewards rise by the first one's faults."
    )
    second_reward_label: str | None = detail(None, "As reward_label, of the second reward model.")
    take: int | None = detail(None, "Only the first so many rows.", ge=1)
    decoding: Decoding = detail(Decoding(), "How answers are decoded.")
    samples: int = detail(
        1, "Answers to each prompt. Above 1 toxicity_expected_max reads them all; every other metric the first.", ge=1
    )
    batch_size: int = detail(32, "Answers decoded together.", ge=1, affects_result=False)
    concurrency: int = detail(8, "Requests to an endpoint under way at once.", ge=1, affects_result=False)
    micro_tokens: int = detail(
        4096, "Tokens of one forward pass when references are scored.", ge=16, affects_result=False
    )
    precision: devices.Precision = detail("auto", "float32, bf16, fp16 or auto.")
    attention: load.Attention = detail("auto", "auto, sdpa, eager or flash_attention_2.")
    resamples: int = detail(10_000, "Bootstrap and permutation resamples.", ge=100)
    expect: list[Expectation] = detail([], "Bounds that scores must keep, or the run stops after this stage's work.")

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: list[str | dict[str, Any]]) -> list[str | dict[str, Any]]:
        metrics.read(value, where="metrics")  # an unknown metric is told before hours of training, not after
        return value

    @model_validator(mode="after")
    def _fits(self) -> Evaluate:
        asked = metrics.asks_of_classifier(self.metrics) is not None
        for e in self.expect:
            for what, name, known in (
                ("model", e.model, self.models),
                ("metric", e.metric, metrics.names(self.metrics)),
            ):
                if name not in known:
                    raise ValueError(
                        f"expect names the {what} «{name}», which is not evaluated; {nearest(name, known)}"
                    )
        judging.check_reward_model(
            self.reward_model,
            self.reward_label,
            asked=metrics.asks_of_reward_model(self.metrics),
            by="the metric reward",
        )
        if self.reward_model is None and (self.second_reward_model or self.second_reward_label):
            raise ValueError("second_reward_model is named, and no reward_model: there is nothing that it is second to")
        judging.check(asked=asked, classifier=self.classifier, samples=self.samples, decoding=self.decoding)
        return self

    def check(self, recipe: Recipe) -> None:
        for name in self.models:
            served = address.endpoint((recipe.model or "") if name == "base" else name)
            if served and (metrics.needs_likelihood(self.metrics) or metrics.needs_kl(self.metrics)):
                raise RecipeError(
                    f"metrics of likelihood (loss, perplexity, kl) need a model's weights, and {served} gives only text",
                    do="leave them out, or evaluate the endpoint in a stage of its own",
                )

    def run(self, job: Job) -> None:
        records = self._records(job)
        asked = metrics.asks_of_classifier(self.metrics)
        key = "metrics: [{toxicity: {label: …}}]"
        judge = judging.Judge(job, str(self.classifier), asked["label"], key=key).checked() if asked else None
        rewarders = self._rewarders(job)
        copies = {n: replica(n)[0] for n in job.inputs if replica(n)[1] and replica(n)[0] in self.models}
        outputs: dict[str, Outputs] = {}
        for name in [*self.models, *copies]:
            outputs[name] = self._answers(job, name, records, judge, rewarders)
        scores = {name: metrics.compute(self.metrics, out) for name, out in outputs.items()}
        self._check_units(job, outputs)
        self._write_rows(job, outputs, {n: scores[n] for n in self.models})
        entry = {
            "data": {"name": self._split_name(), "rows": len(records), "sha256": scoring.content(records)},
            "decoding": self.decoding.model_dump(),
            "rows": f"{job.name}/rows.parquet",
            "models": {n: compare.values(scores[n], seed=job.seed, resamples=self.resamples) for n in self.models},
            "comparisons": compare.comparisons(self.models, scores, seed=job.seed, resamples=self.resamples),
            "spread": compare.spread(scores, copies),
        }
        write_json(job.dir / "evaluation.json", entry)
        job.counts = {"examples": len(records)}  # nothing is trained here
        self._say(job, entry)
        compare.check(self.expect, scores)

    def _rewarders(self, job: Job) -> dict[str, judging.Rewarder]:
        """Reward models by what their rewards are called, opened: what is wrong with one is told before anything is decoded."""
        named = {
            "rewards": (self.reward_model, self.reward_label),
            "second_rewards": (self.second_reward_model, self.second_reward_label),
        }
        found = {key: judging.Rewarder(job, ref, label) for key, (ref, label) in named.items() if ref is not None}
        for rewarder in found.values():
            rewarder.model  # noqa: B018  opened
        return found

    def _split_name(self) -> str:
        return self.data if "." in self.data else f"{self.data}.test"

    def _records(self, job: Job) -> list[Record]:
        path = job.rows(self.data, "test")
        if path is None:
            raise DataError(
                f"{self._split_name()} has no rows", do="give that data stage a larger test (or validation) split"
            )
        records = read_rows(path)[: self.take]
        for name in self.models:
            stage = self._stage_of(job, name)
            if stage and (stage.path / TRAINED_ON).is_file():
                seen = set(np.load(stage.path / TRAINED_ON).tolist())
                known = [r for r in records if fingerprint(r) in seen]
                if known:
                    job.warn(
                        f"{len(known)} of {len(records)} test rows stand in the training data of {name} (the first: {known[0].where}); "
                        "its scores measure memory there"
                    )
        return records

    def _answers(
        self,
        job: Job,
        name: str,
        records: list[Record],
        judge: judging.Judge | None,
        rewarders: dict[str, judging.Rewarder],
    ) -> Outputs:
        """What one model answers, kept on disk until the stage is done: a killed run does not decode again."""
        kept = job.dir / "answers" / f"{hashlib.sha256(name.encode()).hexdigest()[:12]}.json"
        found = read_sealed(kept)
        if found is None and kept.is_file():
            job.warn(f"the answers of {name} that were kept are damaged; it answers again")
        if found is not None:
            for warning in found["warnings"]:
                job.warn(warning)
            job.facts.update(found["facts"])
            job.counts.update(found["counts"])
            return scoring.outputs_of(found["outputs"])
        served = job.model(name).endpoint
        out = self._served(job, served, records) if served else self._local(job, name, records)
        wholes = out.pop("wholes")
        for key, rewarder in rewarders.items():
            out[key] = rewarder(wholes).tolist()
        out["reward_models"] = [rewarder.name for rewarder in rewarders.values()]
        if texts := out.pop("texts"):
            out["predictions"] = texts[:: self.samples]
            if judge is not None:
                out["toxicity"] = judge(texts).reshape(-1, self.samples).tolist()
                out["classifier"] = judge.name
            if (cut := out["ended"].count(False)) > len(records) / 2:
                job.warn(
                    f"{cut} of {len(records)} answers of {name} were cut by max_new_tokens "
                    f"({self.decoding.max_new_tokens}): scores of half sentences, or a model that never learnt to stop"
                )
            for odd in summary.oddities(name, scoring.outputs_of(out)):
                job.warn(odd)
        kept.parent.mkdir(exist_ok=True)
        noted = {"warnings": job.warnings, "facts": job.facts, "counts": job.counts}
        write_sealed(kept, {"outputs": out, **noted})
        return scoring.outputs_of(out)

    def _served(self, job: Job, at: address.Address, records: list[Record]) -> dict[str, Any]:
        """What a model behind an endpoint answers: columns of `Outputs`, and all samples as «texts», row by row."""
        teacher = Served(job, at, format_of(job, self.data), self.decoding, concurrency=self.concurrency)
        with job.progress(len(records) * self.samples, f"{at.model} answers") as bar:
            drawn = [teacher.ask(records, range(len(records)), k, bar) for k in range(self.samples)]
        prompts = [text_of(teacher.prompt(r)) or "" for r in records]
        between = "" if teacher.form.chat == "plain" else "\n"  # the plain form has its separator in the prompt
        return scoring.columns(
            prompts=prompts,
            references=[Encoder.reference_text(r.row) for r in records],
            wholes=[f"{prompt}{between}{a.text}" for prompt, a in zip(prompts, drawn[0], strict=True)],
            texts=[a.text for group in zip(*drawn, strict=True) for a in group],
            ended=[a.ended for a in drawn[0]],
        )

    def _local(self, job: Job, name: str, records: list[Record]) -> dict[str, Any]:
        """What a model on this machine answers, as `_served`, and how likely it finds the references."""
        device = devices.setup(job.recipe.device, job.recipe.threads)
        precision = devices.precision(self.precision, device)
        dtype = devices.DTYPES[precision] if device.type == "cuda" else torch.float32
        policy, tokenizer = self._open(job, name, device, dtype)
        encoder = Encoder(tokenizer, format_of(job, self.data), end_ids=load.end_ids(policy.inner))
        self._check_form(job, name, encoder, records)
        encoded = encoder.encode(records)
        context = load.context(policy.inner) or 10**9
        out = scoring.columns(
            prompts=[encoder.prompt_text(r.row) for r in records],
            references=[encoder.reference_text(r.row) for r in records],
        )
        if metrics.needs_text(self.metrics):
            prompts = encoder.prompts(records)
            for record, prompt in zip(records, prompts, strict=True):
                if len(prompt) + self.decoding.max_new_tokens > context:
                    raise DataError(
                        f"a prompt of {len(prompt)} tokens and an answer of up to {self.decoding.max_new_tokens} do not fit the context of {name} ({context})",
                        where=record.where,
                        do="drop: {longer_than: …} with tokenizer: base in the data stage, or smaller decoding.max_new_tokens",
                    )
            with (
                job.progress(len(prompts) * self.samples, f"{name} answers") as bar,
                devices.autocast(device, precision),
            ):
                sampler = Sampler(policy.hf, tokenizer, end_ids=encoder.end_ids, slots=self.batch_size)
                job.say(f"{name} answers: {sampler.reason}")
                drawn = sampler.sample(prompts, self.decoding, completions=self.samples, seed=job.seed, progress=bar)
            ids = [one.ids for group in drawn for one in group]
            first = [group[0] for group in drawn]
            out["texts"] = [t.strip() for t in tokenizer.batch_decode(ids, skip_special_tokens=True)]
            out["ended"] = [one.ended for one in first]
            both = [[*p, *one.ids] for p, one in zip(prompts, first, strict=True)]
            out["wholes"] = tokenizer.batch_decode(both, skip_special_tokens=True)
        if metrics.needs_likelihood(self.metrics) or metrics.needs_kl(self.metrics):
            settle(job, policy, "auto", max(len(e.ids) for e in encoded), device, precision)
        if metrics.needs_likelihood(self.metrics):
            out["nll"], out["tokens"] = scoring.likelihood(policy, encoded, precision, context, name, self.micro_tokens)
        if metrics.needs_kl(self.metrics):
            out["kl_to"] = self.models[0]
            other = None if name == self.models[0] else self._open(job, self.models[0], device, dtype)
            out["kl"] = scoring.divergence(policy, other, tokenizer, prompts, first, precision, self.micro_tokens)
        return out

    def _open(self, job: Job, name: str, device: torch.device, dtype: torch.dtype) -> tuple[Policy, Any]:
        """A model and its tokenizer."""
        source, trust = job.model(name), job.recipe.trust_remote_code
        hf, notices = adapters.open_model(
            source, dtype=dtype, attention=self.attention, device=device, trust_remote_code=trust
        )
        for notice in notices:
            job.warn(notice)
        return Policy(hf), load.tokenizer(source, trust_remote_code=trust)

    def _stage_of(self, job: Job, name: str) -> Result | None:
        return job.inputs.get((job.recipe.model or "") if name == "base" else name)

    def _check_form(self, job: Job, name: str, encoder: Encoder, records: list[Record]) -> None:
        """A model asked in another form than it was trained in answers worse, and nothing else shows it."""
        stage = self._stage_of(job, name)
        trained = stage.info["facts"].get("written_as") if stage else None
        if trained and trained != encoder.description and not is_text(records[0].row):
            job.warn(
                f"{name} was trained on rows written as «{trained}» and is asked in another form «{encoder.description}»: "
                f"give {self.data.partition('.')[0]} the same format as its training data"
            )

    def _check_units(self, job: Job, outputs: dict[str, Outputs]) -> None:
        """Loss and perplexity count in tokens: two tokenizers are two units."""
        first = next(iter(outputs.values()))
        for name, out in outputs.items():
            if out.tokens is not None and first.tokens is not None and not np.array_equal(out.tokens, first.tokens):
                job.warn(
                    f"loss and perplexity of {name} and {self.models[0]} count different tokens and cannot be compared: their tokenizers differ"
                )

    def _write_rows(self, job: Job, outputs: dict[str, Outputs], scores: dict[str, dict[str, Scores]]) -> None:
        first = outputs[self.models[0]]
        table: dict[str, Any] = {
            "id": list(range(len(first.references))),
            "prompt": first.prompts,
            "reference": first.references,
        }
        for name in self.models:
            table[f"{name}|prediction"] = outputs[name].predictions
            table[f"{name}|ended"] = outputs[name].ended
            for metric, s in scores[name].items():
                table[f"{name}|{metric}"] = np.asarray(s.rows, dtype=np.float64)
        pyarrow.parquet.write_table(pyarrow.table(table), job.dir / "rows.parquet")

    def _say(self, job: Job, entry: dict[str, Any]) -> None:
        rows = entry["data"]["rows"]
        level = statistics.ALPHA / (sum(c["p"] is not None for c in entry["comparisons"]) or 1)
        if entry["comparisons"] and 1 / (1 + self.resamples) >= level > 2.0 ** (1 - min(rows, 1000)):
            job.warn(
                f"resamples: {self.resamples} gives no p below {1 / (1 + self.resamples):.2g}, and Holm's correction asks for "
                f"{level:.2g} of the clearest comparison: nothing could be shown; raise resamples or ask fewer metrics"
            )
        job.summary = f"{entry['data']['name']}, {rows:,} rows; 95 % intervals\n{summary.tables(entry)}"
        job.say(job.summary)
