"""evaluate: several models on the same rows, with intervals and paired tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from pydantic import field_validator, model_validator

from temper import address, metrics, statistics
from temper.data.card import read_rows
from temper.engine import device as devices
from temper.errors import DataError, ModelError, RecipeError, nearest
from temper.job import Job
from temper.models import load
from temper.recipe import ClassifierRef, Config, DataRef, ModelRef, Recipe, RewardRef, Stage, detail, replica, stages
from temper.rollouts.decoding import Decoding
from temper.runfolder import write_json
from temper.stages import compare, duel, elsewhere, scoring, summary
from temper.stages import judge as judging
from temper.stages.answering import Answering, entry_of
from temper.stages.seen import seen_before
from temper.types import Outputs, Record, Scores


class Expectation(Config):
    """A bound that a score must keep, or the run stops: what comes later would have nothing to show."""

    model: str = detail(..., "One of the models evaluated; with decodings MODEL, WAY.")
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
    version = 5
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
        None, "What the metrics toxicity and style ask: a classifier stage, a folder, or a hub id (id@revision)."
    )
    reward_model: RewardRef | None = detail(
        None, "What the metric reward asks: a stage of kind reward or classifier, a folder, or a hub id (id@revision)."
    )
    reward_label: str | None = detail(None, "Of a reward model with several labels: the one whose logit is the reward.")
    second_reward_model: RewardRef | None = detail(
        None, "A reward model that nothing was trained on, to see whether rewards rise by the first one's faults."
    )
    second_reward_label: str | None = detail(None, "As reward_label, of the second reward model.")
    reference: ModelRef | None = detail(
        None,
        "Of preference_accuracy and margin: the model that implicit rewards are measured from; they are then given too.",
    )
    take: int | None = detail(None, "Only the first so many rows.", ge=1)
    decoding: Decoding = detail(Decoding(), "How answers are decoded.")
    decodings: dict[str, Decoding] = detail(
        {},
        "Several ways to decode, by name, in place of decoding: each model answers by each, and MODEL, WAY is compared with "
        "the other models in that way and with itself in the other ways.",
    )
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
        if self.decodings and "decoding" in self.model_fields_set:
            raise ValueError("decoding and decodings are both given: put it among them, under a name")
        entries = list(self.entries)
        for e in self.expect:
            for what, name, known in (
                ("model", e.model, entries),
                ("metric", e.metric, metrics.names(self.metrics)),
            ):
                if name not in known:
                    raise ValueError(
                        f"expect names the {what} «{name}», which is not evaluated; {nearest(name, known)}"
                    )
        if options := metrics.asks_of_judge(self.metrics):
            duel.check(options, entries)
        judging.check_reward_model(
            self.reward_model,
            self.reward_label,
            asked=metrics.asks_of_reward_model(self.metrics),
            by="the metric reward (or win_rate with judge: reward_model)",
        )
        if self.reference is not None and not metrics.needs_pairs(self.metrics):
            raise ValueError(
                f"reference: {self.reference} is named, and neither preference_accuracy nor margin is asked for"
            )
        if self.reward_model is None and (self.second_reward_model or self.second_reward_label):
            raise ValueError("second_reward_model is named, and no reward_model: there is nothing that it is second to")
        for way in self.ways.values():
            judging.check(asked=asked, classifier=self.classifier, samples=self.samples, decoding=way)
        return self

    @property
    def ways(self) -> dict[str, Decoding]:
        """The ways to decode by name; a single one has none."""
        return self.decodings or {"": self.decoding}

    @property
    def entries(self) -> dict[str, tuple[str, str]]:
        """What is compared, by name → (model, way to decode): way after way, the models in their order."""
        return {entry_of(name, way): (name, way) for way in self.ways for name in self.models}

    @property
    def _needs_weights(self) -> bool:
        return any(needs(self.metrics) for needs in (metrics.needs_likelihood, metrics.needs_pairs, metrics.needs_kl))

    def check(self, recipe: Recipe) -> None:
        for name in self.models:
            served = address.endpoint((recipe.model or "") if name == "base" else name)
            if served and self._needs_weights:
                raise RecipeError(
                    f"metrics of likelihood (loss, perplexity, preference_accuracy, margin, kl) need a model's weights, and {served} gives only text",
                    do="leave them out, or evaluate the endpoint in a stage of its own",
                )

    def run(self, job: Job) -> None:
        records = self._records(job)
        asked = metrics.asks_of_classifier(self.metrics)
        key = (
            "metrics: [{toxicity: {label: …}}]" if "toxicity" in str(self.metrics) else "metrics: [{style: {label: …}}]"
        )
        judge = judging.Judge(job, str(self.classifier), asked["label"], key=key).checked() if asked else None
        rewarders = self._rewarders(job)
        found = {n: replica(n)[0] for n in job.inputs if replica(n)[1] and replica(n)[0] in self.models}
        copies = {entry_of(n, way): entry_of(of, way) for way in self.ways for n, of in found.items()}
        answering = Answering(job, self, records, judge, rewarders)
        outputs = {entry_of(n, way): answering.of(n, way) for n in self.models + list(found) for way in self.ways}
        outputs = {entry: outputs[entry] for entry in [*self.entries, *copies]}
        outputs = self._related(job, answering, outputs)
        shown = self._shown(job)
        outputs = {shown.get(name, name): out for name, out in outputs.items()}
        copies = {name: shown[of] for name, of in copies.items()}
        models = list(shown.values())
        scores = {name: metrics.compute(self.metrics, out) for name, out in outputs.items()}
        self._check_units(job, outputs)
        for notice in dict.fromkeys(s.notice for of in scores.values() for s in of.values() if s.notice):
            job.warn(notice)
        self._write_rows(job, {n: outputs[n] for n in models}, {n: scores[n] for n in models})
        entry = {
            "data": {"name": self._split_name(), "rows": len(records), "sha256": scoring.content(records)},
            "decoding": self.decoding.model_dump()
            if not self.decodings
            else {name: way.model_dump() for name, way in self.decodings.items()},
            "rows": f"{job.name}/rows.parquet",
            "models": {n: compare.values(scores[n], seed=job.seed, resamples=self.resamples) for n in models},
            "comparisons": compare.comparisons(self._compared(shown), scores, seed=job.seed, resamples=self.resamples),
            "spread": compare.spread(scores, copies),
        }
        write_json(job.dir / "evaluation.json", entry)
        job.counts = {"examples": len(records)}  # nothing is trained here
        self._say(job, entry)
        compare.check(self.expect, scores, shown)

    def _shown(self, job: Job) -> dict[str, str]:
        """What is compared, by its name in the recipe → its name in tables."""
        names = elsewhere.labels(job, self.models)
        return {entry: entry_of(names[model], way) for entry, (model, way) in self.entries.items()}

    def _compared(self, shown: dict[str, str]) -> list[tuple[str, str]]:
        """Pairs of names in tables: in each way every model with the first and with the one before it; each model in every
        other way with itself in the first."""
        pairs = [p for way in self.ways for p in compare.in_turn([entry_of(m, way) for m in self.models])]
        first, *others = self.ways
        pairs += [(entry_of(m, first), entry_of(m, way)) for m in self.models for way in others]
        return [(shown[a], shown[b]) for a, b in pairs]

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
        if metrics.needs_pairs(self.metrics):
            scoring.check_preferences(records)
        for name in self.models:
            stage = elsewhere.stage_of(job, name)
            if stage and (again := seen_before(records, stage.path)):
                job.warn(
                    f"{len(again)} of {len(records)} test rows stand in the training data of {name} (the first: {again[0].where}); "
                    "its scores measure memory there"
                )
        return records

    def _related(self, job: Job, answering: Answering, outputs: dict[str, Outputs]) -> dict[str, Outputs]:
        """With what follows from several models at once: rows that one cannot score, a reference, wins."""
        if self.reference is not None:
            pairs, tokens = answering.preferences_of(self.reference)
            told = answering.identity(self.reference)
            for name, out in outputs.items():
                assert out.pairs is not None and out.pair_tokens is not None
                both = ~(np.isnan(pairs) | np.isnan(out.pairs))  # a row that either cannot score says nothing
                if not np.array_equal(tokens[both], out.pair_tokens[both]):
                    raise ModelError(
                        f"{self.reference}, the reference, and {name} have different tokenizers: they count other tokens in the same answers",
                        do="name a reference with the tokenizer of the models that are evaluated, or leave reference out",
                    )
                outputs[name] = dataclasses.replace(out, reference_pairs=pairs, reference=told)
        outputs, apart = scoring.set_apart(outputs, answering.reaches)
        if apart:
            ends = ", ".join(f"{name} at {reach}" for name, reach in answering.reaches.items())
            job.warn(
                f"{apart} of {len(answering.records)} rows are longer than a model can score (positions end: {ends}); they are left out "
                "of loss, perplexity and preferences for all models, and nothing is cut"
            )
            job.facts["rows too long to score"] = apart
        if options := metrics.asks_of_judge(self.metrics):
            shown = self._shown(job)
            fight = duel.Duel(job, **options, shown=shown, concurrency=self.concurrency)
            theirs = outputs[options["against"]]
            for name, out in outputs.items():
                wins = fight.wins(name, out, theirs)
                outputs[name] = dataclasses.replace(out, wins=wins, duel=fight.name(out))
        return outputs

    def _check_units(self, job: Job, outputs: dict[str, Outputs]) -> None:
        """Loss and perplexity count in tokens: two tokenizers are two units."""
        start, first = next(iter(outputs.items()))
        for name, out in outputs.items():
            if out.tokens is not None and first.tokens is not None and not np.array_equal(out.tokens, first.tokens):
                job.warn(
                    f"loss and perplexity of {name} and {start} count different tokens and cannot be compared: their tokenizers differ"
                )

    def _write_rows(self, job: Job, outputs: dict[str, Outputs], scores: dict[str, dict[str, Scores]]) -> None:
        first = next(iter(outputs.values()))
        table: dict[str, Any] = {
            "id": list(range(len(first.references))),
            "prompt": first.prompts,
            "reference": first.references,
        }
        for name, out in outputs.items():
            table[f"{name}|prediction"] = out.predictions
            table[f"{name}|ended"] = out.ended
            if out.tokens is not None:
                table[f"{name}|tokens"] = out.tokens  # what a row's loss weighs: several runs are compared by it
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
