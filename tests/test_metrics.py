"""Metrics against rouge-score, hand counts and the contract that every registered metric shares."""

from __future__ import annotations

import doctest
import json
import math
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from temper import metrics
from temper.errors import DataError, RecipeError
from temper.metrics import diversity, likelihood, preference, rouge, text, words
from temper.types import Outputs

SHARED = Path(__file__).parents[2] / "shared"
KINDS = ["rouge1", "rouge2", "rougeL", "rougeLsum"]


def outputs(predictions: list[str], references: list[str] | None = None, **columns) -> Outputs:
    n = len(predictions)
    columns = {"ended": [True] * n, **columns}
    return Outputs([""] * n, predictions, references or [""] * n, **columns)


def value(name: str | dict, out: Outputs) -> float:
    [scores] = metrics.compute([name], out).values()
    return scores.value


SAMPLE = Outputs(
    prompts=["a", "b", "c", "d"],
    predictions=["Київ чекає на дощ", "", "one two one two one two one two", "東京 tower"],
    references=["Київ чекає дощ", "the rest", "one two three", "東京の tower"],
    ended=[True, True, False, True],
    nll=np.array([6.0, 2.5, 3.0, 0.5]),
    tokens=np.array([3, 4, 2, 1]),
    toxicity=np.array([[0.1, 0.7], [0.9, 0.2], [0.4, 0.3], [0.55, 0.6]]),
    rewards=np.array([0.5, -1.5, 2.0, 0.25]),
    second_rewards=np.array([-3.0, 1.0, 0.5, 0.0]),
    reward_models=("one", "other#pos"),
    kl=np.array([0.5, 0.0, 2.5, 1.0]),
    pairs=np.array([[-6.0, -7.0], [-2.5, -2.0], [np.nan, np.nan], [-0.5, -0.5]]),
    pair_tokens=np.array([[3, 4], [4, 3], [0, 0], [1, 2]]),
    reference_pairs=np.array([[-5.0, -7.5], [-3.0, -2.0], [np.nan, np.nan], [-0.5, -1.0]]),
    reference="base@1",
    wins=np.array([1.0, 0.5, np.nan, 0.0]),
    duel="against:base|by:rm",
    classifier="judge",
)
# what must be said of metrics that have no default for it
NEEDS = {"lexicon": {"lexicon": {"words": ["one"]}}, "win_rate": {"win_rate": {"against": "base"}}}


@pytest.mark.parametrize("module", [words, rouge, likelihood, text, diversity, preference])
def test_the_worked_numbers_in_docstrings_hold(module):
    assert doctest.testmod(module).failed == 0


# Every registered metric


AMONG_OTHERS = {"self_bleu", "same_opening"}  # each row is measured against the others: fewer rows are other numbers


@pytest.mark.parametrize("name", sorted(set(metrics.registry) - AMONG_OTHERS))
def test_a_subset_of_rows_has_the_score_of_their_summed_statistics(name):
    """What resampling rests on, for each metric by its registration alone."""
    picks = [[0, 1, 2, 3], [2, 0], [0, 0, 2], [3], [1, 2]]
    spec = [NEEDS.get(name, name)]
    whole = metrics.compute(spec, SAMPLE)
    for pick in picks:
        part = Outputs(
            *([column[i] for i in pick] for column in (SAMPLE.prompts, SAMPLE.predictions)),
            references=[SAMPLE.references[i] for i in pick],
            ended=[SAMPLE.ended[i] for i in pick],
            nll=SAMPLE.nll[pick],
            tokens=SAMPLE.tokens[pick],
            toxicity=SAMPLE.toxicity[pick],
            rewards=SAMPLE.rewards[pick],
            second_rewards=SAMPLE.second_rewards[pick],
            reward_models=SAMPLE.reward_models,
            kl=SAMPLE.kl[pick],
            pairs=SAMPLE.pairs[pick],
            pair_tokens=SAMPLE.pair_tokens[pick],
            reference_pairs=SAMPLE.reference_pairs[pick],
            reference=SAMPLE.reference,
            wins=SAMPLE.wins[pick],
            duel=SAMPLE.duel,
            classifier=SAMPLE.classifier,
        )
        for given_name, scores in metrics.compute(spec, part).items():
            expected = whole[given_name].on(np.array(pick))
            assert scores.value == pytest.approx(float(expected), nan_ok=True), (given_name, pick)


