"""What a recipe's `loss` of a preference stage stands for: one loss, or several with weights, checked."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

import temper.losses.reference_free  # noqa: F401  fills the registry
from temper.errors import RecipeError, nearest
from temper.losses.preference import Compared, preference_losses
from temper.losses.unpaired import unpaired_losses

# Losses that do not read the reference's log-probabilities.
REFERENCE_FREE = frozenset({"sft", "simpo", "orpo", "cpo"})
# Losses in which the value of a pair depends on the other pairs of the optimiser step: it must not be cut.
COUPLED = frozenset({"aot", "aot_unpaired", "bco_pair", "kto"})


@dataclasses.dataclass(frozen=True)
class Part:
    """One loss of a mixture, all its options filled in."""

    name: str
    weight: float
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Σ weight·loss over its parts, a function of pairs. Weights are not made to sum to 1."""

    parts: tuple[Part, ...]

    def __call__(self, pairs: Compared) -> torch.Tensor:
        """Values [P], unreduced, with gradient."""
        values = [p.weight * preference_losses.get(p.name)(pairs, **p.options) for p in self.parts]
        return torch.stack(values).sum(0)

    @property
    def reference_free(self) -> bool:
        """Whether no part reads the reference."""
        return all(p.name in REFERENCE_FREE for p in self.parts)

    @property
    def coupled(self) -> bool:
        """Whether a part needs all pairs of the optimiser step at once."""
        return any(p.name in COUPLED and p.options.get("delta", "batch") == "batch" for p in self.parts)


def mixture(spec: Any, *, where: str = "loss") -> Mixture:
    """A recipe's loss of pairs: a name, {name: {option: value}}, or a list of these, each with a weight beside it.

    Raises:
        RecipeError: an unknown name or option, a value that does not fit, a loss twice, a loss of single answers.

    >>> mix = mixture([{"sigmoid": {"beta": 0.5}, "weight": 0.8}, "sft"])
    >>> [(p.name, p.weight) for p in mix.parts], mix.reference_free, mix.coupled
    ([('sigmoid', 0.8), ('sft', 1.0)], False, False)
    """
    parts = parts_of(spec, where=where)
    if parts[0].name in unpaired_losses:
        raise RecipeError(f"the loss «{parts[0].name}» takes rows with a label, not pairs", where=where, do="rows need completion and label")  # fmt: skip
    return Mixture(parts)


def unpaired(spec: Any, *, where: str = "loss") -> Callable[..., torch.Tensor] | None:
    """A recipe's loss of single answers with its options bound; None where the recipe names a loss of pairs.

    Raises:
        RecipeError: as `mixture`.
    """
    part, *_ = parts_of(spec, where=where)
    return functools.partial(unpaired_losses.get(part.name), **part.options) if part.name in unpaired_losses else None


def parts_of(spec: Any, *, where: str = "loss") -> tuple[Part, ...]:
    """What a recipe's `loss` names, in its order: losses of pairs, or one loss of single answers alone."""
    entries = spec if isinstance(spec, list | tuple) else [spec]
    parts = tuple(_part(entry, where) for entry in entries)
    if not parts:
        raise RecipeError("the list of losses is empty", where=where, do="name a loss: sigmoid is DPO's")
    for k, part in enumerate(parts):
        if part.name in {p.name for p in parts[:k]}:
            raise RecipeError(f"the loss «{part.name}» stands twice", where=where, do="leave one; its weight says how much it counts")  # fmt: skip
    alone = next((p for p in parts if p.name in unpaired_losses), None)
    if alone and (len(parts) > 1 or alone.weight != 1):
        raise RecipeError(
            f"the loss «{alone.name}» takes single answers and stands alone, without a weight",
            where=where,
            do=f"write {alone.name}, or losses of pairs alone",
        )
    return parts


def _part(entry: Any, where: str) -> Part:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict):
        raise _unreadable(entry, where)
    names = [str(k) for k in entry if k != "weight"]
    known = [n for n in names if n in preference_losses or n in unpaired_losses]
    if len(names) > 1 and len(known) == 1:
        raise _beside(known[0], next(n for n in names if n not in known), where)
    if len(names) != 1 or not isinstance(entry[names[0]], dict | None):
        raise _unreadable(entry, where)
    [name] = names
    if not known:
        raise _unknown(name, where)
    table = preference_losses if name in preference_losses else unpaired_losses
    return Part(name, _weight(entry.get("weight", 1.0), name, where), table.check(name, entry[name] or {}, where=where))


def _weight(given: Any, name: str, where: str) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < math.inf:
        raise RecipeError(
            f"the loss «{name}»: weight = {given!r} does not fit", where=where, do="it takes: number, > 0"
        )
    return float(given)


def _unknown(name: str, where: str) -> RecipeError:
    known = [*preference_losses, *unpaired_losses]
    do = "DPO's loss is called «sigmoid»" if name.lower() == "dpo" else nearest(name, known)
    return RecipeError(f"there is no preference loss «{name}»", where=where, do=do)


def _beside(name: str, other: str, where: str) -> RecipeError:
    """An option, or a misspelt weight, on the wrong level."""
    table = preference_losses if name in preference_losses else unpaired_losses
    close = nearest(other, ["weight", *table.options(name)])
    if option := next((o for o in table.options(name) if f"«{o}»" in close), None):
        close = f"options stand within the loss: {{{name}: {{{option}: …}}}}"
    return RecipeError(f"unknown key «{other}» beside the loss «{name}»", where=where, do=close)


def _unreadable(entry: Any, where: str) -> RecipeError:
    return RecipeError(
        f"{entry!r} is not a loss",
        where=where,
        do="write a name, {NAME: {option: value}}, or a list of {NAME: {option: value}, weight: 1.0}",
    )
