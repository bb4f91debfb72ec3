"""What an evaluation says when it ends: tables that fit a terminal, and what is odd about its answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from temper import terminal
from temper.types import Outputs

NONE = "–"
LONGEST = 28  # characters of a model's name in a table


def tables(entry: dict[str, Any], alpha: float = 0.05) -> str:
    """evaluation.json as lines of at most 80 characters: values, comparisons, and the spread over seeds."""
    parts = [*_values(entry["models"]), *_comparisons(entry, alpha), *_spread(entry["spread"])]
    return "\n\n".join("\n".join(part) for part in parts)


def oddities(name: str, outputs: Outputs) -> Iterator[str]:
    """Sentences on answers that hardly depend on the question: a score of them says little of the model.

    Empty ones are told where they are more than half; equal ones where they are more than half and the references are
    not so alike (the commonest is a quarter at most), or where they are all equal and the references are not.
    """
    n = len(outputs.predictions)
    answers, references = Counter(outputs.predictions), Counter(outputs.references)
    empty = answers.pop("", 0)
    if empty > n / 2:
        mute = sum(not text and not ended for text, ended in zip(outputs.predictions, outputs.ended, strict=True))
        if mute > empty / 2:  # white space, or tokens that are no text, up to the limit
            why = f"it writes nothing but white space or special tokens up to max_new_tokens in {mute} of them. Is it"
        else:
            why = "it ends before it says anything. Does its tokenizer put an end token after the prompt, and is it"
        yield f"{empty} of {n} answers of {name} are empty: {why} asked in the form it was trained in (format)?"
    text, times = next(iter(answers.most_common(1)), ("", 0))
    usual = max(references.values(), default=0)
    if times > n / 2 and (usual <= n / 4 or (times == n and usual < n)):
        shown = " ".join(text.split())
        shown = shown if len(shown) <= 60 else f"{shown[:59]}…"
        yield f"{times} of {n} answers of {name} are the same text («{shown}»), whatever was asked"


def written(value: float | None, low: float | None, high: float | None, *, sign: bool = False) -> str:
    """A number and its interval with two digits of the interval's half-width, as far as three places show them.

    >>> written(0.51987, 0.5021, 0.5369), written(86.277, 72.0, 104.5), written(0.00098, 0.0, 0.0034)
    ('0.520 (0.502 to 0.537)', '86 (72 to 104)', '0.0010 (0.0000 to 0.0034)')
    >>> written(-3.5294, -3.713, -3.357, sign=True), written(1, 1, 1), written(None, None, None)
    ('−3.53 (−3.71 to −3.36)', '1.000 (1.000 to 1.000)', '–')
    """
    if value is None:
        return NONE
    numbers = [value] if low is None or high is None else [value, low, high]
    half = (numbers[2] - numbers[1]) / 2 if len(numbers) == 3 else abs(value) / 10
    places = _places(half, max(map(abs, numbers)))
    texts = [_text(n, places, "+" if sign else "-") for n in numbers]
    return f"{texts[0]} ({texts[1]} to {texts[2]})" if len(texts) == 3 else texts[0]


def _places(spread: float, largest: float) -> int:
    """Decimal places that show two digits of the spread; beyond three only where nothing would be left of the number."""
    finest = max(3, 1 - math.floor(math.log10(largest))) if largest > 0 else 3
    return min(max(1 - math.floor(math.log10(spread)), 0), finest, 6) if spread > 0 else min(finest, 6)


def _text(value: float, places: int, sign: str = "-") -> str:
    text = f"{value:{sign},.{places}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.lstrip("+-")


def _name(name: str) -> str:
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def _values(models: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Metrics × models with intervals; models that do not fit beside the others stand below them."""
    metrics = list(dict.fromkeys(metric for values in models.values() for metric in values))
    first = max(len(m) for m in ["metric", *metrics])
    columns = {
        name: [_name(name), *(_value(values[m]) if m in values else NONE for m in metrics)]
        for name, values in models.items()
    }
    blocks: list[list[list[str]]] = []
    room = 0
    for column in columns.values():
        width = 2 + max(map(len, column))
        if not blocks or room < width:
            blocks.append([])
            room = terminal.WIDTH - first
        blocks[-1].append(column)
        room -= width
    return [
        terminal.columns(["metric", *(c[0] for c in block)], list(zip(metrics, *(c[1:] for c in block), strict=True)))
        for block in blocks
    ]


def _value(v: dict[str, Any]) -> str:
    return written(v["value"], v["low"], v["high"])


def _comparisons(entry: dict[str, Any], alpha: float) -> Iterator[list[str]]:
    """A table for each pair of models; its head names them."""
    pairs: dict[str, list[tuple[str, ...]]] = {}
    for c in entry["comparisons"]:
        difference = written(c["difference"], c["low"], c["high"], sign=True)
        finding = _finding(c, entry["models"][c["b"]][c["metric"]]["higher_is_better"], alpha)
        pair = f"{_name(c['b'])} − {_name(c['a'])}"
        pairs.setdefault(pair, []).append((c["metric"], difference, _p(c["p_adjusted"]), finding))
    for pair, rows in pairs.items():
        beside = len(pair) <= 24
        table = terminal.columns([pair if beside else "", "difference", "adjusted p", ""], rows)
        yield table if beside else [pair, *table]


def _p(p: float | None) -> str:
    return NONE if p is None else "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def _finding(c: dict[str, Any], higher: bool | None, alpha: float) -> str:
    if c["p_adjusted"] is None:
        return ""
    if c["p_adjusted"] >= alpha or not c["difference"]:
        return "not told apart"
    if higher is None:
        return "different"
    return "better" if (c["difference"] > 0) == higher else "worse"


def _spread(spread: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    """A table for each model that was trained with several seeds."""
    for name, metrics in spread.items():
        rows = []
        for metric, s in metrics.items():
            known = [v for v in s["values"] if v is not None]
            places = _places(s["sd"] or 0.0, max(map(abs, known), default=0.0))
            mean, sd, *each = (NONE if v is None else _text(v, places) for v in (s["mean"], s["sd"], *s["values"]))
            rows.append((metric, mean, sd, "  ".join(each)))
        yield terminal.columns([f"{_name(name)}, over seeds", "mean", "sd", "each"], rows)
