"""The rules by which a teacher's answers are rejected, on hand-made answers."""

from __future__ import annotations

import difflib
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from temper.data import reject
from temper.data.grow import Seen, examples
from temper.data.reject import Reject, lost, names, reason, similarity

SOURCE = "Учора в м. Києві мер Олег Бондар відкрив 3 парки. Бюджет склав 2,5 млн. Там були діти."


@pytest.mark.parametrize(
    ("answer", "rules", "why"),
    [
        ("Гаразд.", {}, None),
        (" \n", {}, "empty"),
        (" \n", {"empty": False}, None),
        ("Я — мовна МОДЕЛЬ", {"contains": ["user", "модель"]}, "contains «модель»"),
        ("Як моде\u0301ль", {"contains": ["модель"]}, None),
        ("и\u0306", {"contains": ["й"]}, "contains «й»"),
        ("Ось:\n```x```", {"matches": ["^```"]}, None),
        ("Ось:\n```x```", {"matches": ["(?m)^```"]}, "matches «(?m)^```»"),
        ("а" * 44, {"against": "-", "length_ratio": (0.5, 2)}, None),
        ("а" * 42, {"against": "-", "length_ratio": (0.5, 2)}, "too short"),
        ("а" * 173, {"against": "-", "length_ratio": (0.5, 2)}, "too long"),
        (SOURCE.upper(), {"against": "-", "too_similar": 1.0}, "too similar"),
        (SOURCE.replace("діти", "зайці"), {"against": "-", "too_similar": 1.0}, None),
    ],
)
def test_the_first_rule_that_is_broken(answer: str, rules: dict[str, Any], why: str | None) -> None:
    assert len(SOURCE) == 86
    assert reason(answer, True, Reject(**rules), against=SOURCE) == why


def test_an_answer_cut_by_the_limit() -> None:
    assert reason("Пів", False, Reject()) == "unfinished"
    assert reason("Пів", False, Reject(unfinished=False)) is None
    assert reason("", False, Reject()) == "empty", "what is nothing is told as such"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Мер Бондар і мер Ткач.", ["Бондар", "Ткач"]),
        ("Бондар прийшов. Ткач пішов.", []),
        ("Бондар прийшов. Тоді Бондар пішов.", ["Бондар"]),
        ("У м. Львів; ст. Нова", ["Львів"]),
        ("«Динамо» грало з «Шахтарем» (Донецьк) — Рим!", ["Шахтарем", "Донецьк", "Рим"]),
        ("Він сказав: «Так». Там ООН та Івано-Франківськ", ["ООН", "Івано-Франківськ"]),
        ("Рядок\nНовий рядок", []),
        ("О. Бондар", ["Бондар"]),
        ("", []),
        ("Мар'яна і Мар’яна", ["Мар’яна"]),
    ],
)
def test_names_are_capitalised_words_within_sentences(text: str, found: list[str]) -> None:
    assert names(text) == found


@pytest.mark.parametrize(
    ("facts", "answer", "gone"),
    [
        ("Мер Бондар відкрив 3 парки.", "Той дурний Бондар відкрив аж 3 парки.", []),
        ("Мер Бондар відкрив 3 парки.", "Бондаря бачили біля 3 парків.", []),
        ("Мер Бондар відкрив 3 парки.", "Мер Бандар відкрив 3 парки.", ["Бондар"]),
        ("Мер Бондар відкрив 3 парки.", "Мер Бондар відкрив 33 парки.", ["3"]),
        ("Мер Шевчук відкрив 9 парків.", "Нічого.", []),  # neither stands in the source
        ("Склав 2.5 млн", "Аж 2,5 млн", []),
        ("Склав 2.5 млн", "Аж 2 і 5 млн", ["2.5"]),
        ("Мер Олег", "Дурень Олега кликав", []),  # four letters: all but the last
        ("Десь у Києві", "Той Київ", []),  # the vowels of the stem alternate
        ("Десь у Києві", "Той Кременець", ["Києві"]),
        ("", "", []),
    ],
)
def test_names_and_numbers_that_are_lost(facts: str, answer: str, gone: list[str]) -> None:
    assert lost(facts, SOURCE, answer) == gone
    rules = Reject(against="-", lost="-")
    assert reason(answer or "x", True, rules, against=SOURCE, facts=facts) == (
        "names or numbers lost" if gone else None
    )


@given(st.lists(st.sampled_from("абвг"), max_size=12), st.lists(st.sampled_from("абвг"), max_size=12))
def test_similarity_is_difflibs_over_words(a: list[str], b: list[str]) -> None:
    """The letters stand for words; matching blocks are counted by hand."""
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    shared = sum(block.size for block in blocks)
    expected = 2 * shared / (len(a) + len(b)) if a or b else 1.0
    assert similarity(" ".join(a), ", ".join(b).upper()) == pytest.approx(expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"too_similar": 0}, {"too_similar": 0.5}, {"lost": "{x}"}, {"against": "{x}", "length_ratio": (2, 1)},
        {"toxicity_below": 1.5}, {"contains": [""]}, {"matches": ["["]}, {"contain": ["x"]},
    ],
)  # fmt: skip
def test_rules_that_cannot_be_meant(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Reject(**wrong)


def test_every_reason_has_advice_of_its_own() -> None:
    reasons = [v for k, v in vars(reject).items() if k.isupper() and isinstance(v, str) and not k.startswith("_")]
    assert len({reject.advice(why) for why in reasons}) == len(reasons) == 8
    assert "refusing" in reject.advice("contains «модель»")


def test_examples_are_drawn_by_the_prompts_number_alone() -> None:
    texts = [f"t{k}" for k in range(9)]
    drawn = [examples(texts, 3, seed=1, number=n).split("\n\n") for n in range(60)]
    assert all(len(set(d)) == 3 and set(d) <= set(texts) for d in drawn)
    assert len({tuple(d) for d in drawn}) > 50 and {t for d in drawn for t in d} == set(texts)
    assert examples(texts, 3, seed=1, number=5).split("\n\n") == drawn[5]
    assert examples(texts, 3, seed=2, number=5).split("\n\n") != drawn[5]
    assert sorted(examples(texts[:2], 4, seed=1, number=0).split("\n\n")) == texts[:2]


def test_what_nearly_repeats_a_seed_or_an_earlier_text_is_not_new() -> None:
    """Jaccard similarity of word 5-grams, by hand: 12 words with the last one changed share 7 of 9 5-grams."""
    words = ["один", "два", "три", "чотири", "п'ятеро", "шість", "сім", "вісім", "дев'ятеро", "десять"]
    seen = Seen([" ".join(words)], threshold=7 / 9 - 0.01)
    assert not seen.new(" ".join(words).upper())
    other = " ".join(reversed(words))
    assert seen.new(other) and not seen.new(other + "!")
    assert not seen.new(" \n"), "blank texts are nothing new"
    sets = [{tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (list("абвгґдежзи"), list("абвгґдежзй"))]
    share = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    pair = [" ".join(w) for w in ("абвгґдежзи", "абвгґдежзй")]
    assert not Seen(pair[:1], share - 1e-6).new(pair[1]) and Seen(pair[:1], share + 1e-6).new(pair[1])
    assert [Seen([], 0.8).new(t) for t in itertools.chain(pair)] == [True, True]
