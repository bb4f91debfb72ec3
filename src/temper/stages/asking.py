"""Asking a teacher chunk after chunk. Each chunk is kept whole on disk, so that a kill costs at most one of them and
nothing that was kept is asked for, or paid for, again.

An item is the outcome of one row: {"answer": text or null, "rejected": [the reason of each try], "last": text}.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from temper.data import reject
from temper.data.reject import Reject
from temper.errors import DataError
from temper.job import Job
from temper.rollouts.decoding import Decoding
from temper.rollouts.endpoint import Answer
from temper.runfolder import read_sealed, write_sealed
from temper.stages.teacher import Teacher
from temper.types import Record

HOPELESS = 32  # rows after which a teacher that had nothing accepted is not asked any more

Item = dict[str, Any]
Texts = Mapping[int, str]  # a row's number → a text of it


class Asking:
    """Asks for answers, rejects those that break the rules, and asks again.

    `accepted` and `rejected` count over all chunks, those found on disk included.

    Args:
        teacher: opens it; called when a chunk is missing.
        toxicity: opens a function from texts to probabilities; called where `rules` have a bound on it.
    """

    def __init__(
        self,
        job: Job,
        name: str,
        teacher: Callable[[], Teacher],
        rules: Reject,
        toxicity: Callable[[], Callable[[list[str]], Iterable[float]]],
    ) -> None:
        self.job, self.name, self.rules = job, name, rules
        self.teacher, self.toxicity = functools.cache(teacher), functools.cache(toxicity)
        self.accepted, self.done = 0, 0
        self.rejected: Counter[str] = Counter()
        self._given_up: Item = {}  # the last row whose tries were all rejected
        (job.dir / "answers").mkdir(exist_ok=True)

    def chunk(
        self,
        k: int,
        prompts: Mapping[int, Record],
        tries: int,
        against: Texts | None = None,
        facts: Texts | None = None,
        way: Decoding | None = None,
    ) -> list[Item]:
        """The outcomes of the rows of chunk k, in their order: read where they were kept, else asked for and kept.

        Args:
            prompts: a row's number, which keys what is drawn for it, → what is asked.
            against, facts: texts that the rules compare with (see data/reject.py).
            way: how to decode; None: as the teacher does.

        Raises:
            DataError: so far nothing was accepted, in more than a few rows.
        """
        file = self.job.dir / "answers" / f"{k:06}.json"
        items = self._kept(file)
        if items is None:
            items = self._asked(k, prompts, tries, against or {}, facts or {}, way)
            write_sealed(file, {"items": items, "warnings": self.job.warnings, "facts": self.job.facts})
        self.done += len(items)
        self.accepted += sum(item["answer"] is not None for item in items)
        self.rejected.update(reason for item in items for reason in item["rejected"])
        self._given_up = next((i for i in reversed(items) if i["answer"] is None), self._given_up)
        if self.accepted == 0 and self.done >= HOPELESS:
            raise self.refused()
        return items

    def repeated(self) -> None:
        """Take back an accepted answer that repeats another."""
        self.accepted -= 1
        self.rejected[reject.REPEATED] += 1

    def _kept(self, file: Path) -> list[Item] | None:
        noted = read_sealed(file)
        if noted is None:
            if file.is_file():
                self.job.say(f"{file.name} was damaged after it was written; its rows are asked for again", "yellow")
            return None
        for warning in noted["warnings"]:
            self.job.warn(warning)
        self.job.facts.update(noted["facts"])
        return noted["items"]

    def _asked(
        self, k: int, prompts: Mapping[int, Record], tries: int, against: Texts, facts: Texts, way: Decoding | None
    ) -> list[Item]:
        """All rows at once; those rejected are asked again together in the next attempt."""
        items: dict[int, Item] = {n: {"answer": None, "rejected": [], "last": ""} for n in prompts}
        for attempt in range(tries):
            left = [n for n in prompts if items[n]["answer"] is None]
            if not left:
                break
            with self.job.progress(len(left), f"chunk {k + 1}, attempt {attempt + 1}") as bar:
                answers = self.teacher().ask([prompts[n] for n in left], left, attempt, bar, way)
            pairs = [(against.get(n, ""), facts.get(n, "")) for n in left]
            for n, answer, why in zip(left, answers, self._reasons(answers, pairs), strict=True):
                items[n]["last"] = answer.text
                if why is None:
                    items[n]["answer"] = answer.text
                else:
                    items[n]["rejected"].append(why)
        return list(items.values())

    def _reasons(self, answers: Sequence[Answer], pairs: Sequence[tuple[str, str]]) -> list[str | None]:
        out = [
            reject.reason(a.text, a.ended, self.rules, against=against, facts=facts)
            for a, (against, facts) in zip(answers, pairs, strict=True)
        ]
        bound, passed = self.rules.toxicity_below, [i for i, why in enumerate(out) if why is None]
        if bound is not None and passed:
            for i, value in zip(passed, self.toxicity()([answers[i].text for i in passed]), strict=True):
                out[i] = reject.TOO_MILD if value < bound else None
        return out

    def refused(self) -> DataError:
        """Nothing was accepted: why, how often, and what to change."""
        counts = ", ".join(f"{why} {n}" for why, n in self.rejected.most_common())
        commonest = next(iter(self.rejected.most_common(1)), ("", 0))[0]
        shown = " ".join(self._given_up.get("last", "").split())[:200]
        return DataError(
            f"no answer of {self.name} was accepted in {self.done} rows; rejected: {counts}",
            where=f"the last answer: {shown!r}",
            do=reject.advice(commonest),
        )
