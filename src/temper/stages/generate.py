"""generate: a teacher writes each row anew after an instruction, or new rows from a few (grow)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import field_validator, model_validator

from temper.data import formats
from temper.data.card import card, read_rows, write_data
from temper.data.forms import Format
from temper.data.grow import Seen, examples
from temper.data.reject import Reject
from temper.data.sources import Source
from temper.data.split import Splits, leaks
from temper.data.templates import columns, fill
from temper.engine import device as devices
from temper.errors import DataError, RecipeError
from temper.job import Job
from temper.models import load
from temper.recipe import ClassifierRef, DataRef, ModelRef, Recipe, Stage, detail, stages
from temper.rollouts.decoding import Decoding
from temper.runfolder import write_json
from temper.stages.asking import Asking
from temper.stages.judge import Judge
from temper.stages.streaming import TEMPLATES
from temper.stages.teacher import Local, Served, Teacher
from temper.types import Record

SPLITS = ("train", "validation", "test")
KINDS = (("text",), ("messages",), ("prompt", "completion", "chosen", "rejected", "label"))  # columns that go together
TEMPERATURE = 0.8  # a teacher is sampled from: a second try must be able to differ
NEAR = 0.8  # Jaccard similarity from which a grown row repeats another


WAY = "decoding"  # the column that names how a row was decoded


@stages.register("generate")
class Generate(Stage):
    """Rows written anew by a teacher, answers that break the rules rejected and asked for again."""

    kind = "generate"
    version = 2
    gives = "data"
    asks = ("model",)

    data: DataRef = detail(..., "The data stage whose rows are written anew, all its splits.")
    splits: list[Literal["train", "validation", "test"]] | None = detail(
        None, "Only these splits; the others are left out. null: all that have rows."
    )
    take: int | None = detail(None, "Only the first so many rows of each split.", ge=1)
    model: ModelRef = detail(..., "The teacher: a stage, base, a folder, a hub id, or an endpoint (URL#MODEL).")
    instruction: str | list[Any] = detail(
        ..., "Template of what the teacher is asked, over the row's columns: text, or a list of messages."
    )
    into: str = detail("text", "The column that receives the answer.")
    prompt: str | list[Any] | None = detail(None, "Template of the new row's prompt; null: the row's own.")
    completion: str | list[Any] | None = detail(None, "Template of the new row's answer; null: the row's own.")
    chosen: str | list[Any] | None = detail(None, "Template of the preferred answer; null: the row's own.")
    rejected: str | list[Any] | None = detail(None, "Template of the other answer; null: the row's own.")
    messages: str | list[Any] | None = detail(None, "Template of a conversation; null: the row's own.")
    text: str | None = detail(None, "Template of plain text; null: the row's own.")
    label: str | None = detail(None, "Template of a label; null: the row's own.")
    keep: list[str] = detail([], "Further columns to carry along.")
    format: Format | None = detail(
        None, "How the new rows are written out for a model, in training and at inference; null: as those of `data`."
    )
    teacher_format: Format = detail(Format(), "How the instruction is written out for the teacher.")

    decoding: Decoding = detail(
        Decoding(temperature=TEMPERATURE), "How answers are decoded; the temperature is 0.8 unless given."
    )
    decodings: dict[str, Decoding] = detail(
        {},
        "Several ways to decode, by name, in place of decoding: every row is written in each, and the new rows have a column "
        "«decoding» with its name.",
    )
    tries: int = detail(4, "Times that a row is asked for until an answer is accepted.", ge=1)
    reject: Reject = detail(Reject(), "Which answers are rejected, each with a counted reason.")
    classifier: ClassifierRef | None = detail(None, "The classifier that reject.toxicity_below asks.")
    toxic_label: str = detail("toxic", "The classifier's label whose probability is the toxicity.")
    on_failure: Literal["drop", "keep"] = detail(
        "drop", "A row whose tries were all rejected: drop it, or keep it as it was."
    )

    grow: int | None = detail(
        None, "Write so many new rows from those of train as seeds, instead of writing each anew.", ge=1
    )
    example: str | None = detail(None, "With grow: template of one seed; {examples} in the instruction takes some.")
    examples: int = detail(4, "With grow: seeds shown in one prompt.", ge=1)

    chunk: int = detail(64, "Rows asked for together and kept together; a kill costs at most so many.", ge=1)
    batch_size: int = detail(32, "Answers that a local teacher decodes together.", ge=1, affects_result=False)
    concurrency: int = detail(8, "Requests to an endpoint under way at once.", ge=1, affects_result=False)
    precision: devices.Precision = detail("auto", "float32, bf16, fp16 or auto, of a local teacher.")
    attention: load.Attention = detail("auto", "auto, sdpa, eager or flash_attention_2.")

    @field_validator("decoding", mode="before")
    @classmethod
    def _sampled(cls, value: Any) -> Any:
        """A recipe that sets other options of decoding only still samples."""
        return {"temperature": TEMPERATURE, **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _whole(self) -> Generate:
        kind, templates = self._kind(), self._templates()
        if strange := [n for n in templates if n not in kind]:
            raise ValueError(f"{', '.join(templates)} do not go together: take out {' and '.join(strange)}")
        if self.decodings and (self.grow or "decoding" in self.model_fields_set):
            raise ValueError("decodings takes the place of decoding, and there is no growing by several")
        used = {c for n, t in templates.items() for c in columns(t, n)} | set(self.keep)
        if self.into not in used and not (self.into in kind and self.into not in templates):
            raise ValueError(f"the answers go into «{self.into}», which no template of the new row asks for")
        if (self.classifier is None) != (self.reject.toxicity_below is None):
            raise ValueError("classifier and reject.toxicity_below need each other")
        ways = self.decodings.values() or [self.decoding]
        if any(way.temperature == 0 for way in ways) and self.tries > 1 and self.grow is None:
            raise ValueError("at temperature 0 a second try answers as the first: give tries: 1, or a temperature")
        last = self.instruction[-1:] if isinstance(self.instruction, list) else []
        if any(isinstance(m, dict) and m.get("role") == "assistant" for m in last):
            raise ValueError("the instruction ends with an answer: its last message must not be the assistant's")
        if self.grow is None and self.example is not None:
            raise ValueError("example belongs to grow, which is not set")
        if self.grow is not None:
            if self.example is None or columns(self.instruction, "instruction") != {"examples"}:
                raise ValueError(
                    "grow needs `example`, a template of one seed, and an instruction with {examples} alone"
                )
            if self.reject.against or self.keep or self.splits or self.on_failure == "keep":
                raise ValueError("grow has no row to compare with or to keep: no against, keep, splits, on_failure")
        return self

    def check(self, recipe: Recipe) -> None:
        if "." in self.data:
            raise RecipeError(
                f"«{self.data}»: all splits are written anew",
                do=f"data: {self.data.partition('.')[0]}, and splits: […]",
            )

    def run(self, job: Job) -> None:
        judge = Judge(job, str(self.classifier), self.toxic_label)
        if self.classifier is not None:
            judge.checked()
        work = Asking(job, self.model, lambda: self._teacher(job), self.reject, lambda: judge)
        rows = [(split, record) for split in SPLITS for record in self._rows(job, split)]
        if self.grow is not None:
            splits, dropped = self._grown(job, work, [r for split, r in rows if split == "train"]), []
        else:
            splits, dropped = self._rewritten(work, rows)
        found = leaks(splits)
        write_data(job.dir, splits, dropped)
        source = Source(f"{self.data}, written by {self.model}", [record for _, record in rows])
        described = card(source, splits, dropped, found) | {"rejected": dict(work.rejected.most_common())}
        write_json(job.dir / "card.json", described)
        job.counts["examples"] = described["rows_out"]
        job.summary = self._summary(described, work)
        job.say(job.summary)
        if found.exact or found.near:
            job.warn(
                f"validation or test rows also stand in train: {found.exact} exactly, {found.near} nearly; "
                "the teacher answers different rows alike: a higher temperature, or a larger model, may help"
            )

    def _rows(self, job: Job, split: str) -> list[Record]:
        path = job.rows(self.data, split) if split in (self.splits or SPLITS) else None
        return read_rows(path)[: self.take] if path is not None else []

    def _rewritten(self, work: Asking, rows: list[tuple[str, Record]]) -> tuple[Splits, list[tuple[Record, str]]]:
        """Each row with its answer, or dropped with the reason of its last try."""
        records = [record for _, record in rows]
        if not records:
            raise DataError(f"{self.data} has no rows in {', '.join(self.splits or SPLITS)}", do="name other splits")
        if self.on_failure == "keep" and self.into not in records[0].row:
            raise DataError(
                f"on_failure: keep takes «{self.into}» as it was, and the rows have no such column",
                where=records[0].where,
                do="on_failure: drop",
            )
        ways = self.decodings or {"": self.decoding}
        if self.decodings:
            rows = [(split, Record(r.row | {WAY: way}, r.where)) for way in ways for split, r in rows]
            records = [record for _, record in rows]
        prompts = self._prompts(records)
        against, facts = (
            dict(enumerate(fill(records, template or "", f"reject.{name}")))
            for name, template in (("against", self.reject.against), ("lost", self.reject.lost))
        )
        items: list[dict[str, Any]] = []
        each, made = len(records) // len(ways), 0
        for k, way in enumerate(ways.values()):
            for start in range(k * each, (k + 1) * each, self.chunk):
                asked = {n: prompts[n] for n in range(start, min(start + self.chunk, (k + 1) * each))}
                items += work.chunk(made, asked, self.tries, against, facts, way=way)
                made += 1
        new: dict[str, list[Record]] = {split: [] for split, _ in rows}
        dropped: list[tuple[Record, str]] = []
        for (split, record), item in zip(rows, items, strict=True):
            if item["answer"] is not None:
                new[split].append(Record(record.row | {self.into: item["answer"]}, record.where))
            elif self.on_failure == "keep":
                new[split].append(record)
            else:
                dropped.append((Record(record.row | {"answer": item["last"]}, record.where), item["rejected"][-1]))
        if work.accepted == 0:
            raise work.refused()
        return {split: self._made(found) for split, found in new.items() if found}, dropped

    def _grown(self, job: Job, work: Asking, seeds: list[Record]) -> Splits:
        """New rows for train: each prompt is asked once, and numbers go on until there are enough."""
        assert self.grow is not None
        if not seeds:
            raise DataError(f"{self.data} has no rows in train to grow from", do="give it some")
        shown = fill(seeds, self.example, "example")
        seen = Seen(shown, self.reject.too_similar or NEAR)
        rows: list[Record] = []
        limit = self.grow * self.tries
        for start in range(0, limit, self.chunk):
            numbers = range(start, min(start + self.chunk, limit))
            some = [examples(shown, self.examples, seed=job.seed, number=n) for n in numbers]
            asked = self._prompts([Record({"examples": e}, f"row {n}") for n, e in zip(numbers, some, strict=True)])
            items = work.chunk(start // self.chunk, dict(zip(numbers, asked, strict=True)), tries=1)
            for n, item in zip(numbers, items, strict=True):
                if item["answer"] is not None and seen.new(item["answer"]):
                    rows.append(Record({self.into: item["answer"]}, f"{self.data}, grown {n + 1}"))
                elif item["answer"] is not None:
                    work.repeated()
            if len(rows) >= self.grow:
                break
        if not rows:
            raise work.refused()
        if len(rows) < self.grow:
            job.warn(
                f"{len(rows)} rows instead of {self.grow} were made in {limit} prompts: raise tries, or give more seeds"
            )
        return {"train": self._made(rows[: self.grow])}

    def _teacher(self, job: Job) -> Teacher:
        address = job.model(self.model).endpoint
        if address is not None:
            return Served(job, address, self.teacher_format, self.decoding, concurrency=self.concurrency)
        return Local(
            job, self.model, self.teacher_format, self.decoding,
            precision=self.precision, attention=self.attention, batch_size=self.batch_size,
        )  # fmt: skip

    def _prompts(self, records: Sequence[Record]) -> list[Record]:
        filled = fill(records, self.instruction, "instruction")
        return [
            Record({"prompt" if isinstance(text, str) else "messages": text}, record.where)
            for record, text in zip(records, filled, strict=True)
        ]

    def _templates(self) -> dict[str, Any]:
        return {name: value for name in TEMPLATES if (value := getattr(self, name)) is not None}

    def _kind(self) -> tuple[str, ...]:
        """The dataset columns that a new row may have."""
        first = next(iter(self._templates()), self.into)
        return next((kind for kind in KINDS if first in kind), ())

    def _made(self, records: list[Record]) -> list[Record]:
        """Rows of a dataset type: by the templates, and where there is none for a column, the row's own."""
        own = {n: f"{{{n}}}" for n in self._kind() if n in records[0].row}
        return formats.apply(records, own | self._templates(), keep=[*self.keep, *([WAY] if self.decodings else [])])

    def _summary(self, described: dict[str, Any], work: Asking) -> str:
        gone = ", ".join(f"{n:,} {reason}" for reason, n in described["dropped"].items()) or "none dropped"
        parts = ", ".join(f"{name} {n:,}" for name, n in described["splits"].items())
        turned = ", ".join(f"{n:,} {reason}" for reason, n in work.rejected.most_common()) or "none"
        return (
            f"rows: {described['rows_in']:,} in, {described['rows_out']:,} out ({gone})\nsplits: {parts}\n"
            f"answers: {work.accepted:,} taken; rejected: {turned}"
        )
