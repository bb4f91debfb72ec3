"""What the stages of a recipe name of one another: whether it is there, and of the right kind."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper import address
from temper.errors import RecipeError, nearest
from temper.overlay import KeyPath

if TYPE_CHECKING:
    from temper.recipe import Recipe

SPLITS = ("train", "validation", "test")
ALSO = {"reward": ("classifier",)}  # the logit of a classifier's label is a reward


def check(recipe: Recipe, lines: dict[KeyPath, str], path: Path) -> None:
    """Every reference of every stage, and what a stage checks of the whole recipe itself.

    Args:
        lines: key → file and line.
        path: the recipe's file, for keys that have no line.

    Raises:
        RecipeError: a name that is wrong for sure, with its line and the nearest right one.
    """
    for name, stage in recipe.stages.items():
        for field, gives, value in stage.refs():
            where = lines.get(("stages", name, field), str(path))
            if gives == "data":
                _check_data(recipe, name, value, where)
                continue
            if value == "base":
                if gives != "model":
                    do = "name a stage, a folder or a hub id"
                    what = "reward model" if gives == "reward" else gives
                    raise RecipeError(f"the base model is no {what}", where=where, do=do)
                if recipe.model is None:
                    raise RecipeError(
                        f"stage «{name}» uses «base» but the recipe has no «model»",
                        where=where,
                        do="add model: FOLDER or model: ORG/NAME at the top of the recipe, or --set model=…",
                    )
            named = recipe.model or "" if value == "base" else value
            if address.endpoint(named, where=where) and field not in stage.asks:
                raise RecipeError(
                    f"stage «{name}» needs the weights of its {field}, and an endpoint gives only text: {named}",
                    where=where,
                    do="name a stage, a folder or a hub id; endpoints can be evaluated, and write data (generate)",
                )
            _check_model(recipe, named, gives, lines.get(("model",), where) if value == "base" else where)
        try:
            stage.check(recipe)
        except RecipeError as error:
            raise RecipeError(error.what, where=lines.get(("stages", name), str(path)), do=error.do) from None


def _check_data(recipe: Recipe, name: str, value: str, where: str) -> None:
    """STAGE or STAGE.SPLIT, which stage `name` reads."""
    target, _, split = value.partition(".")
    givers = [n for n, s in recipe.stages.items() if s.gives == "data"]
    if target not in givers:
        do = nearest(target, givers) if givers else "add a stage that makes data (stage: data)"
        raise RecipeError(f"«{value}» is no stage that makes data", where=where, do=do)
    if split and split not in SPLITS:
        close = difflib.get_close_matches(split, SPLITS, n=1)
        do = f"did you mean «{target}.{close[0]}»?" if close else f"splits: {', '.join(SPLITS)}"
        raise RecipeError(f"«{value}»: there is no split «{split}»", where=where, do=do)
    stage: Any = recipe.stages[name]
    if getattr(recipe.stages[target], "stream", None) is not None and not stage.streams:
        reads = [split] if split else stage.trains_on or ([stage.reads_split] if stage.reads_split else getattr(stage, "splits", None) or SPLITS)
        if "train" in reads:
            raise RecipeError(
                f"«{target}» is a stream, and stage «{name}» reads its split train: sft alone trains on one",
                where=where, do="a data stage without stream, and with take",
            )  # fmt: skip
    trains_on = stage.trains_on
    if split and trains_on and split not in trains_on:
        if split == "test":
            raise RecipeError(
                f"stage «{name}» trains, and «{value}» is the test split",
                where=where,
                do=f"data: {target}, whose split train it reads; evaluate it instead: an evaluation with data: {value}",
            )
        raise RecipeError(
            f"stage «{name}» trains on {target}.{trains_on[0]} and holds «{value}» out",
            where=where,
            do=f"data: {target}",
        )
    read = split or recipe.stages[name].reads_split
    if read and getattr(recipe.stages[target], read, None) == 0:
        raise RecipeError(
            f"stage «{name}» reads «{target}.{read}», and «{target}» has {read}: 0",
            where=where,
            do=f"give {target}.{read} a share or a number of rows, or name another split",
        )


def _check_model(recipe: Recipe, value: str, gives: str, where: str) -> None:
    """A model's name that is wrong for sure. Whether a folder or the hub has it is asked when a stage needs it."""
    givers = [n for n, s in recipe.stages.items() if s.gives in (gives, *ALSO.get(gives, ()))]
    if value in recipe.stages:
        if value not in givers:
            kind = f"it is of kind {recipe.stages[value].kind}"
            do = f"{kind}; stages that do: {', '.join(givers) or 'none'}"
            raise RecipeError(f"stage «{value}» gives no {gives}", where=where, do=do)
        return
    places = [recipe.folder / Path(value).expanduser(), Path(value).expanduser()]
    if any(place.exists() for place in places) or address.endpoint(value):
        return
    if "/" not in value:
        beside = [p.name for p in recipe.folder.iterdir() if p.is_dir()] if recipe.folder.is_dir() else []
        known = [*givers, "base"] if gives == "model" else givers
        if close := difflib.get_close_matches(value, known, n=1):
            raise RecipeError(f"there is no {gives} «{value}»", where=where, do=f"did you mean «{close[0]}»?")
        if close := difflib.get_close_matches(value, beside, n=1, cutoff=0.8):  # short hub ids are words such as gpt2
            do = f"did you mean the folder {close[0]}? What is no folder here is taken for a hub id"
            raise RecipeError(f"there is no {gives} «{value}»", where=where, do=do)
