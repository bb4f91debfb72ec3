"""preference: answers that were preferred become likelier than those that were not (DPO and its relatives, KTO)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import field_validator, model_validator

from temper import hub
from temper.data.chat import Encoder, show
from temper.engine.batches import Batches, Pass
from temper.engine.examples import pieces_of
from temper.engine.loop import Loop
from temper.engine.settings import Validated
from temper.errors import RecipeError
from temper.job import Job
from temper.losses.mixtures import parts_of
from temper.models import load
from temper.models.reference import Reference
from temper.models.scores import Policy
from temper.recipe import DataRef, ModelRef, detail, stages
from temper.stages import anchor, couples
from temper.stages.beforehand import summarise
from temper.stages.comparison import Comparison, Objective
from temper.stages.couples import Couple
from temper.stages.seen import note_trained_on
from temper.stages.sft import NO_LIMIT, encoder_of, warn_of_unknown
from temper.stages.training import TrainingStage, finish, open_policy, read_split, scorable
from temper.trees import Row, Tree, rows_of
from temper.types import Record

Read = dict[str, list[Couple]]  # by split


@stages.register("preference")
class Preference(TrainingStage, Validated):
    """Train on pairs of a chosen and a rejected answer, or on answers with a label (kto), held to a reference model."""

    together = True

    kind = "preference"

    data: DataRef = detail(
        ..., "A data stage with prompt, chosen and rejected (text or messages); for kto prompt, completion and label."
    )
    loss: str | dict[str, Any] | list[str | dict[str, Any]] = detail(
        "sigmoid",
        "A name, {name: {option: value}}, or a list of these, each with a weight; see `temper list preference_losses`.",
    )
    reference: ModelRef | None = detail(
        None,
        "The model that the policy is held to; null: what is trained, as it was before (its adapter off, else a frozen copy).",
    )
    reference_kept: bool = detail(
        False,
        "Ask the reference once, before training, and keep its log-probabilities: no copy in memory, no pass a step.",
    )
    max_length: int | None = detail(None, "Longest prompt with an answer, in tokens; null: the model's context.", ge=8)
    too_long: str = detail(
        "drop",
        "What happens to pairs with a longer side: drop (counted), cut (counted), or error. Validation is never cut.",
        pattern="^(drop|cut|error)$",
    )
    dropout: bool = detail(False, "Keep the model's own dropout while training; the reference never has any.")
    falling: float | None = detail(
        0.3,
        "Warn when chosen and rejected answers have both become less likely than at the start by so many nats a token; "
        "null: never.",
        gt=0,
        affects_result=False,
    )
    lr: float = detail(1e-5, "Peak learning rate.", gt=0)

    @field_validator("loss")
    @classmethod
    def _known(cls, value: Any) -> Any:
        Objective.of(value)
        return value

    @model_validator(mode="after")
    def _sound(self) -> Preference:
        objective = Objective.of(self.loss)
        if self.adapter is not None and self.adapter.dropout and not self.dropout:
            raise RecipeError(
                "the adapter has dropout, and dropout: false turns all of it off",
                where="adapter.dropout",
                do="dropout: true, or leave adapter.dropout out",
            )
        if self.dropout and objective.coupled:
            raise RecipeError(
                "the slopes of a loss of the whole step cannot be taken under dropout, which another pass draws anew",
                where="dropout",
                do="dropout: false, or a loss of single pairs",
            )
        if objective.pairs is None and self.batch_size * self.accumulation < 2:
            raise RecipeError(
                "kto measures each answer against others of its step, and there is only one",
                where="batch_size",
                do="batch_size: 2 or more",
            )
        if objective.reference_free and (self.reference is not None or self.reference_kept):
            name = " + ".join(p.name for p in parts_of(self.loss))
            raise RecipeError(
                f"the loss {name} reads no reference",
                where="reference" if self.reference is not None else "reference_kept",
                do="leave it out",
            )
        return self

    def run(self, job: Job) -> None:
        objective = Objective.of(self.loss)
        records = {s: read_split(job, self.data, s, optional=s != "train") for s in ("train", "validation")}
        encoder = encoder_of(job, self.model, self.data)
        read = self._read(job, objective, records, encoder)
        warn_of_unknown(job, encoder)
        policy, tokenizer, source, precision = open_policy(
            job, self, max(c.length for some in read.values() for c in some)
        )
        if not self.dropout:
            load.no_dropout(policy.hf)  # a reference, or a ratio, under dropout is another model's
        kept, lines = self._fit(job, policy, read)
        job.facts["written_as"] = encoder.description
        note_trained_on(job, records["train"])
        trees = {s: couples.trees(some) for s, some in kept.items()}
        score, anchored = self._reference(job, objective, policy, tokenizer, precision, kept)
        if score is not None:
            trees = self._asked(job, score, policy, precision, trees)
        if self.reference_kept:
            score = None  # of the model nothing is needed any more
        comparison = Comparison(job, policy, objective, score, precision, falling=self.falling, anchored=anchored)
        lane = policy.lane(self.row_tokens)
        how = (self.batch_size * self.accumulation, lane, self.micro_tokens, job.seed)
        batches = Prepared(trees["train"], *how, prepare=comparison.prepared)
        validation = rows_of(trees["validation"], lane, self.micro_tokens)
        loop = Loop(
            job, policy, comparison.loss, batches, self, precision, validation,
            follower=comparison, pieces=pieces_of(tokenizer),
        )  # fmt: skip
        job.counts["examples"] = len(trees["train"])
        first = batches.rows(0)[0]
        if not objective.reference_free:
            self._check(job, loop, comparison.with_reference(first), anchored)
        lines += [f"written as: {encoder.description}", self._shared(policy, trees["train"])]
        summarise(job, loop, lines, trees["train"], self._shown(kept["train"][0], tokenizer))
        loop.run()
        finish(job, policy, tokenizer, source, merge=self.merge, ends=encoder.end_ids, probe=first)

    def _read(self, job: Job, objective: Objective, records: dict[str, list[Record]], encoder: Encoder) -> Read:
        """Rows as couples, by split."""
        if objective.pairs is not None:
            return {s: couples.paired(some, encoder) if some else [] for s, some in records.items()}
        found = {s: couples.unpaired(some, encoder, job.seed) if some else [] for s, some in records.items()}
        couples.check_labels(found["train"])
        if len(found["validation"]) == 1:
            job.warn("kto measures answers against one another, and validation has one row: it is left out")
            found["validation"] = []
        return found

    def _fit(self, job: Job, policy: Policy, read: Read) -> tuple[Read, list[str]]:
        """The couples that are trained on and those for validation, which are never cut; and a line on them.

        Couples for validation past the model's context are scored in full wherever positions go on.
        """
        context = load.context(policy.inner) or NO_LIMIT
        limit = min(self.max_length or NO_LIMIT, context)
        train, note = couples.fitted(couples.lent(read["train"], limit), limit, self.too_long, context=context)
        held = couples.lent(read["validation"], context)
        within = scorable(job, policy, [c.length for c in held])
        whole = [c for c, can in zip(held, within, strict=True) if can and couples.comparable(c)]
        if dropped := len(read["train"]) - len(train):
            job.facts["dropped as too long"] = dropped
        if moved := sum(c.first.moved_seam or c.second.moved_seam for c in train):
            job.warn(
                f"the tokenizer merges across the seam of prompt and answer in {moved} of {len(train)} rows; "
                "there the scored part begins a token earlier"
            )
        line = f"rows: {len(read['train']):,} in, {len(train):,} trained on; {note}; {len(whole):,} for validation"
        return {"train": train, "validation": whole}, [line]

    def _reference(
        self,
        job: Job,
        objective: Objective,
        policy: Policy,
        tokenizer: Any,
        precision: str,
        kept: Read,
    ) -> tuple[Callable[[Row], torch.Tensor] | None, bool]:
        """What gives the reference's log-probabilities, and whether that is the policy as it is at the start."""
        if objective.reference_free:
            job.facts["reference"] = "none: the loss reads none"
            return None, False
        if self.reference is None or anchor.same_model(job, self.reference, self.model):
            own = policy if self.reference_kept else Reference(policy)  # untrained as yet, it is its own reference
            how = "adapter off" if self.adapter is not None else "a frozen copy"
            job.facts["reference"] = (
                f"the model before training ({'asked once, and kept' if self.reference_kept else how})"
            )
            return own, True
        longest = {s: max((c.length for c in some), default=0) for s, some in kept.items()}
        job.facts["reference"] = self.reference + (" (asked once, and kept)" if self.reference_kept else "")
        return anchor.opened(job, self, self.reference, tokenizer, policy, precision, longest), False

    def _asked(
        self,
        job: Job,
        score: Callable[[Row], torch.Tensor],
        policy: Policy,
        precision: str,
        trees: dict[str, list[Tree]],
    ) -> dict[str, list[Tree]]:
        """Trees with the column `reference`: those of validation, and where it is kept those of train, from its file."""
        sizes = (policy.lane(self.row_tokens), self.micro_tokens)
        if not self.reference_kept:
            found = anchor.ask(score, policy, trees["validation"], precision, sizes)
            return {**trees, "validation": anchor.with_column(trees["validation"], found)}
        file = job.dir / anchor.KEPT
        key = anchor.key_of(hub.identity(job.model(self.reference or self.model)), precision, policy.layout, trees)
        kept = anchor.read_kept(file, key)
        if kept is None:
            if file.is_file():
                job.warn("the log-probabilities of the reference that were kept are damaged; they are computed anew")
            kept = {s: anchor.ask(score, policy, some, precision, sizes) for s, some in trees.items()}
            anchor.write_kept(file, kept, key)
        return {s: anchor.with_column(some, kept[s]) for s, some in trees.items()}

    def _check(self, job: Job, loop: Loop, row: Row, anchored: bool) -> None:
        if anchored:
            job.facts["start"] = "reference " + anchor.check_start(loop, row, dropout=self.dropout)
            if self.dropout:
                job.warn("dropout is on while training: the loss does not start where policy and reference are equal")
        else:
            job.facts["start"] = f"the reference is {anchor.distance(loop, row)}"
        job.say(str(job.facts["start"]))

    def _shared(self, policy: Policy, trees: Sequence[Tree]) -> str:
        every = sum(len(t.path(0)) + len(t.path(1)) for t in trees)
        saved = 1 - sum(len(t) for t in trees) / every
        if policy.layout != "tree":
            return "each answer is computed with its prompt"
        return f"prompts are computed once for both answers: {saved:.0%} of all tokens saved"

    def _shown(self, couple: Couple, tokenizer: Any) -> str:
        names = ("chosen", "rejected") if couple.desirable is None else ("answer", "another row's")
        if couple.desirable is not None:
            names = (f"answer ({'wanted' if couple.desirable else 'unwanted'})", names[1])
        parts = zip(names, (couple.first, couple.second), strict=True)
        return "\n".join(f"{name}: {show(tokenizer, one, 700)}" for name, one in parts)


@dataclasses.dataclass(frozen=True)
class Prepared(Batches):
    """Batches whose rows are given further columns before a step trains on them."""

    prepare: Callable[[Sequence[Row], Sequence[bool]], list[Row]]

    def prepared(self, passes: Sequence[Pass]) -> list[Pass]:
        rows, counts = [row for row, _ in passes], [counts for _, counts in passes]
        return list(zip(self.prepare(rows, counts), counts, strict=True))
