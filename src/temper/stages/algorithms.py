"""What a name in `algorithm:` stands for: a loss, an advantage, an averaging and a KL term, as its paper has them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

from temper.advantages import advantages
from temper.errors import RecipeError
from temper.losses import policy_losses
from temper.registry import Registry

Average = Literal["sequence", "token", "sum", "constant"]


@dataclasses.dataclass(frozen=True)
class Usual:
    """Fields of the stage that an algorithm sets where the recipe does not."""

    advantage: dict[str, Any]
    average: Average
    kl: dict[str, Any]
    mask_cut: bool = False


_NO_KL = {"beta": 0.0}
USUAL: dict[str, Usual] = {
    "grpo": Usual({"group": {}}, "sequence", {"beta": 0.04, "place": "loss"}),
    "dr_grpo": Usual({"group": {"scale": "none"}}, "constant", _NO_KL),
    "dapo": Usual({"group": {}}, "token", _NO_KL, mask_cut=True),
    "gspo": Usual({"group": {}}, "sequence", _NO_KL),
    "cispo": Usual({"group": {}}, "token", _NO_KL),
    "rloo": Usual({"leave_one_out": {}}, "sum", {"beta": 0.05, "place": "reward"}),
    "reinforce": Usual({"baseline": {}}, "sum", {"beta": 0.05, "place": "reward"}),
    "reinforce++": Usual({"global": {}}, "sequence", {"beta": 0.01, "place": "reward", "level": "token"}),
}


def filled(given: dict[str, Any]) -> dict[str, Any]:
    """A recipe's fields with those that its algorithm sets.

    Raises:
        RecipeError: an unknown algorithm; a KL term without a weight, beside an algorithm that has none.
    """
    algorithm = given.get("algorithm", "grpo")
    name, _ = named(policy_losses, algorithm, "algorithm")
    _check_place(given, policy_losses, "algorithm", name)
    advantage, _ = named(advantages, given.get("advantage", USUAL[name].advantage), "advantage")
    _check_place(given, advantages, "advantage", advantage)
    usual, kl = USUAL[name], given.get("kl", {})
    out = {"advantage": usual.advantage, "average": usual.average, "mask_cut": usual.mask_cut, **given}
    if isinstance(kl, dict):
        if kl and "beta" not in kl and not usual.kl["beta"]:
            raise RecipeError(
                f"algorithm: {name} has no KL term, and kl says how one is to be but not how much it weighs",
                where="kl",
                do="kl: {beta: 0.04, …}, or leave kl out",
            )
        out["kl"] = {**usual.kl, **kl}
    return out


def _check_place(given: dict[str, Any], registry: Registry[Any], field: str, name: str) -> None:
    """RecipeError where an option of what `field` names stands beside it: no key of a stage is called like one."""
    for option in registry.options(name):
        if option in given:
            raise RecipeError(
                f"«{option}» is an option of the {registry.kind} «{name}», not a key of the stage",
                where=option,
                do=f"{field}: {{{name}: {{{option}: …}}}}, or --set STAGE.{field}.{name}.{option}=…",
            )


def named(registry: Registry[Any], value: Any, field: str) -> tuple[str, dict[str, Any]]:
    """A name or {name: {option: value}} of a recipe → the name and all its options."""
    if isinstance(value, dict) and len(value) == 1:
        [(name, options)] = value.items()
    else:
        name, options = value, {}
    if not isinstance(name, str) or not isinstance(options, dict | None):
        raise RecipeError(
            f"{value!r} is not one {registry.kind}", where=field, do="write a name, or {name: {option: value}}"
        )
    registry.get(name, where=field)  # its error offers the nearest name
    return name, registry.check(name, options or {}, where=field)


def configured(registry: Registry[Any], value: Any, field: str) -> Callable[..., Any]:
    """A function of a registry with the options of the recipe."""
    name, options = named(registry, value, field)
    return functools.partial(registry.get(name), **options)


def compares(advantage: Any) -> Literal["group", "batch", "nothing", "past"]:
    """Whose rewards an advantage sets a completion's against: its prompt's, its rollout's, none, or earlier ones'."""
    name, options = named(advantages, advantage, "advantage")
    if name in ("group", "leave_one_out") or options["mean"] == "group":
        return "group"
    return {"batch": "batch", "none": "nothing", "running": "past"}[options["mean"]]  # type: ignore[return-value]


def check(algorithm: Any, advantage: Any, average: Average, *, completions: int, batch: int, updates: int) -> None:
    """What cannot go together.

    Args:
        completions: of one prompt.
        batch: completions of a rollout.
        updates: optimiser steps that a rollout serves.

    Raises:
        RecipeError: see each.
    """
    name, _ = named(policy_losses, algorithm, "algorithm")
    against = compares(advantage)
    if completions == 1 and against == "group":
        raise RecipeError(
            f"completions: 1 gives groups of one, whose advantage is always 0: {named(advantages, advantage, '')[0]} "
            "compares the completions of one prompt",
            where="completions",
            do="ask for 2 or more (8 is usual), or algorithm: reinforce, which needs no groups",
        )
    if batch == 1 and against == "batch":
        raise RecipeError(
            "a rollout of one completion has nothing to compare it with: its advantage is always 0",
            where="batch_size",
            do="a larger batch_size, or advantage: {baseline: {mean: running}}",
        )
    if name == "reinforce" and updates > 1:
        raise RecipeError(
            f"reinforce has no ratio that corrects for samples of earlier weights, and a rollout serves {updates} steps",
            where="rollout_steps",
            do="rollout_steps: 1 and iterations: 1; or rloo, cispo or grpo, which have one",
        )
    if name == "gspo" and average != "sequence":
        raise RecipeError(
            f"gspo has one ratio a completion, and average: {average} would count it once a token",
            where="average",
            do="average: sequence, or algorithm: grpo or dapo, whose ratios are of tokens",
        )
