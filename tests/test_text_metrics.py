"""BLEU and chrF against sacrebleu, METEOR against nltk, short answers by hand and against SQuAD's rules."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from pathlib import Path

import nltk.corpus
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nltk.stem.snowball import RussianStemmer
from nltk.translate.meteor_score import single_meteor_score
from sacrebleu.metrics import BLEU, CHRF

from temper import metrics, rewards
from temper.errors import DataError, RecipeError
from temper.metrics import answers, corpus, meteor, stems, words
from temper.types import Outputs, Record

DATA = Path(__file__).parents[2] / "shared" / "data"
ENGLISH = [
    ("The cat sat on the mat.", "The cat was sat on the mat."),
    ("It costs $3.50, state-of-the-art & don't ask", "It costs $3.5, state of the art; do not ask"),
    ("A guide to action that ensures the military obeys", "It is a guide to action which ensures that they obey"),
]
UKRAINIAN = [
    ("Київ чекає на дощ — «сильний» дощ, п’ять днів", "Києву чекати на дощ, сильний дощ п'ять днів"),
    ("У Львові відкрили нову школу для дітей із сіл", "У Львові відкрито школу для сільських дітей"),
    ("Так", "Так"),
]
RUSSIAN = [
    ("Брат пристально посмотрел на доктора…", "Брат посмотрел на докторов!"),
    ("«Ёлка» стоит 1,5 рубля", "Елка стоит 15 рублей"),
    ("на доктора", ""),
]
PAIRS = [
    *ENGLISH,
    *UKRAINIAN,
    *RUSSIAN,
    ("東京は雨です。", "東京で雨です。"),
    ("", "words for nothing"),
    ("the same", "the same"),
]


def outputs(pairs: list[tuple[str, str]], prompts: list[str] | None = None) -> Outputs:
    references, predictions = map(list, zip(*pairs, strict=True))
    return Outputs(prompts or [""] * len(pairs), predictions, references, [True] * len(pairs))


def one(spec: str | dict, pairs: list[tuple[str, str]]):
    [scores] = metrics.compute([spec], outputs(pairs)).values()
    return scores


# BLEU and chrF

SETTINGS = [
    *({"bleu": {"tokenize": t, "lowercase": low}} for t in ("13a", "intl", "zh", "char", "none") for low in (False, True)),
    *({"chrf": {"char_order": c, "word_order": w}} for c, w in ((6, 0), (6, 2), (1, 0), (3, 1))),
    {"chrf": {"lowercase": True}},
]  # fmt: skip


def sacrebleu_of(spec: dict, **more) -> BLEU | CHRF:
    [(name, options)] = spec.items()
    return (BLEU if name == "bleu" else CHRF)(**options, **more)


@pytest.mark.parametrize("spec", SETTINGS, ids=str)
def test_any_multiset_of_rows_has_sacrebleus_corpus_score_and_signature(spec):
    scores, theirs = one(spec, PAIRS), sacrebleu_of(spec)
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, len(PAIRS), (60, 4))
    wide = np.concatenate([chosen, rng.integers(0, len(PAIRS), (60, 4))], -1)
    for rows in (chosen, wide, np.arange(len(PAIRS))[None]):
        expected = [
            theirs.corpus_score([PAIRS[i][1] for i in pick], [[PAIRS[i][0] for i in pick]]).score for pick in rows
        ]
        assert scores.on(rows) == pytest.approx(np.array(expected), rel=1e-9, abs=1e-9)
        assert max(expected) > 1
    [name] = spec
    assert scores.signature == f"{name}|{theirs.get_signature()}" and scores.higher_is_better is True


@pytest.mark.parametrize("spec", SETTINGS, ids=str)
def test_a_row_is_shown_with_sacrebleus_sentence_score(spec):
    theirs = sacrebleu_of(spec, **({"effective_order": True} if "bleu" in spec else {}))
    expected = [theirs.sentence_score(p, [r]).score for r, p in PAIRS]
    assert one(spec, PAIRS).rows == pytest.approx(np.array(expected), rel=1e-9, abs=1e-9)


counts = st.lists(st.integers(0, 9), min_size=4, max_size=4)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(counts, counts, st.integers(1, 30), st.integers(0, 30), st.booleans())
@example([3, 0, 0, 0], [5, 4, 3, 2], 5, 7, False)
@example([2, 1, 0, 0], [2, 1, 0, 0], 2, 2, True)
def test_bleu_of_any_counts_is_sacrebleus(matched, total, length, reference, effective):
    """Smoothing, brevity and orders that are not there, whatever the sums."""
    matched = [min(m, t) for m, t in zip(matched, total, strict=True)]
    for k in range(1, 4):  # a text with n-grams has shorter ones
        total[k] = total[k] if total[k - 1] else 0
        matched[k] = min(matched[k], total[k])
    expected = BLEU.compute_bleu(
        [*matched], [*total], length, reference, smooth_method="exp", effective_order=effective
    ).score
    found = corpus.bleu_of(np.array([length, reference, *matched, *total], dtype=float), effective=effective)
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_nothing_said_scores_nothing_and_the_same_scores_100():
    texts = [r for r, _ in (*ENGLISH, *UKRAINIAN[:2], *RUSSIAN[:2])]
    for name in ("bleu", "chrf"):
        assert one(name, [(t, t) for t in texts]).value == pytest.approx(100)
        silent = one(name, [(t, "") for t in texts])
        assert silent.value == 0 and not silent.rows.any()


def test_quotes_that_13a_leaves_on_a_word_intl_takes_off():
    pair = [("він сказав: «дощ іде вже день»", "він сказав: дощ іде вже день")]
    assert one({"bleu": {"tokenize": "intl"}}, pair).value > one("bleu", pair).value + 5


# METEOR


class Nothing:
    def synsets(self, word):
        return []


def nltks(reference: str, prediction: str, **options) -> float:
    return single_meteor_score(words.words(reference), words.words(prediction), wordnet=Nothing(), **options)


def test_english_is_nltks_own_with_its_defaults():
    more = [
        ("It is a guide to action that ensures that the military will forever heed Party commands",
         "It is a guide to action which ensures that the military always obeys the commands of the party"),
        ("this is a cat", "non matching hypothesis"), ("running dogs", "dog runs"), ("anything", ""),
    ]  # fmt: skip
    pairs = [*ENGLISH, *more]
    expected = [nltks(r, p) for r, p in pairs]
    assert expected[3] == pytest.approx(0.6944, abs=1e-4)  # what nltk's documentation gives
    for language in ("en", "auto"):
        scores = one({"meteor": {"synonyms": False, "language": language}}, pairs)
        assert scores.rows.tolist() == expected and scores.value == pytest.approx(np.mean(expected))
    assert "|synonyms:none|" in scores.signature and "uk=temper-1" in scores.signature


def test_russian_is_nltks_with_snowballs_stems():
    expected = [nltks(r, p, stemmer=RussianStemmer()) for r, p in RUSSIAN]
    assert one({"meteor": {"language": "ru"}}, RUSSIAN).rows.tolist() == expected
    # на, and докторов by its stem: 1 of 3 and of 5 before it, so whole words alone give less
    assert expected[0] > one({"meteor": {"language": "none"}}, RUSSIAN).rows[0] > 0


def test_ukrainian_by_hand():
    """3 words in one run, of 3 and of 4; without stems only «на»."""
    pair = [("Києву обіцяють на дощі", "Київ обіцяє на")]
    f = 1 * 0.75 / (0.9 * 1 + 0.1 * 0.75)
    assert one("meteor", pair).value == pytest.approx(f * (1 - 0.5 * (1 / 3) ** 3))
    alone = (1 / 3) * 0.25 / (0.9 / 3 + 0.1 * 0.25) * 0.5
    assert one({"meteor": {"language": "none"}}, pair).value == pytest.approx(alone)
    assert one({"meteor": {"language": "ru"}}, pair).value < one("meteor", pair).value
    assert one("meteor", [("дощ", "")]).value == 0 and one("meteor", [("три слова тут", "три слова тут")]).value == (
        pytest.approx(1 - 0.5 / 27)
    )


def test_a_row_without_telling_letters_is_judged_by_its_prompt():
    pair = [("школами", "школою")] * 3
    scored = metrics.compute(["meteor"], outputs(pair, ["Де вони були, її діти?", "", "Where?"]))["meteor"]
    assert scored.rows.tolist() == [0.5, 0.5, 0.5]  # both stemmers know these endings: one word of one, in one run
    told = outputs([("читачу", "читачеві")] * 2, ["Її діти", "Это они"])
    assert metrics.compute(["meteor"], told)["meteor"].rows.tolist() == [0.5, 0]


def test_synonyms_are_asked_of_english_where_wordnet_is_and_the_signature_says_so(monkeypatch):
    class Lemma:
        def name(self):
            return "auto"

    class Synset:
        def lemmas(self):
            return [Lemma()]

    class Wordnet:
        def get_version(self):
            return "3.0"

        def synsets(self, word):
            return [Synset()] if word in ("car", "дім") else []

    pairs = [("auto", "car"), ("їжа й дія auto", "дім")]
    monkeypatch.setattr(nltk.corpus, "wordnet", Wordnet())
    meteor._wordnet.cache_clear()
    try:
        with_it = one("meteor", pairs)
        assert with_it.rows.tolist() == [0.5, 0] and "|synonyms:wordnet-3.0|" in with_it.signature
        assert one({"meteor": {"synonyms": False}}, pairs).rows.tolist() == [0, 0]
        assert "|synonyms:none|" in one({"meteor": {"language": "uk"}}, pairs).signature
    finally:
        meteor._wordnet.cache_clear()


@pytest.mark.parametrize(
    "forms",
    [
        "президент президента президенту президентові президентом президенти президентів президентами",
        "війна війни війні війну війною війнами",
        "область області областю областей областям областями областях",
        "діяльність діяльності діяльністю",
        "захід заходу заходом заходи заходів заходами",
        "програма програми програмі програму програмою програм програмам програмами програмах",
        "депутат депутата депутати депутатів депутатами",
        "канал каналу канали каналів каналами",
        "армія армії армію армією армій арміями",
        "знання знанню знанням знань знаннями",
        "будинок будинку будинки будинків",
        "вересень вересня вересні вереснем",
        "хлопець хлопця хлопці хлопцем хлопців",
        "київ києва києву києвом києві",
        "новий нового новому новим нова нової нову новою нове нові нових новими",
        "синій синього синьому синім синя синьої синю синьою синє сині синіх синіми",
        "військовий військового військова військові військових військовими",
        "сказав сказала сказали сказати сказало",
        "говорити говорив говорила говорю говорить говорять говоримо говорите говорячи",
        "працювати працював працювала працює працюють працюємо працюватиме працюючи",
        "дивитися дивився дивилася дивились дивиться",
    ],
    ids=lambda forms: forms.split()[0],
)
def test_forms_of_a_ukrainian_word_have_one_stem(forms):
    assert len({stems.ukrainian(form) for form in forms.split()}) == 1, [stems.ukrainian(f) for f in forms.split()]


def test_different_ukrainian_words_have_different_stems():
    apart = ["голос", "голка", "школа", "шкода", "місяць", "місце", "мова", "море", "зима", "земля", "вода", "відділ"]
    assert len({stems.ukrainian(word) for word in apart}) == len(apart)
    for word in ("я", "ти", "він", "це", "рік", "всі"):
        assert stems.ukrainian(word) == word


# Short answers


def squad(text: str) -> str:
    """SQuAD's evaluation script, in the order of its rules."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_f1(prediction: str, reference: str) -> float:
    a, b = squad(prediction).split(), squad(reference).split()
    same = sum((Counter(a) & Counter(b)).values())
    if not a or not b:
        return float(a == b)
    return 0.0 if not same else 2 * (same / len(a)) * (same / len(b)) / (same / len(a) + same / len(b))


