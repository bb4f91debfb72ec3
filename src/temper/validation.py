"""Values of a recipe against the fields of a pydantic model; what is wrong becomes one error that names its line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pydantic

from temper.errors import RecipeError, nearest
from temper.overlay import KeyPath


def validated(
    kind: Any, values: dict[str, Any], at: KeyPath, lines: dict[KeyPath, str], *, also: Sequence[str] = ()
) -> Any:
    """`values` as an instance of the pydantic model `kind`.

    Args:
        at: where they stand in the recipe.
        lines: key → file and line.
        also: keys that may stand there beside the fields of `kind`.

    Raises:
        RecipeError: an unknown key (with the nearest known one), a missing one, a value that does not fit.
    """
    try:
        return kind.model_validate(values)
    except pydantic.ValidationError as error:
        errors = error.errors()  # a misspelt key may also be a missing one: the first says what to do
        first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
        loc = tuple(str(p) for p in first["loc"])
        where = next((lines[at + loc[:n]] for n in range(len(loc), -1, -1) if at + loc[:n] in lines), "")
        name = ".".join((at[1:] if at[:1] == ("stages",) else at) + loc)
        if first["type"] == "extra_forbidden":
            raise RecipeError(
                f"unknown key «{name}»", where=where, do=nearest(loc[-1], _known_keys(kind, first["loc"], also))
            ) from None
        if first["type"] == "missing":
            raise RecipeError(
                f"«{name}» is missing", where=where, do=f"see `temper explain {name.split('.')[-1]}`"
            ) from None
        raise RecipeError(f"{name} = {first['input']!r} does not fit: {first['msg']}", where=where) from None


def _known_keys(kind: Any, loc: tuple[str | int, ...], also: Sequence[str]) -> list[str]:
    """Field names of the model that stands at `loc` within `kind`."""
    for part in loc[:-1]:
        field = getattr(kind, "model_fields", {}).get(str(part))
        if field is None:
            continue  # an index, or the name that pydantic gives to a union's branch
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        kind = next((o for o in options if isinstance(o, type) and issubclass(o, pydantic.BaseModel)), kind)
    return [*kind.model_fields, *(also if len(loc) == 1 else ())]
