"""What every tracker is: a run elsewhere that takes hyperparameters, numbers, texts and files; and the table of them."""

from __future__ import annotations

import abc
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from annotated_types import Ge

from temper.errors import RecipeError
from temper.overlay import KeyPath
from temper.registry import Registry

T = TypeVar("T")
Entry = str | dict[str, dict[str, Any] | None]  # NAME or {NAME: {option: value}}
Outcome = Literal["finished", "failed", "stopped"]
Models = Literal["best", "all", "none"]
Mode = Literal["online", "offline"]
Wait = Annotated[float, Ge(0)]
SERVERS = {"mlflow": ("url", "MLFLOW_TRACKING_URI")}  # the option and the variable that name it; one of them must
SECRET = re.compile(r"//[^/@\s]+:[^/@\s]*@")  # scheme://user:password@host


class Point(NamedTuple):
    """One number of a series at a step: `sft/loss`, 40, 1.25."""

    name: str
    step: int
    value: float


class Gone(Exception):
    """The run that was to be continued is not there any more: another one is begun."""


@dataclasses.dataclass(frozen=True)
class Start:
    """What a tracker is told when its run begins, or goes on.

    `run` is the tracker's own name of the run to go on with. `notes` is the tracker's memory from one process to the
    next: it may write what JSON can hold.
    """

    name: str  # of the run, for people: that of the run folder
    recipe: str  # of the experiment or project, where the recipe names none
    folder: Path  # where it may write
    run: str | None
    notes: dict[str, Any]


class Tracker(abc.ABC):
    """A run in a tracker. Every call may raise, and may take its time; what was given once may be given again."""

    run: str
    url: str  # where a person finds it

    @abc.abstractmethod
    def settings(self, values: Mapping[str, Any]) -> None:
        """All hyperparameters, flat: `sft.adapter.r`."""

    @abc.abstractmethod
    def about(self, values: Mapping[str, str]) -> None:
        """What is no setting: versions, hardware, what was really used."""

    @abc.abstractmethod
    def points(self, points: Sequence[Point]) -> None:
        """Numbers over steps. Within a series steps only rise."""

    @abc.abstractmethod
    def scores(self, values: Mapping[str, float]) -> None:
        """Numbers without a step."""

    @abc.abstractmethod
    def file(self, path: Path, name: str) -> None:
        """A file as an artefact; `name` ends as the path does."""

    @abc.abstractmethod
    def model(self, folder: Path, name: str) -> None:
        """A folder with a model or an adapter."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027  not every tool has tables
        """Texts beside one another, such as samples; a tool without tables gets their file alone."""

    def arrived(self) -> bool:
        """Whether all that was given so far is where it belongs, so that it need not be given again."""
        return True

    @abc.abstractmethod
    def end(self, outcome: Outcome) -> None:
        """Close it. What returns has arrived."""


trackers: Registry[Callable[..., Tracker]] = Registry("tracker")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A tracker that a recipe names, with all its options."""

    name: str
    options: dict[str, Any]


def asked(entries: Sequence[Entry], lines: dict[KeyPath, str], file: str) -> tuple[Asked, ...]:
    """`trackers:` of a recipe → names with checked options.

    Raises:
        RecipeError: an unknown name or option (with the nearest known one), a tracker twice, a password in a URL.
    """
    out: list[Asked] = []
    for place, entry in enumerate(entries):
        name, given = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()), ("", {}))
        where = lines.get(("trackers", str(place), name), lines.get(("trackers",), file))
        if not isinstance(entry, str) and len(entry) != 1:
            raise RecipeError(
                "an entry of «trackers» is one name with its options", where=where, do="write - mlflow: {url: …}"
            )
        trackers.get(name, where=where)
        out.append(Asked(name, trackers.check(name, given or {}, where=where)))
        for option, value in out[-1].options.items():
            if isinstance(value, str) and SECRET.search(value):
                raise RecipeError(
                    f"tracker «{name}»: {option} holds a password, and recipes are copied into every run folder",
                    where=where,
                    do=f"leave it out of the URL, and give {name} its own environment variables: see docs/recipes.md",
                )
    names = [a.name for a in out]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise RecipeError(
            f"tracker «{twice}» stands twice", where=lines.get(("trackers",), file), do="leave one of them out"
        )
    return tuple(out)


def check(one: Asked) -> None:
    """Raises RecipeError where a tracker's package is not installed, or where it is not told of its server."""
    found = importlib.util.find_spec(one.name)
    if found is None or found.origin is None:  # a folder of that name is no package
        raise RecipeError(
            f"the tracker «{one.name}» needs the package {one.name}, which is not installed",
            where="trackers",
            do=f"""pip install "temper-lm[{one.name}]", or do without trackers: --set 'trackers=[]'""",
        )
    option, variable = SERVERS.get(one.name, ("", ""))
    if option and not one.options[option] and not os.environ.get(variable):
        raise RecipeError(
            f"the tracker «{one.name}» is not told of its server",
            where="trackers",
            do=f"write {{{one.name}: {{{option}: http://…}}}}, or set {variable}",
        )


def batches(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of at most `size`.

    >>> list(batches(range(5), 2))
    [[0, 1], [2, 3], [4]]
    """
    held: list[T] = []
    for value in values:
        held.append(value)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held


def finite(value: Any) -> bool:
    """A number that can be drawn: neither true nor false, neither NaN nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
