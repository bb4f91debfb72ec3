"""A metric is a pure function of `Outputs` and its own options, and gives statistics of single rows, never their sum.

Adding one is one function in one file of this folder, and its file among the imports here:

    @metrics.register("shorter")
    def shorter(outputs: Outputs, *, characters: int = 100) -> dict[str, Scores]:
        "Share of predictions with fewer characters."      ← the line that `temper list metrics` prints

Keyword-only parameters are its configuration. A recipe asks for metrics as a list of names, each with options or
without: `[loss, rougeL, {rouge: {variant: [rouge1, rouge2], stem: true}}]`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from temper.errors import DataError, RecipeError
from temper.metrics import (  # noqa: F401 (each registers its own)
    answers,
    corpus,
    diversity,
    lexicon,
    likelihood,
    meteor,
    preference,
    reward,
    rouge,
    text,
    toxicity,
)
from temper.metrics.table import declared, register, registry
from temper.types import Outputs, Scores

__all__ = [
    "Request",
    "Spec",
    "asks_of_classifier",
    "asks_of_judge",
    "asks_of_reward_model",
    "compute",
    "describe",
    "names",
    "needs_kl",
    "needs_likelihood",
    "needs_pairs",
    "needs_text",
    "read",
    "register",
    "registry",
]

Spec = Sequence[str | dict[str, Any]]


class Request(NamedTuple):
    """One entry of a recipe's list, checked: the metric, its options with defaults, the names it will give."""

    name: str
    options: dict[str, Any]
    gives: list[str]


def read(spec: Spec, *, where: str = "") -> list[Request]:
    """A recipe's list of metrics, checked; call it before training, since all that can be wrong in it shows here.

    Raises:
        RecipeError: an unknown metric or option, an entry that is not one metric, two entries giving the same name.
    """
    requests: list[Request] = []
    owners: dict[str, str] = {}
    for entry in spec:
        name, options = _entry(entry, where)
        registry.get(name, where=where)  # its error offers the nearest name
        options = registry.check(name, options, where=where)
        request = Request(name, options, declared[name].gives(**options))
        if not request.gives:
            raise RecipeError(
                f"metric «{name}» with {options} gives no score", where=where, do="leave it out or ask more"
            )
        for given in (*request.gives, *declared[name].also):
            if given in owners:
                raise RecipeError(
                    f"«{given}» is asked for twice, by «{owners[given]}» and «{name}»", where=where, do="leave one"
                )
            owners[given] = name
        requests.append(request)
    if len(asking := [r.name for r in requests if declared[r.name].reads == "toxicity"]) > 1:
        raise RecipeError(
            f"{' and '.join(asking)} ask one classifier each, and an evaluation has one",
            where=where,
            do="evaluate in two stages",
        )
    return requests


def _entry(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, dict) and len(entry) == 1:
        [(name, options)] = entry.items()
        if isinstance(name, str) and (options is None or isinstance(options, dict)):
            return name, options or {}
    raise RecipeError(
        f"{entry!r} is not a metric", where=where, do="write a name, or a name with its options: {rouge: {stem: true}}"
    )


def names(spec: Spec) -> list[str]:
    """Names of the scores that a recipe's list gives, those included that not all outputs allow."""
    return [name for request in read(spec) for name in (*request.gives, *declared[request.name].also)]


def needs_likelihood(spec: Spec) -> bool:
    """Whether any metric reads `outputs.nll`."""
    return any(declared[request.name].reads == "likelihood" for request in read(spec))


def needs_text(spec: Spec) -> bool:
    """Whether any metric needs predictions generated."""
    return any(declared[request.name].reads not in ("likelihood", "pairs") for request in read(spec))


def needs_pairs(spec: Spec) -> bool:
    """Whether any metric reads `outputs.pairs`."""
    return any(declared[request.name].reads == "pairs" for request in read(spec))


def needs_kl(spec: Spec) -> bool:
    """Whether any metric reads `outputs.kl`."""
    return any(declared[request.name].reads == "kl" for request in read(spec))


def asks_of_classifier(spec: Spec) -> dict[str, Any] | None:
    """The options of the metric (toxicity or style) that reads `outputs.toxicity`; None where none does."""
    return next((r.options for r in read(spec) if declared[r.name].reads == "toxicity"), None)


def asks_of_judge(spec: Spec) -> dict[str, Any] | None:
    """The options of the metric that reads `outputs.wins`; None where none does."""
    return next((r.options for r in read(spec) if declared[r.name].reads == "judge"), None)


def asks_of_reward_model(spec: Spec) -> bool:
    """Whether any metric reads `outputs.rewards`, or wins that follow from them."""
    duel = asks_of_judge(spec)
    by_reward = duel is not None and duel["judge"] == preference.REWARD_MODEL
    return by_reward or any(declared[request.name].reads == "reward" for request in read(spec))


def compute(spec: Spec, outputs: Outputs, *, where: str = "") -> dict[str, Scores]:
    """Scores by name, in the order asked for.

    Raises:
        RecipeError: as `read`.
        DataError: there are no rows.
        ValueError: `outputs` lacks what a metric reads, or its columns differ in length.
    """
    requests = read(spec, where=where)
    _check_lengths(outputs, where)
    scores: dict[str, Scores] = {}
    for name, options, gives in requests:
        given = registry.get(name)(outputs, **options)
        if [score for score in given if score not in declared[name].also] != gives:
            raise ValueError(f"metric {name!r} declared {gives} and gave {list(given)}")
        scores |= given
    return scores


def _check_lengths(outputs: Outputs, where: str) -> None:
    columns = [outputs.prompts, outputs.predictions, outputs.references, outputs.ended, outputs.nll, outputs.tokens,
               outputs.toxicity, outputs.kl, outputs.rewards, outputs.second_rewards, outputs.pairs, outputs.pair_tokens,
               outputs.reference_pairs, outputs.wins]  # fmt: skip
    lengths = {len(column) for column in columns if column is not None}
    if len(lengths) > 1:
        raise ValueError(f"columns of outputs differ in length: {sorted(lengths)}")
    if lengths == {0}:
        raise DataError("there are no rows to score", where=where, do="check the split and what was dropped from it")


def describe() -> dict[str, str]:
    """Metric → one line on it (the first of its docstring), for `temper list metrics`."""
    return {name: (inspect.getdoc(registry.get(name)) or "").partition("\n")[0] for name in registry}
