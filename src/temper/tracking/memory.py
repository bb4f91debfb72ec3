"""What a tracker has been given of a run folder: RUN/trackers/NAME.json, so that nothing is sent twice."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fcntl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from temper.runfolder import read_json, write_json
from temper.tracking.contents import Contents, Item, digest

HOW = ("models", "wait")  # options that do not say where a run is sent


@dataclasses.dataclass
class Sent:
    """One run of the tracker: what it has for certain. It has one set of hyperparameters and one result a stage; where
    these change another run begins, and where they return the old one goes on."""

    run: str | None = None
    url: str = ""
    to: dict[str, Any] = dataclasses.field(default_factory=dict)  # server, project, …
    keys: dict[str, str] = dataclasses.field(default_factory=dict)  # stage → the key of what was sent of it
    marks: dict[str, str] = dataclasses.field(default_factory=dict)  # of each item → its state
    steps: dict[str, int] = dataclasses.field(default_factory=dict)  # series → its last step
    points: int = 0
    outcome: str | None = None  # that the tracker was told
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)  # the tracker's own

    def fits(self, contents: Contents, to: Mapping[str, Any]) -> bool:
        same = all(self.keys.get(name, key) == key for name, key in contents.keys.items())
        return same and self.to == to and self.marks.get("settings") in (None, digest(contents.settings()))

    def note(self, item: Item) -> None:
        """Remember that an item was taken."""
        if item.what == "points":
            self.steps |= {point.name: point.step for point in item.args[0]}  # within a series they rise
            self.points += len(item.args[0])
        else:
            self.marks[item.mark] = item.state


class Memory:
    """The runs that a tracker has of one run folder, the one that was written last at the end.

    `problem` is what keeps the rest from being sent, where something does.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.file = folder / "trackers" / f"{name}.json"
        self.problem: str | None = None
        self.runs: list[Sent] = []
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = read_json(self.file)
            self.runs, self.problem = [Sent(**entry) for entry in found["runs"]], found["problem"]

    def of(self, contents: Contents, options: Mapping[str, Any]) -> Sent:
        """A copy of what is remembered of the run that fits; an empty one where none does."""
        to = where(options)
        return copy.deepcopy(next((sent for sent in reversed(self.runs) if sent.fits(contents, to)), Sent(to=to)))

    def keep(self, sent: Sent) -> None:
        self.runs = [one for one in self.runs if one.run != sent.run] + [copy.deepcopy(sent)]
        self.write()

    def forget(self, sent: Sent) -> None:
        self.runs = [one for one in self.runs if one.run != sent.run]
        self.write()

    def tell(self, problem: str | None) -> None:
        if problem != self.problem:
            self.problem = problem
            self.write()

    def write(self) -> None:
        runs = [dataclasses.asdict(sent) for sent in self.runs]
        write_json(self.file, {"schema": 1, "problem": self.problem, "runs": runs})


def where(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that say where a run is sent."""
    return {k: v for k, v in options.items() if k not in HOW}


@contextlib.contextmanager
def alone(folder: Path, name: str) -> Iterator[bool]:
    """Whether no other process sends this run to this tracker now; while this lasts none will."""
    with open(folder / "trackers" / f"{name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks
        yield True
