"""The table of metrics: what a metric's file imports to enter it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from temper.registry import Registry
from temper.types import Scores

Metric = Callable[..., dict[str, Scores]]
Reads = Literal["text", "likelihood", "pairs", "toxicity", "reward", "judge", "kl"]

registry: Registry[Metric] = Registry("metric")


class Declared(NamedTuple):
    """What must be known of a metric before there are outputs."""

    reads: Reads
    gives: Callable[..., list[str]]  # options → names of the scores
    also: tuple[str, ...]  # scores that it gives besides where the outputs allow them


declared: dict[str, Declared] = {}


def register(
    name: str, *, reads: Reads = "text", gives: Callable[..., list[str]] | None = None, also: tuple[str, ...] = ()
) -> Callable[[Metric], Metric]:
    """Decorator that enters a metric under `name`.

    Args:
        reads: "text" if it needs predictions generated, "toxicity" if it needs a classifier's judgement of them too,
            "reward" if it needs a reward model's, "judge" if it needs them set against another model's, "kl" if it needs
            the predictions' divergence; "likelihood" if it reads `nll` and `tokens` instead, "pairs" if it reads `pairs`.
        gives: maps the options (as keyword arguments) to the names of the scores returned; by default `name` alone.
        also: names of scores that it gives besides where the outputs allow them.
    """

    def add(metric: Metric) -> Metric:
        registry.register(name)(metric)
        declared[name] = Declared(reads, gives or (lambda **options: [name]), also)
        return metric

    return add