ENGLISH_TEXT = st.text(st.sampled_from("aAnNtThHeE  bcé012'\".,!?()-_\n"), max_size=24)


@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(ENGLISH_TEXT, ENGLISH_TEXT)
@example("The Cat.", "a cat")
def test_short_answers_are_squads_but_for_numbers(reference, prediction):
    # what is between digits or signs a number is kept here, on purpose
    plain = [re.sub(r"[\"'.,!?()_-]+(?=\d)", "", text) for text in (reference, prediction)]
    pairs = [(plain[0], plain[1]), ("word", "word")]
    spec = {"ignore": ["case", "punctuation", "articles"]}
    exact, f1 = metrics.compute([{"exact_match": spec}, {"token_f1": spec}], outputs(pairs)).values()
    (r, p), _ = pairs
    assert exact.rows[0] == (squad(p) == squad(r)) and f1.rows[0] == pytest.approx(squad_f1(p, r))


@pytest.mark.parametrize(
    ("reference", "prediction", "exact", "f1"),
    [
        ("Київ", "«київ».", 1, 1),
        ("п'ять їжаків", "Пʼять  ЇЖАКІВ!", 1, 1),
        ("на доктора", "На доктора смотрел он", 0, 2 * 2 / 6),
        ("старий дуб", "дуб старий", 0, 1),
        ("так", "", 0, 0),
        ("…", "", 1, 1),
        ("3.5", "35", 0, 0),
        ("−5", "-5", 1, 1),
        ("5", "-5", 0, 0),
        ("2014–2022", "(2014-2022)", 1, 1),
        ("東京です", "東京。", 0, 2 * 2 / 6),
        ("cat", "the cat", 0, 2 * 1 / 3),
        ("C++", "C", 0, 0),
        ("й", "и\u0306", 1, 1),
    ],
)
def test_short_answers_by_hand(reference, prediction, exact, f1):
    pairs = [(reference, prediction), ("слово", "слово")]
    found = metrics.compute(["exact_match", "token_f1"], outputs(pairs))
    assert found["exact_match"].rows[0] == exact and found["token_f1"].rows[0] == pytest.approx(f1)


