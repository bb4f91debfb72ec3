"""What an evaluation says when it ends, and what it finds odd about answers."""

from __future__ import annotations

import doctest

import pytest

from temper.stages import summary
from temper.types import Outputs

METRICS = {"rougeL": True, "perplexity": False, "length": None, "toxicity_lexicon": False}
LONG = "somebody/Qwen2.5-0.5B-Instruct-for-summaries-of-news"


def entry(*models: str) -> dict:
    """evaluation.json of models each 0.1 above the one before, every comparison being clear but the last."""
    values = {
        name: {
            m: {"value": 0.5 + k / 10, "low": 0.48 + k / 10, "high": 0.53 + k / 10, "higher_is_better": higher}
            for m, higher in METRICS.items()
        }
        for k, name in enumerate(models)
    }
    pairs = [(models[0], b) for b in models[1:]]
    made = [
        {"metric": m, "a": a, "b": b, "difference": 0.1, "low": 0.07, "high": 0.13, "p": 1e-4, "p_adjusted": 4e-4}
        for a, b in pairs
        for m in METRICS
    ]
    if made:
        made[-1] |= {"p_adjusted": 0.2}
    return {"models": values, "comparisons": made, "spread": {}}


def test_the_worked_numbers_in_docstrings_hold() -> None:
    assert doctest.testmod(summary).failed == 0


def test_two_models() -> None:
    assert summary.tables(entry("base", "sft")).splitlines() == [
        "metric            base                    sft",
        "rougeL            0.500 (0.480 to 0.530)  0.600 (0.580 to 0.630)",
        "perplexity        0.500 (0.480 to 0.530)  0.600 (0.580 to 0.630)",
        "length            0.500 (0.480 to 0.530)  0.600 (0.580 to 0.630)",
        "toxicity_lexicon  0.500 (0.480 to 0.530)  0.600 (0.580 to 0.630)",
        "",
        "sft − base        difference                 adjusted p",
        "rougeL            +0.100 (+0.070 to +0.130)  0.0004      better",
        "perplexity        +0.100 (+0.070 to +0.130)  0.0004      worse",
        "length            +0.100 (+0.070 to +0.130)  0.0004      different",
        "toxicity_lexicon  +0.100 (+0.070 to +0.130)  0.2         not told apart",
    ]


@pytest.mark.parametrize(
    "models", [("base",), ("base", "sft", "sft-b"), (LONG, f"{LONG}-2", "a", "b", "c")], ids=["1", "3", "5"]
)
def test_everything_fits_80_columns_and_nothing_is_lost(models: tuple[str, ...]) -> None:
    text = summary.tables(entry(*models))
    assert max(map(len, text.splitlines())) <= 80
    for k, name in enumerate(models):
        assert name[-20:] in text and text.count(f" {0.5 + k / 10:.3f} (") == len(METRICS)
    assert text.count("+0.100") == len(METRICS) * (len(models) - 1)


def test_the_spread_over_seeds_is_shown() -> None:
    one = entry("sft")
    one["spread"] = {
        "sft": {
            "rougeL": {"values": [0.51, 0.53, 0.52], "mean": 0.52, "sd": 0.01},
            "perplexity": {"values": [12.0, None, 14.0], "mean": None, "sd": None},
        }
    }
    block = summary.tables(one).split("\n\n")[-1].splitlines()
    assert [line.split() for line in block[1:]] == [
        ["rougeL", "0.520", "0.010", "0.510", "0.530", "0.520"],
        ["perplexity", "–", "–", "12.000", "–", "14.000"],
    ]
    assert block[0].split("  ")[0] == "sft, over seeds"


def test_values_that_do_not_exist() -> None:
    one = entry("base", "sft")
    one["models"]["sft"]["rougeL"] |= {"value": None, "low": None, "high": None}
    one["comparisons"][0] |= dict.fromkeys(("difference", "low", "high", "p", "p_adjusted"))
    lines = summary.tables(one).splitlines()
    assert lines[1].split()[-1] == "–"
    assert lines[7].split() == ["rougeL", "–", "–"]


@pytest.mark.parametrize(
    ("predictions", "references", "said"),
    [
        (["", "", "", "a"], ["w", "x", "y", "z"], ["3 of 4 answers of m are empty"]),
        (["", "", "a", "b"], ["w", "x", "y", "z"], []),  # half is not more than half
        (["so", "so", "so", "a"], ["w", "x", "y", "z"], ["3 of 4 answers of m are the same text («so»)"]),
        (["yes", "yes", "yes", "no"], ["yes", "no", "yes", "no"], []),  # two classes, told apart badly
        (["yes", "yes", "yes", "yes"], ["yes", "no", "yes", "no"], ["4 of 4 answers of m are the same text («yes»)"]),
        (["yes", "yes"], ["yes", "yes"], []),  # as asked
        (["so"], ["x"], []),  # one row says nothing
        (["", "", "", ""], ["w", "x", "y", "z"], ["4 of 4 answers of m are empty"]),
    ],
)
def test_answers_that_hardly_depend_on_the_question(predictions: list[str], references: list[str], said: list[str]):
    outputs = Outputs(["?"] * len(predictions), predictions, references, [True] * len(predictions))
    found = list(summary.oddities("m", outputs))
    assert len(found) == len(said) and all(f.startswith(s) for f, s in zip(found, said, strict=True))


@pytest.mark.parametrize(
    ("ended", "says"),
    [
        ([True, True, True, False], "it ends before it says anything"),
        ([False, False, True, True], "up to max_new_tokens in 2 of them"),
    ],
)
def test_why_answers_are_empty(ended: list[bool], says: str) -> None:
    """The first three are; those that did not end went on, and wrote no text."""
    [told] = summary.oddities("m", Outputs(["?"] * 4, ["", "", "", "a"], ["w", "x", "y", "z"], ended))
    assert says in told
