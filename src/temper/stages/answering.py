"""What each model of an evaluation gives on its rows: answers, likelihoods, preferences. Kept on disk model by model until
the stage is done: a killed run asks nothing again."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from temper import hub, metrics
from temper.address import Address
from temper.data.chat import Encoder
from temper.data.formats import text_of
from temper.data.forms import is_text
from temper.engine import device as devices
from temper.errors import DataError, ModelError
from temper.job import Job
from temper.models import adapted, adapters, load
from temper.models.scores import Policy
from temper.rollouts.decoding import Decoding
from temper.rollouts.sampler import Sampler
from temper.runfolder import read_sealed, write_sealed
from temper.stages import couples, elsewhere, judge, scoring, summary
from temper.stages.sft import format_of, warn_of_unknown
from temper.stages.teacher import Served
from temper.stages.training import settle
from temper.types import Outputs, Record

if TYPE_CHECKING:
    from temper.stages.evaluate import Evaluate

Columns = dict[str, Any]  # of `Outputs`, as JSON holds them
NO_LIMIT = 10**9


def entry_of(model: str, way: str) -> str:
    """What a model that decodes in a way is called in an evaluation."""
    return f"{model}, {way}" if way else model


class Answering:
    """Asks the models of one evaluation.

    Args:
        records: its rows as they are; of a preference the chosen answer is the reference of metrics of text.
        toxicity: what scores answers for the metric of that name.
        rewarders: column of `Outputs` → the reward model that fills it.

    `reaches` says of each model opened so far how long a sequence it can score; None where there is no end.
    """

    def __init__(
        self,
        job: Job,
        stage: Evaluate,
        records: Sequence[Record],
        toxicity: judge.Judge | None,
        rewarders: dict[str, judge.Rewarder],
    ) -> None:
        self.job, self.stage, self.toxicity, self.rewarders = job, stage, toxicity, rewarders
        self.rows = list(records)
        self.records = [scoring.preferred(r) for r in records]
        self.paired = "chosen" in records[0].row
        self.reaches: dict[str, int | None] = {}
        self.opened: dict[str, Opened] = {}
        self.of = functools.cache(self._of)
        self.scores = functools.cache(self._scored)

    def preferences_of(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of both answers [N, 2] under a model that need not be evaluated, and their tokens [N, 2]."""
        if name in self.stage.models:
            out = self.of(name, next(iter(self.stage.ways)))
            assert out.pairs is not None and out.pair_tokens is not None
            return out.pairs, out.pair_tokens
        found = self._kept(f"reference {name}", lambda: self._scored(name))
        return np.array(found["pairs"], np.float64), np.array(found["pair_tokens"], np.int64)

    def identity(self, name: str) -> str:
        """Which model it is, wherever it lies."""
        return f"{elsewhere.label(self.job, name)}@{hub.identity(self.job.model(name))[:12]}"

    def _of(self, name: str, way: str) -> Outputs:
        """What one model gives when it decodes in one of the stage's ways."""
        return scoring.outputs_of(self._kept(f"{name}|{way}", lambda: self._asked(name, way)))

    def _kept(self, name: str, ask: Any) -> Columns:
        """What was asked of a model before, or is now."""
        kept = self.job.dir / "answers" / f"{hashlib.sha256(name.encode()).hexdigest()[:12]}.json"
        found = read_sealed(kept)
        if found is None and kept.is_file():
            self.job.warn(f"the answers of {name.strip('|')} that were kept are damaged; it answers again")
        if found is None:
            columns = ask()
            kept.parent.mkdir(exist_ok=True)
            noted = {"warnings": self.job.warnings, "facts": self.job.facts, "counts": self.job.counts}
            write_sealed(kept, {"outputs": columns, "reaches": self.reaches, **noted})
            return columns
        for warning in found["warnings"]:
            self.job.warn(warning)
        self.job.facts.update(found["facts"])
        self.job.counts.update(found["counts"])
        self.reaches |= found["reaches"]
        return found["outputs"]

    def _asked(self, name: str, way: str) -> Columns:
        served, decoding = self.job.model(name).endpoint, self.stage.ways[way]
        out = self._served(served, decoding) if served else self._local(name, decoding)
        wholes = out.pop("wholes")
        for key, rewarder in self.rewarders.items():
            out[key] = rewarder(wholes).tolist()
        out["reward_models"] = [rewarder.name for rewarder in self.rewarders.values()]
        if texts := out.pop("texts"):
            out["predictions"] = texts[:: self.stage.samples]
            if self.toxicity is not None:
                out["toxicity"] = self.toxicity(texts).reshape(-1, self.stage.samples).tolist()
                out["classifier"] = self.toxicity.name
            if (cut := out["ended"].count(False)) > len(self.records) / 2:
                self.job.warn(
                    f"{cut} of {len(self.records)} answers of {entry_of(name, way)} were cut by max_new_tokens "
                    f"({decoding.max_new_tokens}): scores of half sentences, or a model that never learnt to stop"
                )
            for odd in summary.oddities(entry_of(name, way), scoring.outputs_of(out)):
                self.job.warn(odd)
        return out

    def _served(self, at: Address, decoding: Decoding) -> Columns:
        """What a model behind an endpoint answers: columns of `Outputs`, and all samples as «texts», row by row."""
        stage = self.stage
        teacher = Served(
            self.job, at, format_of(self.job, stage.data), decoding, concurrency=stage.concurrency
        )  # fmt: skip
        with self.job.progress(len(self.records) * stage.samples, f"{at.model} answers") as bar:
            drawn = [teacher.ask(self.records, range(len(self.records)), k, bar) for k in range(stage.samples)]
        prompts = [text_of(teacher.prompt(r)) or "" for r in self.records]
        between = "" if teacher.form.chat == "plain" else "\n"  # the plain form has its separator in the prompt
        return scoring.columns(
            prompts=prompts,
            references=[Encoder.reference_text(r.row) for r in self.records],
            wholes=[f"{prompt}{between}{a.text}" for prompt, a in zip(prompts, drawn[0], strict=True)],
            texts=[a.text for group in zip(*drawn, strict=True) for a in group],
            ended=[a.ended for a in drawn[0]],
        )

    def _local(self, name: str, decoding: Decoding) -> Columns:
        """What a model on this machine answers, as `_served`, and what it scores."""
        stage, opened = self.stage, self._open(name)
        self._check_form(name, opened.encoder)
        out = scoring.columns(
            prompts=[opened.encoder.prompt_text(r.row) for r in self.records],
            references=[opened.encoder.reference_text(r.row) for r in self.records],
        )
        prompts, first = [], []
        if metrics.needs_text(stage.metrics):
            prompts, first, written = self._written(name, opened, decoding)
            out |= written
        if metrics.needs_likelihood(stage.metrics) or metrics.needs_pairs(stage.metrics):
            out |= self.scores(name)
        if metrics.needs_kl(stage.metrics):
            start, precision = stage.models[0], opened.precision
            out["kl_to"] = elsewhere.label(self.job, start)
            other = None if name == start else self._load(start)
            to = None if other is None else (other.policy, other.encoder.tokenizer)
            self._settle(opened, max(len(p) + len(a.ids) for p, a in zip(prompts, first, strict=True)))
            tokenizer, tokens = opened.encoder.tokenizer, stage.micro_tokens
            out["kl"] = scoring.divergence(opened.policy, to, tokenizer, prompts, first, precision, tokens)
        return out

    def _written(self, name: str, opened: Opened, decoding: Decoding) -> tuple[list[list[int]], list[Any], Columns]:
        """Prompts as token ids, the first answer to each, and all answers as columns."""
        stage, tokenizer = self.stage, opened.encoder.tokenizer
        hf, new, virtual = opened.policy.inner, decoding.max_new_tokens, adapted.virtual(opened.policy.hf)
        prompts = opened.encoder.prompts(self.records)
        warn_of_unknown(self.job, opened.encoder)
        for record, prompt in zip(self.records, prompts, strict=True):
            if not load.has_room(hf, virtual + len(prompt), new):
                raise DataError(
                    f"a prompt of {len(prompt)} tokens and an answer of up to {new} do not fit the context of {name} ({load.context(hf)})",
                    where=record.where,
                    do="drop: {longer_than: …} with tokenizer: base in the data stage, or smaller decoding.max_new_tokens",
                )
        with (
            self.job.progress(len(prompts) * stage.samples, f"{name} answers") as bar,
            devices.autocast(opened.policy.device, opened.precision),
        ):
            sampler = Sampler(opened.policy.hf, tokenizer, end_ids=opened.encoder.end_ids, slots=stage.batch_size)
            self.job.say(f"{name} answers: {sampler.reason}")
            drawn = sampler.sample(
                prompts, decoding, completions=stage.samples, seed=self.job.seed, progress=bar
            )  # fmt: skip
        ids = [one.ids for group in drawn for one in group]
        first = [group[0] for group in drawn]
        both = [[*p, *one.ids] for p, one in zip(prompts, first, strict=True)]
        return prompts, first, {
            "texts": [t.strip() for t in tokenizer.batch_decode(ids, skip_special_tokens=True)],
            "ended": [one.ended for one in first],
            "wholes": tokenizer.batch_decode(both, skip_special_tokens=True),
        }  # fmt: skip

    def _scored(self, name: str) -> Columns:
        """How probable a model finds the references; of preferences both answers. Rows past the context are scored in full
        wherever positions go on."""
        opened = self._open(name)
        pairs = couples.paired(self.rows, opened.encoder) if self.paired else []
        encoded = [] if pairs else opened.encoder.encode(self.records)
        longest = max([*(c.length for c in pairs), *(e.length for e in encoded)])
        context = load.context(opened.policy.inner) or NO_LIMIT
        reach = load.reach(opened.policy.inner) if longest > context else None
        if reach is not None:
            self.reaches[name] = reach
        elif longest > context:
            lengths = [c.length for c in pairs] or [e.length for e in encoded]
            self.job.warn(
                f"{sum(n > context for n in lengths)} of {len(lengths)} rows are longer than the context of {name} ({context} "
                "tokens; its positions go on, so they are scored in full, farther than it was trained to look)"
            )
        self._settle(opened, min(longest, reach or NO_LIMIT))
        policy, precision, tokens = opened.policy, opened.precision, self.stage.micro_tokens
        if pairs:
            return scoring.preferences(policy, pairs, precision, reach or NO_LIMIT, tokens)
        return scoring.likelihood(policy, encoded, precision, reach or NO_LIMIT, tokens)

    def _settle(self, opened: Opened, longest: int) -> None:
        """Choose the layout by proof, once a model."""
        if not opened.settled:
            settle(self.job, opened.policy, "auto", longest, opened.policy.device, opened.precision)
            opened.settled = True

    def _open(self, name: str) -> Opened:
        """One model is in memory at a time, asked in all ways before the next."""
        if name not in self.opened:
            self.opened.clear()
            self.opened[name] = self._load(name)
        return self.opened[name]

    def _load(self, name: str) -> Opened:
        stage, job = self.stage, self.job
        device = devices.of(job.recipe)
        precision = devices.precision(stage.precision, device)
        dtype = devices.DTYPES[precision] if device.type == "cuda" else torch.float32
        source, trust = job.model(name), job.recipe.trust_remote_code
        if source.endpoint:
            raise ModelError(
                f"{source.endpoint} gives only text, and its weights are needed", do="name a model's weights"
            )
        hf, notices = adapters.open_model(
            source, dtype=dtype, attention=stage.attention, device=device, trust_remote_code=trust
        )
        for notice in notices:
            job.warn(notice)
        policy = Policy(hf)
        tokenizer = load.tokenizer(source, trust_remote_code=trust)
        encoder = Encoder(tokenizer, format_of(job, stage.data), end_ids=load.end_ids(policy.inner), apart=policy.apart)
        return Opened(policy, encoder, precision)

    def _check_form(self, name: str, encoder: Encoder) -> None:
        """A model asked in another form than it was trained in answers worse, and nothing else shows it."""
        made = elsewhere.stage_of(self.job, name)
        trained = made.info["facts"].get("written_as") if made else None
        if trained and trained != encoder.description and not is_text(self.records[0].row):
            self.job.warn(
                f"{name} was trained on rows written as «{trained}» and is asked in another form «{encoder.description}»: "
                f"give {self.stage.data.partition('.')[0]} the same format as its training data"
            )


@dataclasses.dataclass
class Opened:
    """A model in memory, what writes rows out for it, and in what precision it computes."""

    policy: Policy
    encoder: Encoder
    precision: str
    settled: bool = False
