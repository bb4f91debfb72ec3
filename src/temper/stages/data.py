"""data: rows from a source, mapped, cleaned, split and checked for leaks."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import model_validator

from temper.data import sources
from temper.data.card import card, write_data
from temper.data.clean import NOT_BEST, TOO_LONG, Best, Drop, clean, in_order
from temper.data.formats import applied, texts
from temper.data.forms import Format
from temper.data.split import leaks, split
from temper.data.spool import Spool, joined
from temper.data.stream import Stream
from temper.errors import DataError, nearest
from temper.job import Job
from temper.models import load
from temper.recipe import ModelRef, Stage, detail, stages
from temper.runfolder import write_json
from temper.stages import streaming
from temper.types import Record

COUNTED = 20_000  # texts whose tokens are counted once
FEW = 10  # rows of train below which hardly anything can be learnt


@stages.register("data")
class Data(Stage):
    """Rows of one of TRL's dataset types, in three splits."""

    kind = "data"
    version = 2
    gives = "data"

    source: str = detail(
        ..., "A file, a pattern, a folder (csv, tsv, json, jsonl, parquet, txt, also .gz), mini:NAME, or a hub id."
    )
    config: str | None = detail(None, "Configuration of a hub data set.")
    split: str | None = detail(None, "Which split of the source to read; null: train where a hub data set has it.")
    revision: str | None = detail(None, "Commit, tag or branch of a hub data set.")
    encoding: str = detail("utf-8", "Encoding of local text files.")
    take: int | None = detail(None, "At most so many rows, drawn by the seed; for mini sets how many to make.", ge=1)

    prompt: str | list[Any] | None = detail(
        None, "Template of the prompt: text with {column} in it, or a list of messages."
    )
    completion: str | list[Any] | None = detail(None, "Template of the answer.")
    chosen: str | list[Any] | None = detail(None, "Template of the preferred answer.")
    rejected: str | list[Any] | None = detail(None, "Template of the other answer.")
    messages: str | list[Any] | None = detail(
        None, "Template of a conversation; «{column}» takes a column that holds one."
    )
    text: str | None = detail(None, "Template of plain text.")
    label: str | None = detail(None, "Template of a label.")
    keep: list[str] = detail([], "Further columns to carry along (rewards and reports can read them).")
    format: Format = detail(
        Format(), "How prompts and answers are written out for a model, in training and at inference."
    )

    drop: Drop = detail(Drop(), "Which rows are dropped, each with a counted reason.")
    best: Best | None = detail(
        None,
        "Order the rows by a mark, the best first, and keep the best; `take` of a training stage then takes these.",
    )
    tokenizer: ModelRef | None = detail(
        None, "Count lengths in this model's tokens (base, or a model); null: in characters."
    )
    validation: float | int | str = detail(
        0.05, "A share, a number of rows, or another source (split:NAME: another split of this one)."
    )
    test: float | int | str = detail(
        0.1, "A share, a number of rows, or another source (split:NAME: another split of this one)."
    )
    group: str | None = detail(None, "Rows with the same value in this column stay in one split.")
    near_leaks: bool = detail(True, "Also look for test rows that nearly stand in train.")
    stream: Stream | None = detail(
        None,
        "Of parquet files or a hub data set: read train as it is trained on (by sft), instead of a copy, for sets larger than "
        "memory or disk. validation and test are then numbers of rows.",
    )

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, value: Any) -> Any:
        return streaming.usual(value)

    @model_validator(mode="after")
    def _can_stream(self) -> Data:
        if self.stream is not None:
            streaming.check_stream(self)
        return self

    def fingerprint(self, folder: Path) -> dict[str, Any]:
        if self.stream is not None:
            return {"source": streaming.identity(self, folder)}
        named = {"source": (self.source, self.split)}
        for name in ("validation", "test"):
            value = getattr(self, name)
            if isinstance(value, str):
                named[name] = (self.source, value[6:]) if value.startswith("split:") else (value, None)
        return {k: sources.fingerprint(source, folder, split=part) for k, (source, part) in named.items()}

    def run(self, job: Job) -> None:
        if self.stream is not None:
            streaming.prepare(job, self)
            return
        length, unit = self._length(job)
        source = self._read(job, self.source, self.split, self.take)
        by = self.best.by if self.best is not None else ""
        if by and source.records and by not in source.records[0].row:
            raise DataError(f"best.by: there is no column «{by}»", do=nearest(by, source.records[0].row))
        mark = [self.best.by] if self.best is not None and self.best.by not in self.keep else []
        mapped = {"train": self._mapped(job, source.records, mark)}
        for name in ("validation", "test"):
            value = getattr(self, name)
            if isinstance(value, str):
                other = self._read(
                    job, *((self.source, value[6:]) if value.startswith("split:") else (value, None)), None
                )
                mapped[name] = self._mapped(job, other.records)
        gone: list[Sequence[tuple[Record, str]]] = []
        splits: dict[str, Sequence[Record]] = {}
        for name, records in mapped.items():
            cleaned = clean(
                records,
                self.drop,
                length=(lambda row: sum(length(t) for t in texts(row).values())) if unit == "tokens" else None,
            )
            if self.best is not None and name == "train":
                cleaned = in_order(cleaned, self.best)
            gone.append(cleaned.dropped)
            splits[name] = cleaned.kept
        dropped = joined(*gone)
        self._warn_of_loss(job, mapped, dropped, length, unit)
        sizes = {n: v if not isinstance(v := getattr(self, n), str) else 0 for n in ("validation", "test")}
        own = split(
            splits["train"], validation=sizes["validation"], test=sizes["test"], seed=job.recipe.seed, group=self.group
        )
        parts = {**{n: splits[n] for n in ("validation", "test") if n in splits}, **own}
        found = leaks(parts, near=self.near_leaks, folder=job.dir)
        write_data(job.dir, parts, dropped)
        described = card(source, parts, dropped, found, length=length, unit=unit)
        described["rows_in"] = sum(len(r) for r in mapped.values())
        write_json(job.dir / "card.json", described)
        job.counts["examples"] = described["rows_out"]
        self._report(job, described, found)
        self._warn_of_few(job, described)

    def _warn_of_loss(
        self,
        job: Job,
        mapped: dict[str, Sequence[Record]],
        dropped: Sequence[tuple[Record, str]],
        length: Callable[[str], int],
        unit: str,
    ) -> None:
        """More than half of the rows gone is seldom what was meant; where by length, how long rows are says what to do."""
        every = joined(*mapped.values())
        dropped = [one for one in dropped if not one[1].startswith(NOT_BEST)]  # that was asked for
        if 2 * len(dropped) <= len(every):
            return
        counts = Counter(why for _, why in dropped)
        text = (
            f"{len(dropped):,} of {len(every):,} rows are dropped ({_counted(counts)}); data/dropped.parquet has them"
        )
        if TOO_LONG in counts:
            sizes = np.fromiter(
                (sum(length(t) for t in texts(record.row).values()) for record in every), int, len(every)
            )
            text += (
                f". Rows are {np.median(sizes):,.0f} {unit} long in the median, 95 % of them up to "
                f"{np.quantile(sizes, 0.95):,.0f}, and drop.longer_than is {self.drop.longer_than:,}"
            )
        job.warn(text)

    def _warn_of_few(self, job: Job, described: dict[str, Any]) -> None:
        """A train split that is smaller than what is held out, or hardly there."""
        sizes = described["splits"]
        train, held = sizes.get("train", 0), {n: k for n, k in sizes.items() if n != "train"}
        if train >= FEW and train >= sum(held.values()):
            return
        out = " and ".join(f"{name} {n:,}" for name, n in held.items() if n) or "nothing held out"
        dropped = f"; dropped: {_counted(described['dropped'])}" if described["dropped"] else ""
        job.warn(
            f"train has only {train:,} row{'' if train == 1 else 's'} ({out}{dropped}): give more rows, or a smaller validation and test"
        )

    def _report(self, job: Job, described: dict[str, Any], found: Any) -> None:
        gone = _counted(described["dropped"]) or "none dropped"
        parts = ", ".join(f"{name} {n:,}" for name, n in described["splits"].items())
        job.summary = f"rows: {described['rows_in']:,} in, {described['rows_out']:,} out ({gone})\nsplits: {parts}"
        job.say(job.summary)
        if found.exact or found.near or found.prompts:
            first = found.examples[0]
            job.warn(
                f"validation or test rows also stand in train: {found.exact} exactly, {found.near} nearly, {found.prompts} with the same prompt "
                f"(for example {first['where']} and {first['train']}); a test would measure memory. "
                "drop: {duplicates: near}, or group: COLUMN, keeps them apart"
            )

    def _read(self, job: Job, name: str, part: str | None, rows: int | None) -> sources.Source:
        return sources.read(
            name,
            config=self.config,
            split=part,
            revision=self.revision,
            encoding=self.encoding,
            base=job.recipe.folder,
            rows=rows,
            seed=job.recipe.seed,
            folder=job.dir,
        )

    def _mapped(self, job: Job, records: Sequence[Record], more: Sequence[str] = ()) -> Sequence[Record]:
        templates = streaming.templates_of(self)
        return Spool(applied(records, templates, keep=[*self.keep, *more] if templates else self.keep), job.dir)

    def _length(self, job: Job) -> tuple[Callable[[str], int], str]:
        """Length of a text, and its unit."""
        if self.tokenizer is None:
            return len, "characters"
        tokenizer = load.tokenizer(job.model(self.tokenizer), trust_remote_code=job.recipe.trust_remote_code)

        @functools.lru_cache(COUNTED)  # asked for more than once
        def count(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        return count, "tokens"


def _counted(reasons: Mapping[str, int]) -> str:
    """Reasons with their counts, the most frequent first."""
    return ", ".join(f"{n:,} {reason}" for reason, n in sorted(reasons.items(), key=lambda one: -one[1]))
