"""Streams: what a data stage leaves behind of one, and its rows encoded for a model, a block at a time, while it trains.

A stream's rows are never seen all at once. What takes that is refused (duplicates, groups, the best by a mark), and rows for
validation and test are a few, of the beginnings of row groups drawn at random; train leaves out their rows and all that ask the
same.
"""

from __future__ import annotations

import concurrent.futures
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from temper.data.card import card, write_data
from temper.data.chat import Encoder
from temper.data.clean import judged
from temper.data.digests import digest
from temper.data.formats import applied
from temper.data.sources import MINI, Source, files
from temper.data.split import split, unit
from temper.data.stream import Shards, Span, columns_of, shards
from temper.engine.chains import Chains
from temper.engine.streaming import Block, Streaming
from temper.errors import DataError, RecipeError
from temper.job import STREAM, Job
from temper.runfolder import read_json, write_json
from temper.stages.seen import fingerprint, note_marks
from temper.types import Record

HELD = 500  # rows of validation and of test, unless others are asked for
TEMPLATES = ("prompt", "completion", "chosen", "rejected", "messages", "text", "label")
GROUPS = 16  # row groups from whose beginnings rows are held out
SPARE = 4  # rows looked at for one held out: some are dropped, some ask the same
LEAKS = "asks the same as a row held out"
AT_ONCE = 1024  # rows encoded at once


def usual(value: Any) -> Any:
    """What a data stage sets where it streams and the recipe does not say."""
    if not isinstance(value, dict) or value.get("stream") is None:
        return value
    drop = value.get("drop", {})
    drop = {"duplicates": "off", **drop} if isinstance(drop, dict) else drop
    return {"validation": HELD, "test": HELD, "near_leaks": False, **value, "drop": drop}


def check_stream(stage: Any) -> None:
    """Refuse what takes all rows at once.

    Raises:
        RecipeError: a data stage that streams asks for it.
    """
    refused = {
        "drop.duplicates": stage.drop.duplicates != "off", "near_leaks": stage.near_leaks, "best": stage.best is not None,
        "group": stage.group is not None, "take": stage.take is not None,
        "tokenizer": stage.tokenizer is not None,
    }  # fmt: skip
    if name := next((n for n, asked in refused.items() if asked), None):
        do = "max_length of the training stage counts in tokens" if name == "tokenizer" else f"take {name} out, or take stream out"
        raise RecipeError(f"{name} takes all rows at once, and a stream is read as it is trained on", where=name, do=do)
    for name in ("validation", "test"):
        if not isinstance(value := getattr(stage, name), int):
            raise RecipeError(f"of a stream {name} is a number of rows, and this is {value!r}", where=name, do=f"{name}: {HELD}")


def open_shards(stage: Any, folder: Path, noted: dict[str, Any] | None = None) -> tuple[Shards, str | None]:
    """The row groups of a data stage's source, and the commit.

    Args:
        folder: the recipe's.
        noted: what the data stage left of a hub data set.
    """
    columns = columns_of(templates_of(stage), stage.keep)
    revision = stage.revision if noted is None else noted["revision"]
    return shards(
        stage.source, config=stage.config, split=stage.split, revision=revision, base=folder, columns=columns, noted=noted
    )  # fmt: skip


def identity(stage: Any, folder: Path) -> str | None:
    """What identifies the local files of a stream; None for a hub data set, whose revision does."""
    if stage.source.startswith(MINI) or files(stage.source, folder, stage.split) is not None:
        return open_shards(stage, folder)[0].sha256
    return None


def first_rows(stage: Any, folder: Path, n: int) -> tuple[int, list[Record]]:
    """How many rows a stream has, and its first ones, mapped."""
    source, _ = open_shards(stage, folder)
    spans = [Span(g, 0, min(n, g.rows)) for g in source.groups[:1]]
    return source.rows, list(applied([r for _, r in source.read(spans)], templates_of(stage), keep=stage.keep))


def templates_of(stage: Any) -> dict[str, Any]:
    """The templates that a data stage sets."""
    return {name: getattr(stage, name) for name in TEMPLATES if getattr(stage, name) is not None}


