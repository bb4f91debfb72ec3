"""Names to functions. A function's keyword-only parameters are its configuration, and their checking lives here.

One table a kind: `losses`, `metrics`, `stages`, … Adding one is a decorated function in a file.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import pydantic

from temper.errors import RecipeError, nearest
from temper.wording import type_name, value

T = TypeVar("T", bound=Callable[..., Any])
E = TypeVar("E", bound=Callable[..., Any])  # the entry itself: a decorated class keeps its own type


class Registry(Generic[T]):
    """Functions (or classes) of one kind, by name.

    >>> shapes: Registry = Registry("shape")
    >>> @shapes.register("box")
    ... def box(data, *, side: float = 1.0):
    ...     "A box."
    >>> shapes.options("box")
    {'side': (<class 'float'>, 1.0)}
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[E], E]:
        def add(entry: E) -> E:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry  # type: ignore[assignment]
            return entry

        return add

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def get(self, name: str, *, where: str = "") -> T:
        """The entry, or a RecipeError that offers the nearest name."""
        if name not in self._entries:
            raise RecipeError(f"there is no {self.kind} «{name}»", where=where, do=nearest(name, self._entries))
        return self._entries[name]

    def options(self, name: str) -> dict[str, tuple[Any, Any]]:
        """Keyword-only parameters of an entry: name → (type, default)."""
        entry = self.get(name)
        hints = typing.get_type_hints(entry, include_extras=True)  # limits too
        return {
            p.name: (hints.get(p.name, Any), p.default)
            for p in inspect.signature(entry).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }

    def check(self, name: str, config: dict[str, Any], *, where: str = "") -> dict[str, Any]:
        """`config` with types checked and defaults filled in; unknown keys are errors."""
        options = self.options(name)
        for key in config:
            if key not in options:
                raise RecipeError(
                    f"{self.kind} «{name}» has no option «{key}»",
                    where=where,
                    do=nearest(key, options) if options else "it has none",
                )
        out = {}
        for key, (kind, default) in options.items():
            if key not in config:
                if default is inspect.Parameter.empty:
                    raise RecipeError(
                        f"{self.kind} «{name}» needs «{key}»",
                        where=where,
                        do=f"write {{{name}: {{{key}: …}}}}: {type_name(kind)}",
                    )
                out[key] = default
                continue
            try:
                out[key] = pydantic.TypeAdapter(kind).validate_python(config[key])
            except pydantic.ValidationError:
                raise RecipeError(
                    f"{self.kind} «{name}»: {key} = {value(config[key])} does not fit",
                    where=where,
                    do=f"it takes: {type_name(kind)}",
                ) from None
        return out
