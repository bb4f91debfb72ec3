"""Types and values as errors and `temper explain` write them."""

from __future__ import annotations

import types
import typing
from typing import Any

import annotated_types
import pydantic

WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "anything"}
LONGEST = 60  # characters of a value in an error


def type_name(annotation: Any) -> str:
    """A type in words.

    >>> type_name(int | None), type_name(list[str]), type_name(typing.Literal["a", "b"])
    ('whole number or null', 'list of text', 'a | b')
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return bounded(args[0], args[1:])
    if origin is typing.Literal:
        return " | ".join(str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in args)
    if origin is list:
        entry = type_name(args[0])
        return f"list of ({entry})" if " or " in entry else f"list of {entry}"
    if origin is tuple:
        return f"[{', '.join(type_name(a) for a in args)}]"
    if origin is dict or models_within(annotation):
        return "mapping"
    return WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def bounded(annotation: Any, marks: typing.Iterable[Any]) -> str:
    """A type in words, and its limits.

    >>> bounded(float, [annotated_types.Gt(0)])
    'number, > 0'
    """
    return ", ".join([type_name(annotation), *(text for m in marks if (text := _bound(m)))])


def models_within(annotation: Any) -> list[type[pydantic.BaseModel]]:
    """The mappings within a type: `Adapter | None` → [Adapter]."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [m for a in typing.get_args(annotation) for m in models_within(a)]


def value(given: Any) -> str:
    """A value as it was given, cut where it is long.

    >>> value("quick"), value(["a" * 99])[-5:]
    ("'quick'", 'aaaa…')
    """
    text = repr(given)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _bound(mark: Any) -> str:
    """A limit on a value, in signs."""
    for kind, name, sign in (
        (annotated_types.Ge, "ge", "≥"), (annotated_types.Gt, "gt", ">"),
        (annotated_types.Le, "le", "≤"), (annotated_types.Lt, "lt", "<"),
    ):  # fmt: skip
        if isinstance(mark, kind):
            return f"{sign} {getattr(mark, name)}"
    pattern = getattr(mark, "pattern", None)
    return " | ".join(pattern.strip("^$()").replace("\\", "").split("|")) if isinstance(pattern, str) else ""