def prepare(job: Job, stage: Any) -> None:
    """What a data stage does that streams: hold rows out, and note what the others are read from."""
    source, commit = open_shards(stage, job.recipe.folder)
    asked = stage.validation + stage.test
    if source.rows <= asked:
        raise DataError(f"«{stage.source}» has {source.rows:,} rows, and {asked:,} are to be held out", do="set validation and test smaller")  # fmt: skip
    pool, gone = _pool(source, stage, asked, job.recipe.seed)
    own = split([r for _, r in pool], validation=stage.validation, test=stage.test, seed=job.recipe.seed)
    parts = {name: rows for name, rows in own.items() if name != "train"}
    write_data(job.dir, parts, [])
    numbers = {record.where: number for number, record in pool}
    held = sorted(numbers[r.where] for rows in parts.values() for r in rows)
    units = sorted({digest(unit(r)) for rows in parts.values() for r in rows})
    (job.dir / "data").mkdir(exist_ok=True)
    noted = {**source.note, "revision": commit, "held": held, "units": units}
    write_json(job.dir / "data" / STREAM, noted)
    shown = {"train": own["train"], **parts}
    described = card(Source(stage.source, [r for _, r in pool], source.sha256, commit), shown, [], None)
    train = source.rows - len(held)
    described |= {"rows_in": source.rows, "rows_out": source.rows, "splits": {**described["splits"], "train": train}}
    write_json(job.dir / "card.json", described)
    job.counts["examples"] = source.rows
    files, lost = len(source.sources), f"; of {len(pool) + gone:,} rows that were looked at {gone:,} would be dropped" if gone else ""
    job.summary = (
        f"a stream of {source.rows:,} rows in {len(source.groups):,} row groups of {files:,} file{'' if files == 1 else 's'}, "
        f"shuffled in windows of {stage.stream.window:,}{lost}\n"
        f"splits: train {train:,} (before rows are dropped), " + ", ".join(f"{n} {len(r):,}" for n, r in parts.items())
    )
    job.say(job.summary)


