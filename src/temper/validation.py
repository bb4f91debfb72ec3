"""Values of a recipe against the fields of a pydantic model; what is wrong becomes one error that names its line."""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from typing import Any

import pydantic

from temper import wording
from temper.errors import RecipeError, nearest
from temper.overlay import KeyPath
from temper.registry import Registry


def validated(
    kind: Any,
    values: dict[str, Any],
    at: KeyPath,
    lines: dict[KeyPath, str],
    *,
    also: Sequence[str] = (),
    others: Registry[Any] | None = None,
) -> Any:
    """`values` as an instance of the pydantic model `kind`.

    Args:
        at: where they stand in the recipe.
        lines: key → file and line.
        also: keys that may stand there beside the fields of `kind`.
        others: models whose fields may have been meant: an unknown key that is one of theirs is said to be.

    Raises:
        RecipeError: an unknown key (with the nearest known one), a missing one, a value that does not fit.
    """
    try:
        return kind.model_validate(values)
    except RecipeError as error:  # of a field's own check, which knows the key and not the line
        keys = (*at, *error.where.split(".")) if error.where else at
        raise RecipeError(error.what, where=_line(keys, lines), do=error.do) from None
    except pydantic.ValidationError as error:
        errors = error.errors()  # a misspelt key may also be a missing one: the first says what to do
        first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    loc = tuple(str(p) for p in first["loc"])
    where = _line(at + loc, lines)
    prefix = at[1:] if at[:1] == ("stages",) else at
    if first["type"] == "literal_error" and loc[-1:] == ("[key]",):  # of a mapping with keys of its own
        known = re.findall(r"'([^']+)'", first.get("ctx", {}).get("expected", ""))
        key = ".".join(prefix + loc[:-1])
        raise RecipeError(f"unknown key «{key}»", where=_line(at + loc[:-1], lines), do=nearest(loc[-2], known))
    if first["type"] == "extra_forbidden":
        known = _known_keys(kind, loc, also)
        do = nearest(loc[-1], known)
        owners = [n for n in others if loc[0] in others.get(n).model_fields] if others and len(loc) == 1 else []
        if owners:  # a list of all keys would say less
            close = f"; here {do}" if do.startswith("did") else ""
            do = f"«{loc[0]}» is a key of stages of kind {', '.join(owners)}{close}"
        raise RecipeError(f"unknown key «{'.'.join(prefix + loc)}»", where=where, do=do)
    if first["type"] == "missing":
        name = ".".join(prefix + loc)
        raise RecipeError(f"«{name}» is missing", where=where, do=f"see `temper explain {loc[-1]}`")
    raise _unfit(kind, first, prefix, values, where)


def _line(keys: KeyPath, lines: dict[KeyPath, str]) -> str:
    """File and line of a key, or of the nearest one above it that has a line."""
    return next((lines[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in lines), "")


def _unfit(kind: Any, error: Any, prefix: KeyPath, values: dict[str, Any], where: str) -> RecipeError:
    """A value of a wrong type, or out of bounds: what it is, and what the field takes."""
    at_top = not prefix  # «stages.sft» is explained under «stages»
    path, annotation, marks, given = list[str](), Any, [], values
    for part in error["loc"]:  # as far as keys of the recipe go; then come the branches of a union
        if not isinstance(given, dict) or part not in given:
            break
        field = getattr(kind, "model_fields", {}).get(part)
        # of a field: its type; of a key of one's own choice, such as a stage's name: that of the values
        annotation, marks = (
            (field.annotation, field.metadata) if field else ((typing.get_args(annotation)[-1:] or (Any,))[0], [])
        )
        path.append(str(part))
        given, kind = given[part], next(iter(wording.models_within(annotation)), None)
    name = ".".join([*prefix, *path])
    what = f"{name} = {wording.value(given)} does not fit"
    if error["type"] in ("value_error", "assertion_error"):  # in words of the field's own check
        if isinstance(given, dict):  # of several keys together: none of them alone is wrong
            what = name or "the recipe"
        return RecipeError(f"{what}: {error['msg'].partition(', ')[2]}", where=where, do=_explained(path))
    index = next((p for p in error["loc"][len(path) :] if isinstance(p, int)), None)
    part = "" if index is None else f" (its entry {index + 1})"
    keys = f" of {', '.join(kind.model_fields)}" if kind else ""
    takes = f"it takes: {wording.bounded(annotation, marks)}{keys}"
    return RecipeError(f"{what}{part}", where=where, do=f"{takes}; {_explained(path[:1] if at_top else path)}")


def _explained(path: list[str]) -> str:
    return f"see `temper explain {'.'.join(path[-2:])}`" if path else "see docs/recipes.md"


def _known_keys(kind: Any, loc: KeyPath, also: Sequence[str]) -> list[str]:
    """Field names of the model that stands at `loc` within `kind`."""
    for part in loc[:-1]:
        field = getattr(kind, "model_fields", {}).get(part)
        if field is not None:  # else an index, or the name that pydantic gives to a union's branch
            kind = next(iter(wording.models_within(field.annotation)), kind)
    return [*kind.model_fields, *(also if len(loc) == 1 else ())]