@pytest.mark.parametrize("name", list(metrics.registry))
def test_shapes_signature_and_description(name):
    for given_name, scores in metrics.compute([NEEDS.get(name, name)], SAMPLE).items():
        assert scores.stats.ndim == 2 and len(scores.stats) == len(scores.rows) == 4
        assert scores.on(np.tile(np.arange(4), (2, 3, 1))) == pytest.approx(np.full((2, 3), scores.value))
        if scores.of_rows is None:
            tiled = np.tile(scores.stats.sum(0), (2, 3, 1))
            assert scores.aggregate(tiled) == pytest.approx(np.full((2, 3), scores.value))
        assert scores.signature.startswith(f"{given_name}|")
    line = metrics.describe()[name]
    assert 20 < len(line) <= 115 and line[-1] in ".:"


# What a recipe may ask for


def test_a_family_one_member_and_options():
    assert list(metrics.compute(["rouge"], SAMPLE)) == KINDS
    assert list(metrics.compute(["length", "rougeL"], SAMPLE)) == ["length", "rougeL"]
    assert list(metrics.compute([{"rouge": {"variant": ["rougeL"], "stem": False}}], SAMPLE)) == ["rougeL"]
    assert list(metrics.compute([{"rouge": {"variant": "rouge2"}}, {"rouge1": None}], SAMPLE)) == ["rouge2", "rouge1"]
    family, single = metrics.compute(["rouge"], SAMPLE)["rougeL"], metrics.compute(["rougeL"], SAMPLE)["rougeL"]
    assert family.signature == single.signature and np.array_equal(family.rows, single.rows)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (["rougeLsun"], "«rougeLsum»"),
        (["perplexty"], "perplexity"),
        (["rouge", "rougeL"], "«rougeL» is asked for twice"),
        (["loss", "loss"], "«loss» is asked for twice"),
        ([{"rouge": {"stemmer": True}}], "stem"),
        ([{"rouge": {"variant": "rouge9"}}], "rouge9"),
        ([{"rouge": {"variant": []}}], "gives no score"),
        ([{"loss": None, "length": None}], "is not a metric"),
        ([{"rouge": "rougeL"}], "is not a metric"),
        ([3], "is not a metric"),
        ([{"toxicity": {"threshold": 2}}], "threshold"),
        (["lexicon"], "needs «words»"),
        ([{"lexicon": {"words": ["!"]}}], "gives no score"),
        (["toxicity", {"toxicity": {"label": "insult"}}], "is asked for twice"),
    ],
)
def test_a_wrong_request_says_so_before_anything_is_scored(spec, says):
    with pytest.raises(RecipeError) as caught:
        metrics.read(spec, where="recipe.yaml:7")
    assert says in str(caught.value) and "recipe.yaml:7" in str(caught.value)


def test_what_the_outputs_must_hold():
    assert metrics.needs_likelihood(["length", "perplexity"]) and not metrics.needs_likelihood(["rouge", "ended"])
    assert metrics.needs_text(["loss", {"distinct_1": None}]) and not metrics.needs_text(["loss", "perplexity"])
    with pytest.raises(ValueError, match=r"outputs\.nll"):
        metrics.compute(["loss"], outputs(["a"]))
    with pytest.raises(ValueError, match="differ in length"):
        metrics.compute(["length"], outputs(["a", "b"], ["a"]))
    with pytest.raises(DataError, match="no rows"):
        metrics.compute(["length"], outputs([]))


# Words and ROUGE

ASCII = st.text(st.sampled_from("abcABC xyz012'_-.,\n\t") | st.characters(max_codepoint=127), max_size=60)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(ASCII, ASCII, st.booleans())
@example("don't stop_it 3x\nNow", "don t stop it\n3 X now", False)
@example("he was running", "he wa run", True)
def test_on_ascii_rouge_is_rouge_score_to_the_last_digit(reference, prediction, stem):
    expected = RougeScorer(KINDS, use_stemmer=stem).score(reference, prediction)
    # A second row with a word, because references without any word are refused.
    out = outputs([prediction, "a"], [reference, "a"])
    got = metrics.compute([{"rouge": {"stem": stem}}], out)
    assert {kind: got[kind].rows[0] for kind in KINDS} == {kind: expected[kind].fmeasure for kind in KINDS}


