"""The table of metrics: what a metric's file imports to enter it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from temper.registry import Registry
from temper.types import Scores

Metric = Callable[..., dict[str, Scores]]

registry: Registry[Metric] = Registry("metric")


class Declared(NamedTuple):
    """What must be known of a metric before there are outputs."""

    reads: Literal["text", "likelihood"]
    gives: Callable[..., list[str]]  # options → names of the scores


declared: dict[str, Declared] = {}


def register(
    name: str, *, reads: Literal["text", "likelihood"] = "text", gives: Callable[..., list[str]] | None = None
) -> Callable[[Metric], Metric]:
    """Decorator that enters a metric under `name`.

    Args:
        reads: "text" if it needs predictions generated, "likelihood" if it reads `nll` and `tokens` instead.
        gives: maps the options (as keyword arguments) to the names of the scores returned; by default `name` alone.
    """

    def add(metric: Metric) -> Metric:
        registry.register(name)(metric)
        declared[name] = Declared(reads, gives or (lambda **options: [name]))
        return metric

    return add