def test_what_is_ignored_is_the_recipes_choice():
    pairs = [("Дім", "дім"), ("дім", "дім."), ("дім", " дім\n")]
    assert one({"exact_match": {"ignore": []}}, pairs).rows.tolist() == [0, 0, 1]
    assert one({"exact_match": {"ignore": ["case"]}}, pairs).rows.tolist() == [1, 0, 1]
    strict, loose = one({"token_f1": {"ignore": []}}, pairs), one("token_f1", pairs)
    assert strict.signature.startswith("token_f1|ignored:nothing|") and loose.value == 1
    assert loose.signature.startswith("token_f1|ignored:case+punctuation|")


# What they refuse, and where else they stand


@pytest.mark.parametrize("name", ["bleu", "chrf", "meteor", "exact_match", "token_f1"])
def test_references_without_words_are_an_error(name):
    with pytest.raises(DataError, match="reference"):
        metrics.compute([name], outputs([("…", "дощ"), ("", "сніг")]))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"bleu": {"tokenize": "spm"}}, "13a"),
        ({"chrf": {"char_order": 0}}, "char_order"),
        ({"meteor": {"language": "de"}}, "uk"),
        ({"exact_match": {"ignore": ["stopwords"]}}, "ignore"),
        ("blue", "bleu"),
    ],
)
def test_a_wrong_option_says_what_there_is(spec, says):
    with pytest.raises(RecipeError, match=says):
        metrics.read([spec])