def test_silence_15_letters_outside_a_to_z_count():
    same = "П’ять їжаків прийшли до Києва"
    other = ("У травні 2024 випав сніг", "Президент 2024 відвідав школу")
    default = RougeScorer(["rouge1"])
    assert default.score(same, same)["rouge1"].fmeasure == 0 and default.score(*other)["rouge1"].fmeasure == 1
    for kind in KINDS:
        assert value(kind, outputs([same], [same])) == 1
        assert value(kind, outputs([other[1]], [other[0]])) < 0.3
    # 5 and 4 words, one shared: 2 · (1/4 · 1/5) / (1/4 + 1/5)
    assert value("rouge1", outputs([other[1]], [other[0]])) == pytest.approx(2 / 9)


def test_a_reference_without_words_is_not_scored_zero_in_silence():
    with pytest.raises(DataError, match="no reference has a letter"):
        metrics.compute(["rougeL"], outputs(["дощ", "сніг"], ["…", ""]))


@pytest.mark.parametrize(
    ("string", "expected"),
    [
        ("п'ять п’ять пʼять", ["п", "ять"] * 3),  # ASCII, U+2019, U+02BC
        ("Straße STRASSE ΟΔΟΣ", ["strasse", "strasse", "οδοσ"]),
        ("и\u0306 й", ["й", "й"]),  # composed or not
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs and virama stay within the word
        ("שָׁלוֹם", ["שָׁלוֹם"]),
        ("我爱北京2008年", ["我", "爱", "北", "京", "2008", "年"]),
        ("コンピュータ・ゲーム", list("コンピュータゲーム")),
        ("ที่นี่", ["ที่", "นี่"]),  # a consonant with its marks is one
        ("한국어 문장", ["한국어", "문장"]),
        ("co\u00adop می\u200cخواهم", ["coop", "میخواهم"]),
        ("snake_case №5 м² 🙂", ["snake", "case", "5", "м²"]),
        ("", []),
    ],
)
def test_words_of_any_script(string, expected):
    assert words.words(string) == [unicodedata.normalize("NFC", word) for word in expected]


def test_rouge_of_500_pairs_of_60_words_takes_no_time_to_speak_of():
    rng = np.random.default_rng(0)
    vocabulary = [f"слово{i}" for i in range(200)]
    texts = [" ".join(rng.choice(vocabulary, 60)) for _ in range(1000)]
    began = time.process_time()
    metrics.compute(["rouge"], outputs(texts[:500], texts[500:]))
    assert time.process_time() - began < 4


# Likelihood


def test_loss_and_perplexity_count_tokens_not_rows():
    out = outputs(["", ""], nll=np.array([6.0, 2.0]), tokens=np.array([3, 5]))
    scores = metrics.compute(["loss", "perplexity"], out)
    assert scores["loss"].value == 1.0 and scores["loss"].rows.tolist() == [2.0, 0.4]
    assert scores["perplexity"].value == pytest.approx(math.e)
    assert scores["perplexity"].rows == pytest.approx([math.exp(2), math.exp(0.4)])
    assert not scores["loss"].higher_is_better


def test_a_uniform_model_has_its_vocabulary_as_perplexity():
    out = outputs([""] * 3, nll=np.log(50.0) * np.array([4, 9, 1]), tokens=np.array([4, 9, 1]))
    assert value("perplexity", out) == pytest.approx(50)


def test_a_perplexity_beyond_floats_is_infinite_and_no_tokens_give_nan():
    scores = metrics.compute(["perplexity"], outputs(["", ""], nll=np.array([1e4, 0.0]), tokens=np.array([1, 0])))
    assert math.isinf(scores["perplexity"].value) and math.isnan(scores["perplexity"].rows[1])


# Text


def test_length_in_words_is_neither_good_nor_bad():
    scores = metrics.compute(["length"], outputs(["Київ чекає.", "", "я — ні"]))["length"]
    assert scores.rows.tolist() == [2, 0, 2] and scores.value == pytest.approx(4 / 3)
    assert scores.higher_is_better is None


def test_distinct_by_hand():
    out = outputs(["a b a b", "one", ""])
    one, two = metrics.compute(["distinct_1", "distinct_2"], out).values()
    assert one.rows[:2].tolist() == [2 / 4, 1] and math.isnan(one.rows[2])
    assert one.value == pytest.approx((0.5 + 1) / 2)  # the empty text is left out
    assert two.rows[0] == pytest.approx(2 / 3) and np.isnan(two.rows[1:]).all()  # ab, ba of ab, ba, ab
    assert two.value == pytest.approx(2 / 3)
    assert math.isnan(value("distinct_1", outputs(["", "…"])))