def _pool(source: Shards, stage: Any, asked: int, seed: int) -> tuple[list[tuple[int, Record]], int]:
    """Rows to hold some out of, with their numbers, and how many beside them would be dropped."""
    if not asked:
        asked = 1
    groups = source.order(seed, 0)[:GROUPS]
    each = -(-SPARE * asked // len(groups))
    rows = list(source.read([Span(g, 0, min(each, g.rows)) for g in sorted(groups, key=lambda g: g.first)]))
    keeps = judged(stage.drop)
    mapped = list(applied([r for _, r in rows], templates_of(stage), keep=stage.keep))
    kept = [(n, r) for (n, _), r in zip(rows, mapped, strict=True) if keeps(r) is None]
    if len(kept) <= asked:
        raise DataError(
            f"of {len(rows):,} rows that were looked at {len(kept):,} are left, and {asked:,} are to be held out",
            do="loosen drop, or set validation and test smaller",
        )
    return kept, len(rows) - len(kept)


def streams(job: Job, ref: str) -> bool:
    """Whether a data stage is a stream."""
    return (job.inputs[ref.partition(".")[0]].path / "data" / STREAM).is_file()


class Encoding:
    """Blocks of a stream, encoded for a model: each process reads and encodes a part of each, and all exchange theirs.

    While a block is trained on, the next one's part is made.

    Args:
        encoder: of this stream alone, since it is at work beside the training.
        training: the stage that asks.

    Raises:
        RecipeError: it asks for what a stream cannot give.
        DataError: the source has changed since the data stage looked at it.
    """

    def __init__(self, job: Job, ref: str, encoder: Encoder, training: Any) -> None:
        check_asked(training)
        self.training = training
        self.stage: Any = job.recipe.stages[ref.partition(".")[0]]
        self.encoder, self.world, self.seed, self.window = encoder, job.world, job.seed, self.stage.stream.window
        noted = read_json(job.inputs[ref.partition(".")[0]].path / "data" / STREAM)
        self.source, _ = open_shards(self.stage, job.recipe.folder, noted if noted["revision"] else None)
        if noted["sha256"] != self.source.sha256:
            raise DataError(f"the files of «{self.stage.source}» have changed since «{ref}» looked at them", do="run it anew: --force it")
        self.held, self.units = set(noted["held"]), set(noted["units"])
        self.blocks = -(-self.source.rows // self.window)
        self._fit: Callable[[Chains], Chains] = lambda chains: chains
        self._batches: Streaming | None = None
        self.moved = 0
        self._keeps = judged(self.stage.drop)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "temper-stream")
        self._ahead: tuple[int, concurrent.futures.Future[Any]] | None = None
        self.shown: Record | None = None  # the first row that is kept

    def longest(self) -> int:
        """Tokens of the longest example of the first block, on any process."""
        own = self._own(0)
        self._ahead = (0, concurrent.futures.Future())
        self._ahead[1].set_result(own)
        return max(self.world.gathered(int(max(own[0].sizes, default=0))))

    def __call__(self, number: int) -> Block:
        """A block by its number, which goes on over epochs."""
        ahead, self._ahead = self._ahead, None
        own = ahead[1].result() if ahead is not None and ahead[0] == number else self._own(number)
        self._ahead = (number + 1, self._pool.submit(self._own, number + 1))
        whole, marks, gone, moved = Chains(), [], Counter[str](), 0
        for chains, some, lost, shifted in self.world.gathered(own):
            for i in range(len(chains)):
                whole.add(*chains.sequence(i))
            marks.append(some)
            gone += lost
            moved += shifted
        fitted = self._fit(whole)
        if len(fitted) < len(whole):
            gone["too long"] += len(whole) - len(fitted)
        self.moved += moved
        return Block(fitted, np.concatenate(marks), gone)

    def _own(self, number: int) -> tuple[Chains, np.ndarray, Counter[str], int]:
        """This process's part of a block: examples, 64 bits of each row, what was dropped, and moved seams."""
        epoch, block = divmod(number, self.blocks)
        start, stop = block * self.window, min((block + 1) * self.window, self.source.rows)
        size, rank = self.world.size, self.world.rank
        a, b = (start + (stop - start) * k // size for k in (rank, rank + 1))
        chains, marks, gone, moved = Chains(), list[int](), Counter[str](), 0
        for records in self._kept(self.source.spans(self.seed, epoch, a, b), gone):
            self.shown = self.shown or records[0]
            marks += [fingerprint(r) for r in records]
            for one in self.encoder.each(records):
                chains.add(one.ids, one.trained, one.where)
                moved += one.moved_seam
        return chains, np.array(marks, np.uint64), gone, moved

    def _kept(self, spans: list[Span], gone: Counter[str]) -> Iterator[list[Record]]:
        """The rows of some spans that are trained on, a few at a time."""
        rows = self.source.read(spans)
        while some := list(itertools.islice(rows, AT_ONCE)):
            mapped = applied([r for n, r in some if n not in self.held], templates_of(self.stage), keep=self.stage.keep)
            kept = []
            for record in mapped:
                why = self._keeps(record) or (LEAKS if digest(unit(record)) in self.units else None)
                if why is None:
                    kept.append(record)
                else:
                    gone[why] += 1
            if kept:
                yield kept

    def batches(self, job: Job, lane: int, fit: Callable[[Chains], Chains]) -> Streaming:
        """What the loop takes its steps from.

        Args:
            fit: examples → those that fit the model.
        """
        t, self._fit = self.training, fit
        self._batches = Streaming(
            self, rows=self.source.rows - len(self.held), blocks=self.blocks, size=t.batch_size * t.accumulation, row_tokens=lane,
            micro_tokens=t.micro_tokens, seed=job.seed, folder=job.kept / "stream", world=job.world,
        )  # fmt: skip
        return self._batches

    def first_record(self) -> Record:
        """The first row that is trained on."""
        assert self.shown is not None
        return self.shown

    def described(self, batches: Streaming) -> str:
        """What goes in, in a sentence."""
        gone = _counted(batches.gone) or "none dropped"
        return f"rows: a stream of {batches.all_rows:,}, read and shuffled {self.window:,} at a time; so far {gone}"

    def tell(self, job: Job) -> None:
        """After the last step: what was dropped, and what the model has seen."""
        assert self._batches is not None
        self._pool.shutdown(wait=False, cancel_futures=True)
        gone = _counted(self._batches.gone) or "none dropped"
        job.facts["rows of the stream"] = gone
        job.say(f"of the rows that were read: {gone}")
        note_marks(job, self._batches.seen)


def _counted(gone: Counter[str]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in gone.most_common())


def check_asked(stage: Any) -> None:
    """Refuse what a training stage cannot ask of a stream.

    Raises:
        RecipeError: it asks for it.
    """
    for name, neutral in (("take", None), ("share", 1.0)):
        if getattr(stage, name) != neutral:
            raise RecipeError(f"{name} picks among all rows, and a stream's are never there at once", where=name, do="set max_steps")  # fmt: skip
