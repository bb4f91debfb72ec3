"""What a sweep varies and what it measures, as a recipe writes them."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from pydantic import model_validator

from temper.errors import RecipeError
from temper.recipe import Config, detail

Settings = dict[str, Any]  # field → value


class Range(Config):
    """Values between two bounds, which random search and TPE draw from: whole numbers where both bounds are."""

    low: int | float = detail(..., "The lowest value.")
    high: int | float = detail(..., "The highest value.")
    log: bool = detail(False, "Draw on a logarithmic scale: right for learning rates and weights of penalties.")

    @model_validator(mode="after")
    def _sound(self) -> Range:
        if not self.low < self.high:
            what = f"vary: low {self.low:g} is not below high {self.high:g}"
            raise RecipeError(what, where="vary", do="give the lower end first")
        if self.log and self.low <= 0:
            what = f"vary: a logarithmic scale begins above 0, not at {self.low:g}"
            raise RecipeError(what, where="vary", do="a low above 0, or log: false")
        return self

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def some(self) -> list[int | float]:
        """Both ends and one between them."""
        middle = self.low + (self.high - self.low) * 0.37
        return [self.low, self.high, round(middle) if self.whole else middle]


class Choices(Config):
    """A list of values under a name."""

    choices: list[Any] = detail(..., "The values.", min_length=1)


Space = dict[str, Range | list[Any]]


def grid(space: Space) -> list[Settings]:
    """Every combination, the last field fastest.

    >>> grid({"sft.lr": [1, 2], "sft.epochs": [3]})
    [{'sft.lr': 1, 'sft.epochs': 3}, {'sft.lr': 2, 'sft.epochs': 3}]
    """
    values = [s if isinstance(s, list) else s.some() for s in space.values()]
    return [dict(zip(space, combination, strict=True)) for combination in itertools.product(*values)]


class Measure(NamedTuple):
    """A score of an evaluation: STAGE.MODEL.METRIC."""

    stage: str
    model: str
    metric: str

    def __str__(self) -> str:
        return ".".join(self)

    @staticmethod
    def read(text: str) -> Measure:
        """A model may have dots in its name, a stage and a metric have none.

        >>> Measure.read("compare.org/gpt-2.5.kl").model
        'org/gpt-2.5'
        """
        stage, _, rest = text.partition(".")
        model, _, metric = rest.rpartition(".")
        if not (stage and model and metric):
            raise RecipeError(
                f"«{text}» is no STAGE.MODEL.METRIC", where="measure", do="such as compare.rloo.reward_mean"
            )
        return Measure(stage, model, metric)
