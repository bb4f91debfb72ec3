"""sft: supervised fine-tuning on prompts and answers, conversations or plain text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from temper.data.chat import Encoded, Encoder, show
from temper.data.forms import Format, is_text
from temper.engine.batches import Batches
from temper.engine.chains import Chains
from temper.engine.examples import pieces_of
from temper.engine.loop import Loop
from temper.engine.settings import Validated
from temper.engine.streaming import Streaming
from temper.errors import DataError, RecipeError
from temper.job import Job
from temper.losses import nll
from temper.models import adapted, load
from temper.models.scores import Policy
from temper.recipe import DataRef, detail, stages
from temper.rollouts.decoding import Decoding
from temper.rollouts.sampler import Sampler
from temper.stages.beforehand import summarise
from temper.stages.seen import note_trained_on
from temper.stages.streaming import Encoding, streams
from temper.stages.training import TrainingStage, finish, open_policy, read_split, scorable
from temper.trees import Tree, chain, rows_of
from temper.types import Record

NO_LIMIT = 10**9  # tokens


@stages.register("sft")
class Sft(TrainingStage, Validated):
    """Maximise the likelihood of the answers given their prompts; only answers are trained on."""

    together = True
    streams = True

    kind = "sft"
    version = 2

    data: DataRef = detail(..., "A data stage whose rows are prompt–completion, messages or text.")
    max_length: int | None = detail(None, "Longest example in tokens; null: the model's context.", ge=8)
    max_prompt: int | None = detail(
        None, "Of an encoder–decoder: longest prompt in tokens, end token included; null: the model's context.", ge=2
    )
    max_answer: int | None = detail(None, "Of an encoder–decoder: longest answer in tokens, likewise.", ge=2)
    too_long: str = detail(
        "drop",
        "What happens to longer ones: drop (counted), cut (counted), or error. A prompt that is cut keeps its end token, an "
        "answer loses it: a model should not learn to stop in the middle.",
        pattern="^(drop|cut|error)$",
    )
    samples: int = detail(
        2, "Answers to so many validation prompts, written at each validation.", ge=0, affects_result=False
    )

    def run(self, job: Job) -> None:
        stream = Encoding(job, self.data, self._encoder(job), self) if streams(job, self.data) else None
        records = [] if stream is not None else read_split(job, self.data, "train")
        held = read_split(job, self.data, "validation", optional=True)
        encoder = self._encoder(job)
        encoded, moved = in_chains(encoder, records)
        held_encoded = encoder.encode(held)
        warn_of_unknown(job, encoder)
        longest = stream.longest() if stream is not None else int(encoded.sizes.max())
        policy, tokenizer, source, precision = open_policy(
            job, self, max([longest, *(len(e.ids) for e in held_encoded)]), tokenizer=encoder.tokenizer, grow=encoder.tokens > 0
        )
        if encoder.tokens:
            job.facts["special tokens added"] = ", ".join(encoder.form.speakers.values())
        within = scorable(job, policy, [e.length for e in held_encoded])
        held_trees = [tree_of(e) for e, can in zip(held_encoded, within, strict=True) if can]
        lane = policy.lane(self.row_tokens)
        validation = rows_of(held_trees, lane, self.micro_tokens)
        sampler, pieces = self._sampler(job, policy, encoder, held), pieces_of(tokenizer)
        batches: Batches | Streaming
        if stream is not None:
            batches = stream.batches(job, lane, lambda chains: self._fitted(chains, policy)[0])
            trees, first, line = batches.first(), stream.first_record(), stream.described(batches)
        else:
            (trees, note), first = self._fitted(encoded, policy), records[0]
            line = f"rows: {len(records):,} in, {len(trees):,} trained on; {note}"
            note_trained_on(job, records)
            batches = Batches(trees, self.batch_size * self.accumulation, lane, self.micro_tokens, job.seed)
        written = "the text and an end token" if is_text(first.row) else encoder.description
        if not is_text(first.row):
            job.facts["written_as"] = encoder.description
        loop = Loop(job, policy, nll, batches, self, precision, validation, sampler, pieces=pieces)
        job.counts["examples"] = len(trees)
        lines = [f"{line}; {len(held_trees):,} for validation", f"written as: {written}"]
        summarise(job, loop, lines, trees, show(tokenizer, encoder.encode([first])[0]))
        if moved := moved or (stream.moved if stream is not None else 0):
            job.warn(
                f"the tokenizer merges across the seam of prompt and answer in {moved} of {len(encoded) or len(trees)} rows; "
                "there the trained part begins a token earlier"
            )
        probe = batches.rows(0)[0]
        loop.run()
        if stream is not None:
            stream.tell(job)
        finish(job, policy, tokenizer, source, merge=self.merge, ends=encoder.end_ids, probe=probe)

    def _encoder(self, job: Job) -> Encoder:
        return encoder_of(job, self.model, self.data, teach=self.adapter is None)

    def _fitted(self, encoded: Chains, policy: Policy) -> tuple[Chains, str]:
        """The examples that are trained on, and a sentence on the others.

        Raises:
            RecipeError: a limit that is not of this kind of model.
        """
        context = (load.context(policy.inner) or NO_LIMIT) - adapted.virtual(policy.hf)
        if policy.apart != (self.max_length is None) and (self.max_length or self.max_prompt or self.max_answer):
            kind = (
                "an encoder–decoder reads a prompt and writes an answer"
                if policy.apart
                else "prompt and answer are one"
            )
            raise RecipeError(
                f"{kind}: {'max_length' if policy.apart else 'max_prompt or max_answer'} is no limit of this model",
                do="set max_prompt and max_answer" if policy.apart else "set max_length, of both together",
            )
        if not policy.apart:
            return fitted(encoded, min(self.max_length or NO_LIMIT, context), self.too_long, context=context)
        limits = min(self.max_prompt or NO_LIMIT, context), min(self.max_answer or NO_LIMIT, context)
        return fitted_apart(encoded, *limits, self.too_long)

    def _sampler(
        self, job: Job, policy: Policy, encoder: Encoder, held: list[Record]
    ) -> Callable[[], list[dict[str, str]]] | None:
        """Greedy answers to the first validation prompts, for samples.jsonl."""
        shown = [r for r in held if not is_text(r.row)][: self.samples]
        if not shown:
            return None
        if job.world.parallel == "fsdp":  # it would take the whole model on every process, and may be one that fits on none
            job.say("no samples are written: the model's weights are spread over processes, and writing takes all of them")
            return None

        tok = encoder.tokenizer
        sampler = Sampler(policy.hf, tok, end_ids=encoder.end_ids)

        def sample() -> list[dict[str, str]]:
            answers = [one for (one,) in sampler.sample(encoder.prompts(shown), Decoding(max_new_tokens=64))]
            return [
                {
                    "prompt": encoder.prompt_text(r.row),
                    "completion": tok.decode(a.ids, skip_special_tokens=True).strip(),
                    "reference": encoder.reference_text(r.row),
                }
                for r, a in zip(shown, answers, strict=True)
            ]

        return sample


def format_of(job: Job, ref: str) -> Format:
    """How the rows of a data stage are written out: declared there, so training and evaluation cannot differ.

    Rows that `generate` wrote anew are written out as those it read, unless it says otherwise.
    """
    stage: Any = job.recipe.stages[ref.partition(".")[0]]
    while stage.format is None:
        stage = job.recipe.stages[stage.data]
    return stage.format  # type: ignore[no-any-return]


def encoder_of(job: Job, model: str, data: str, *, teach: bool = False) -> Encoder:
    """What writes the rows of a data stage out for a model; `teach`: that is trained on them as a whole."""
    source, trust = job.model(model), job.recipe.trust_remote_code
    apart = load.configuration(source, trust_remote_code=trust).is_encoder_decoder
    tokenizer = load.tokenizer(source, trust_remote_code=trust)
    return Encoder(tokenizer, format_of(job, data), apart=apart, teach=teach)


def warn_of_unknown(job: Job, encoder: Encoder) -> None:
    """Tell of characters that the tokenizer does not know, and of special tokens spelt out in what is said; ModelError where
    the former are many."""
    if encoder.intruders:
        found = ", ".join(f"{token} in {n:,}" for token, n in encoder.intruders.most_common(3))
        job.warn(
            f"special tokens of the tokenizer stand in what is said ({found} conversations): the model reads them as tokens. "
            'drop: {contains: ["…"]} takes such rows out'
        )
    if text := encoder.unknown.told():
        job.warn(text)


def tree_of(example: Encoded) -> Tree:
    return chain(example.ids, example.trained, example.where)


def in_chains(encoder: Encoder, records: Sequence[Record]) -> tuple[Chains, int]:
    """All rows encoded, and how many have a seam that moved."""
    chains, moved = Chains(), 0
    for one in encoder.each(records):
        chains.add(one.ids, one.trained, one.where)
        moved += one.moved_seam
    return chains, moved


def bounds(limit: int, context: int | None) -> tuple[str, str]:
    """A limit on length in words, and what would let longer examples in.

    Args:
        context: the model's; a limit that it sets cannot be raised.
    """
    if limit == context:
        return f"the {limit} tokens of the model's context", "a model that takes more"
    return f"{limit} tokens", "a larger max_length"


def fitted(encoded: Chains, limit: int, too_long: str, *, context: int | None = None) -> tuple[Chains, str]:
    """Examples within `limit` tokens, and a sentence on those that were not.

    Args:
        context: see `bounds`.

    Raises:
        DataError: nothing is left, or `too_long: error` met a long one.
    """
    long, (reach, more) = np.flatnonzero(encoded.sizes > limit), bounds(limit, context)
    if len(long) and too_long == "error":
        raise DataError(
            f"{len(long):,} of {len(encoded):,} examples are longer than {reach}",
            where=encoded.sequence(int(long[0]))[2],
            do=f"too_long: drop or cut, or {more}",
        )
    kept = encoded.within(limit, cut=too_long == "cut")
    if not len(kept):
        raise DataError(
            f"no example fits into {reach} (the shortest has {encoded.sizes.min()})",
            do=f"{more}, or too_long: cut",
        )
    if not len(long):
        return kept, f"none longer than {limit} tokens" if limit < NO_LIMIT else "no limit on length"
    note = f"{len(long):,} longer than {limit} tokens {'cut' if too_long == 'cut' else 'dropped'}"
    lost = len(encoded) - len(kept)
    return kept, note + (f" ({lost} of them had no answer left)" if too_long == "cut" and lost else "")


def fitted_apart(encoded: Chains, prompt: int, answer: int, too_long: str) -> tuple[Chains, str]:
    """`fitted` for an encoder–decoder, whose prompts and answers have a limit each, in tokens."""
    prompts = encoded.before
    answers = encoded.sizes - prompts
    long = np.flatnonzero((prompts > prompt) | (answers > answer))
    counted = f"{int((prompts > prompt).sum()):,} prompts longer than {prompt} tokens, {int((answers > answer).sum()):,} answers longer than {answer}"
    if not len(long):
        return encoded, "no prompt and no answer too long"
    if too_long == "error":
        raise DataError(
            counted, where=encoded.sequence(int(long[0]))[2], do="too_long: drop or cut, or a larger max_prompt or max_answer"
        )  # fmt: skip
    kept = encoded.within_apart(prompt, answer, cut=too_long == "cut")
    if not len(kept):
        raise DataError(f"no example fits: {counted}", do="a larger max_prompt or max_answer, or too_long: cut")
    return kept, f"{counted}: {'cut' if too_long == 'cut' else f'{len(long):,} examples dropped'}"
