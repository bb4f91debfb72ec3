"""Self-BLEU against sacrebleu and nltk, loops and openings by hand, and the warning that variety is lost."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temper import metrics
from temper.metrics.diversity import _others, collapsing, loops, same_opening_rows, self_bleu_rows, variety_of
from temper.types import Outputs

TEXTS = st.lists(st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), max_size=12), min_size=2, max_size=7)


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS, references=st.integers(1, 4))
def test_self_bleu_equals_sacrebleu(texts: list[list[str]], references: int) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    scorer = sacrebleu.BLEU(effective_order=True, tokenize="none", smooth_method="floor", smooth_value=0.1)
    found = self_bleu_rows(texts, references)
    for text, others, value in zip(texts, _others(len(texts), references), found, strict=True):
        if text:  # of an empty one sacrebleu says 0, and two empty texts are alike
            expected = scorer.sentence_score(" ".join(text), [" ".join(texts[j]) for j in others]).score / 100
            assert value == pytest.approx(expected, abs=1e-9)


def test_self_bleu_of_long_texts_equals_nltks() -> None:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    rng = np.random.default_rng(0)
    texts = [[str(w) for w in rng.integers(0, 9, n)] for n in (12, 20, 7, 15, 9)]
    expected = [
        sentence_bleu([texts[j] for j in others], text, smoothing_function=SmoothingFunction().method1)
        for text, others in zip(texts, _others(5, 3), strict=True)
    ]
    assert self_bleu_rows(texts, 3) == pytest.approx(expected, abs=1e-9)


def test_references_are_others_each_as_often() -> None:
    for n, k in [(2, 5), (7, 3), (30, 20)]:
        chosen = _others(n, k)
        assert all(
            i not in others and len(set(others)) == len(others) == min(k, n - 1) for i, others in enumerate(chosen)
        )
        assert len({sum(i in others for others in chosen) for i in range(n)}) == 1
    assert _others(1, 4) == [[]]


def outputs(texts: list[str]) -> Outputs:
    n = len(texts)
    return Outputs([""] * n, texts, [""] * n, [True] * n)


def value(name: str, texts: list[str]) -> float:
    return metrics.compute([name], outputs(texts))[name].value


def test_texts_all_alike_and_all_different() -> None:
    same = ["A wonderful film."] * 5
    assert value("self_bleu", same) == pytest.approx(1) and value("same_opening", same) == 1
    assert value("self_bleu", ["", ""]) == 1, "empty texts are alike"
    apart = ["one two three four five", "six seven eight nine ten", "a b c d e"]
    assert value("self_bleu", apart) == 0 and value("same_opening", apart) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so good so good so good", True),
        ("very very very good", False),
        ("no no no no no no", True),
        ("he said that she said that they left", False),
        ("the film was fun, the film was fun, the film was fun.", True),
        ("the film was fun, the film was fun, and long", False),
        ("it began well. " + "I loved every minute of it " * 3 + "truly", True),
        ("", False),
        ("одно два одно два одно два", True),
    ],
)
def test_loops_by_hand(text: str, expected: bool) -> None:
    assert value("loop_share", [text]) == expected


@settings(deadline=None)
@given(text=st.lists(st.sampled_from("ab"), max_size=30))
def test_loops_equal_their_definition(text: list[str]) -> None:
    found = any(
        text[i : i + n] == (text[i : i + p] * n)[:n]
        for p in range(1, 21)
        for i in range(len(text))
        for n in [max(3 * p, 6)]
        if i + n <= len(text)
    )
    assert loops(text) == found


def test_openings_by_hand() -> None:
    texts = ["a b c d e f", "a b c d e g", "a b c d x", "a b", "a b"]
    assert same_opening_rows([t.split() for t in texts]).tolist() == [1, 1, 0, 1, 1]


def test_a_rollout_is_measured_in_milliseconds() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{w}" for w in rng.integers(0, 300, 40)) for _ in range(32)]
    variety_of(texts)
    took = []
    for _ in range(3):
        began = time.perf_counter()
        found = variety_of(texts)
        took.append(time.perf_counter() - began)
    assert min(took) < 0.1
    assert found["distinct_2"] == pytest.approx(metrics.compute(["distinct_2"], outputs(texts))["distinct_2"].value)
    assert found["self_bleu"] == pytest.approx(
        metrics.compute([{"self_bleu": {"references": 4}}], outputs(texts))["self_bleu"].value
    )
    assert variety_of([""])["self_bleu"] is None


def lines(rewards: list[float], distinct: list[float], likeness: list[float]) -> list[dict[str, float]]:
    return [{"reward": r, "distinct_2": d, "self_bleu": b} for r, d, b in zip(rewards, distinct, likeness, strict=True)]


@pytest.mark.parametrize(
    ("rewards", "distinct", "likeness", "said"),
    [
        ([0, 0, 1, 1], [0.9, 0.9, 0.5, 0.5], [0.1] * 4, "distinct_2 falls below 0.6"),
        ([0, 0, 1, 1], [0.9] * 4, [0.2, 0.2, 0.9, 0.9], "self_bleu falls below 0.3"),
        ([1, 1, 0, 0], [0.9, 0.9, 0.5, 0.5], [0.2, 0.2, 0.9, 0.9], ""),
        ([0, 0, 1, 1], [0.9, 0.9, 0.7, 0.7], [0.1] * 4, ""),
        ([0, 0, 1, 1], [0.4, 0.4, 0.5, 0.5], [0.9, 0.9, 0.8, 0.8], ""),
    ],
)
def test_when_a_collapse_is_told(rewards: list[float], distinct: list[float], likeness: list[float], said: str) -> None:
    found = collapsing(lines(rewards, distinct, likeness), distinct_2=0.6, variety=0.3)
    assert (said in found) if said and found else found is None and not said