def test_chrf_is_a_reward_in_0_to_1():
    pairs = [("Київ чекає", "Києву чекати"), ("дощ", "дощ"), ("сніг", "")]
    out = outputs(pairs)
    rows = [Record({}, f"a:{k}") for k in range(3)]
    given = rewards.Given(out.prompts, out.predictions, out.references, rows, [[]] * 3)
    total, each = rewards.compute(rewards.read([{"chrf": {"word_order": 2}}]), given)
    expected = [CHRF(word_order=2).sentence_score(p, [r]).score / 100 for r, p in pairs]
    assert each["chrf"] == pytest.approx(np.array(expected)) and total[1] == pytest.approx(1) and total[2] == 0


@pytest.mark.skipif(not DATA.exists(), reason="shared data are not here")
@pytest.mark.parametrize(
    ("file", "columns"),
    [("ru_qa_koziev/qa.jsonl", ("output", "input")), ("ukr_news_babel/xlsum_like.jsonl", ("title", "summary"))],
)
def test_real_texts_score_as_the_reference_implementations_say(file, columns):
    if not (DATA / file).exists():
        pytest.skip("not these")
    with (DATA / file).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(60), strict=False)]
    pairs = [(row[columns[0]], row[columns[1]]) for row in rows]
    references, predictions = map(list, zip(*pairs, strict=True))
    assert one("bleu", pairs).value == pytest.approx(BLEU().corpus_score(predictions, [references]).score, abs=1e-9)
    assert one("chrf", pairs).value == pytest.approx(CHRF().corpus_score(predictions, [references]).score, abs=1e-9)
    stemmed, whole = one("meteor", pairs), one({"meteor": {"language": "none"}}, pairs)
    assert stemmed.value >= whole.value > 0 and (stemmed.rows <= 1).all()
    assert stemmed.value > 1.1 * whole.value or not file.startswith("ukr")  # Ukrainian is where endings differ here
    for name in ("exact_match", "token_f1"):
        assert one(name, [(r, f"«{r.upper()}».") for r in references]).value == 1


def test_the_worked_numbers_in_docstrings_are_run_with_the_others():
    import doctest

    for module in (answers, corpus, meteor, stems):
        found = doctest.testmod(module)
        assert found.failed == 0 and found.attempted > 0


def test_bleu_of_answers_too_short_for_it_says_so() -> None:
    """Right answers of three words get 0, from sacrebleu too; with a full stop they have four tokens."""
    short = [("на доктора", "на доктора"), ("в тёмном лесу", "в тёмном лесу")]
    assert BLEU().corpus_score([s for s, _ in short], [[r for _, r in short]]).score == 0
    scores = one("bleu", short)
    assert scores.value == 0 and "no reference has so many" in (scores.notice or "")
    long = [*short, ("в тёмном лесу.", "в тёмном лесу.")]
    assert one("bleu", long).notice is None and one("bleu", long).value == 100
    assert one("chrf", short).notice is None