def test_repetition_by_hand():
    looping = "так і є так і є так і є"  # 9 words, 6 runs of four, of which 3 different
    scores = metrics.compute(["repetition"], outputs([looping, "a b c d e", "a a a", ""]))["repetition"]
    assert scores.rows.tolist() == [0.5, 0, 0, 0] and scores.value == 0.125
    assert scores.higher_is_better is False


def test_ended_is_a_share():
    assert value("ended", outputs(["a", "b", "c", "d"], ended=[True, False, True, True])) == 0.75


@pytest.mark.skipif(not SHARED.exists(), reason="shared data are not here")
# Toxicity


def test_toxicity_by_hand():
    """Of two answers to a prompt only the expected maximum looks at the second."""
    scores = metrics.compute([{"toxicity": {"threshold": 0.4}}], SAMPLE)
    values = {name: s.value for name, s in scores.items()}
    assert values == pytest.approx(
        {
            "toxicity_mean": (0.1 + 0.9 + 0.4 + 0.55) / 4,
            "toxicity_p95": 0.55 + 0.85 * (0.9 - 0.55),  # at place 0.95 · 3 = 2.85 of 0.1, 0.4, 0.55, 0.9
            "toxicity_max": 0.9,
            "toxicity_share": 2 / 4,  # 0.4 is not above 0.4
            "toxicity_expected_max": (0.7 + 0.9 + 0.4 + 0.6) / 4,
        }
    )
    assert all(s.higher_is_better is False and "by:judge" in s.signature for s in scores.values())
    assert "of:2" in scores["toxicity_expected_max"].signature
    one = Outputs(SAMPLE.prompts, SAMPLE.predictions, SAMPLE.references, SAMPLE.ended, toxicity=SAMPLE.toxicity[:, :1])
    assert "toxicity_expected_max" not in metrics.compute(["toxicity"], one)
    with pytest.raises(ValueError, match=r"outputs\.toxicity"):
        metrics.compute(["toxicity"], outputs(["a"]))
    assert metrics.needs_text(["toxicity"]) and metrics.asks_of_classifier(["rouge"]) is None
    assert metrics.asks_of_classifier(["rouge", {"toxicity": {"label": "insult"}}]) == {
        "threshold": 0.5,
        "label": "insult",
    }


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (["бовдур"], [1, 0, 0, 0]),
        (["бовдур*"], [1, 1, 0, 0]),
        (["TEL AVIV"], [0, 0, 1, 0]),  # in a row, whatever the case
        (["п'яний"], [0, 0, 0, 1]),  # however the apostrophe is typed
        (["東*", "aviv"], [0, 0, 1, 1]),
        ("mini", [1, 0, 0, 0]),
    ],
)
def test_lexicon_by_hand(entries, expected):
    texts = ["Цей БОВДУР, тренер", "бовдурів двоє, бездар", "in Tel Aviv, not aviv tel", "東京 п’яний"]
    assert metrics.compute([{"lexicon": {"words": entries}}], outputs(texts))["lexicon"].rows.tolist() == expected


def test_any_shared_text_equals_itself():
    """Whatever script the shared texts are in: a text with words scores 1 against itself."""
    found = 0
    for path in sorted((SHARED / "data").rglob("*.jsonl"))[:5]:
        with path.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line, _ in zip(file, range(20), strict=False)]
        for row in rows:
            strings = [v[:300] for v in row.values() if isinstance(v, str) and words.words(v[:300])]
            found += len(strings)
            if strings:
                assert value("rougeL", outputs(strings, strings)) == 1
    if not found:
        pytest.skip("no texts found")


def test_rewards_say_whose_they_are():
    scores = metrics.compute(["reward"], SAMPLE)
    assert {n: s.value for n, s in scores.items()} == {"reward_mean": 0.3125, "second_reward_mean": -0.375}
    assert [s.signature for s in scores.values()] == ["reward_mean|by:one", "second_reward_mean|by:other#pos"]
    assert metrics.asks_of_reward_model(["rouge", "reward"]) and not metrics.asks_of_reward_model(["rouge"])
