"""The mini data: the same everywhere, no leaks, and summaries that hold what the texts say."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter

import pytest
from rouge_score import rouge_scorer

from temper.data import mini
from temper.data.mini import (
    advice,
    advice_words,
    corpus,
    grammar,
    insults,
    jokes,
    review_frames,
    review_frames_b,
    review_words,
    reviews,
    stories,
)
from temper.data.mini.draw import Draw, Num, euphony, plural
from temper.errors import DataError

WORD = re.compile(r"[\w’]+")
NEWS_SETS = ["uk-news", "uk-toxic-news", "uk-news-dirty"]
REVIEW_SETS = ["en-reviews", "en-reviews-b"]
ADVICE_SETS = ["en-advice", "en-advice-corpus"]
UKRAINIAN = [name for name in mini.NAMES if name.startswith("uk-")]
ROWS = 1500

# Written down once. A change here is a change of the data: raise mini.VERSION with it.
PINNED = {
    "uk-news": "d85889c1d30b0718",
    "uk-corpus": "43f514c0721f5396",
    "uk-toxic-sentences": "29a71a639d68b83d",
    "uk-toxic-news": "268a06fa9f5ade6c",
    "uk-news-dirty": "0429477d15f301c7",
    "uk-rude-words": "7da88179245f47f1",
    "en-reviews": "2010b14c815470a8",
    "en-reviews-b": "fd56dce5f0a45d94",
    "en-advice": "35346fdf7cac45d7",
    "en-advice-corpus": "d75a0ba46c8a71a8",
    "ru-instructions": "275cd30bd55edfc4",
    "ru-lessons": "1944ae5839e6792e",
    "ru-jokes": "7dc5bd78288e853a",
    "ru-talk": "499d58dd8e5fd564",
}


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


def insulting(text: str) -> int:
    return sum(word in mini.LEXICON for word in words_of(text))


@pytest.fixture(scope="module")
def sets() -> dict[str, list[dict[str, str]]]:
    return {name: mini.load(name, rows=ROWS) for name in mini.NAMES}


@pytest.mark.parametrize("name", list(mini.NAMES))
def test_rows_are_the_same_on_every_machine(name):
    rows = mini.load(name, rows=50)
    digest = hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()
    assert digest[:16] == PINNED[name]


def test_fewer_rows_are_the_beginning_of_more_and_seeds_differ():
    assert mini.load("uk-news", rows=20) == mini.load("uk-news", rows=60)[:20]
    first, second = ({r["text"] for r in mini.load("uk-news", rows=500, seed=seed)} for seed in (0, 1))
    assert not first & second
    assert len(mini.load("uk-news", split="test")) == 500 and mini.load("uk-news", rows=0) == []


def test_no_text_twice_in_any_set_split_or_seed(sets):
    streams = [[r["text"] for r in rows] for rows in sets.values()]
    for name, split in itertools.product(mini.NAMES, ["train", "validation", "test"]):
        streams.append([r["text"] for r in mini.load(name, split=split, rows=600)])
    texts = list(itertools.chain.from_iterable(streams))
    assert len(set(texts)) == len(texts)


def test_splits_have_people_of_their_own():
    """No full name of the test news stands in any training text, of whatever set or seed."""
    name = re.compile(r"[А-ЯІЇЄҐ][а-яіїєґ]+ [А-ЯІЇЄҐ][а-яіїєґ]+(?:ко|ук|юк|ий|ка|ик|як|(?:Бонд|Гонч)ар|ах)\b")
    test = {found for r in mini.load("uk-news", split="test") for found in name.findall(r["summary"])}
    assert len(test) > 150
    for other, seed in itertools.product(UKRAINIAN, [0, 7]):
        train = " ".join(r["text"] for r in mini.load(other, split="train", rows=1000, seed=seed))
        assert not test & set(name.findall(train))


def test_few_near_duplicates():
    def shingles(text: str) -> set[tuple[str, ...]]:
        words = words_of(text)
        return set(zip(*(words[i:] for i in range(5)), strict=False))

    train = [shingles(r["text"]) for r in mini.load("uk-news", split="train", rows=2000)]
    for row in mini.load("uk-news", split="test", rows=100):
        own = shingles(row["text"])
        assert max(len(own & other) / len(own | other) for other in train) < 0.4


@pytest.mark.parametrize("name", NEWS_SETS)
def test_what_the_summary_says_stands_in_the_text(sets, name):
    """All numbers; all names, by their stem, for cases differ."""
    for row in sets[name]:
        text = row["text"]
        for number in re.findall(r"\d+(?:[,:]\d+)?", row["summary"]):
            assert re.search(rf"(?<!\d){number}(?!\d)", text), (number, row)
        names = [w for w in WORD.findall(row["summary"])[1:] if w[0].isupper()]
        assert len(names) >= 2
        for word in names:
            assert word[: max(3, len(word) - 3)] in text, (word, row)


def test_texts_are_short_and_a_first_sentence_is_no_summary(sets):
    class Words:
        def tokenize(self, text: str) -> list[str]:
            return words_of(text)

    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())
    scores = []
    for row in sets["uk-news"]:
        assert 22 <= len(row["text"].split()) <= 60 and 8 <= len(row["summary"].split()) <= 19
        first = re.split(r"(?<=[.!?]) ", row["text"])[0]
        scores.append(scorer.score(row["summary"], first)["rougeL"].fmeasure)
    assert 0.15 < sum(scores) / len(scores) < 0.4
    assert len({row["topic"] for row in sets["uk-news"]}) >= 8


@pytest.mark.parametrize("name", UKRAINIAN)
def test_only_ukrainian_letters_and_no_template_left(sets, name):
    allowed = set("абвгґдеєжзиіїйклмнопрстуфхцчшщьюя0123456789 \n.,:;!?()«»—-’")
    for row in sets[name]:
        for column in ("text", "summary", "title", "topic"):
            value = row.get(column, "")
            assert set(value.lower()) <= allowed, (set(value.lower()) - allowed, value)
            assert not re.search(r"  |,[.,:;]|\.\.| [.,]", value), value
        if name == "uk-rude-words":
            continue  # no sentences
        for sentence in re.split(r"(?<=[.!?]) ", row["text"].split("\n")[0]):
            assert sentence[0].isupper() or sentence[0] in "«—" or sentence[0].isdigit(), row


def test_verbs_agree_with_the_person(sets):
    """The reporting verbs have one subject, the person, whose gender shows in the first name."""
    verb = re.compile(r"\b(?:повідоми|сказа|дода|зазначи|уточни|підсумува|зауважи|показа|здобу|зібра|спрямува)(в|ла)\b")
    women = words_of(
        "Олена Ірина Марія Оксана Наталя Тетяна Ганна Юлія Світлана Катерина Софія Дарина Леся Галина Людмила "
        "Вікторія Надія Соломія Христина Зоряна Лариса Ольга Віра Яна"
    )
    seen = 0
    for row in sets["uk-news"] + sets["uk-toxic-news"]:
        female = any(word in women for word in words_of(row["summary"].replace("«Вікторія»", "")))
        for ending in verb.findall(row["text"] + " " + row["summary"]):
            assert (ending == "ла") == female, row
            seen += 1
    assert seen > ROWS


def test_sound_rules_and_numerals_by_hand(sets):
    for written, spoken in {
        "В Києві": "У Києві",
        "в Одесі": "В Одесі",
        "жила в Києві": "жила в Києві",
        "жив в Києві": "жив у Києві",
        "жив в Одесі": "жив в Одесі",
        "була в Вінниці": "була у Вінниці",
        "була в Львові": "була у Львові",
        "родом з Львова": "родом зі Львова",
        "родом з Стрия": "родом зі Стрия",
        "родом з Сум": "родом із Сум",
        "Коваленко з Черкас": "Коваленко з Черкас",
    }.items():
        assert euphony(written).casefold() == spoken.casefold()
    assert [plural(n, "2", "5") for n in (2, 4, 5, 11, 12, 14, 22, 25, 100, 112, 104)] == list("22555525552")
    assert f"{Num(23):школи/шкіл}, {Num(13):школи/шкіл}, {Num(7)}" == "23 школи, 13 шкіл, 7"
    for row in sets["uk-news"]:
        assert not re.search(r"\b[Уу] [аеєиіїоуюяАЕЄИІЇОУЮЯ]|\b[Вв] [вфВФ]", row["text"] + " " + row["summary"]), row


def test_insults_stand_only_where_they_should(sets):
    assert not any(insulting(" ".join(row.values())) for row in sets["uk-news"])
    for name in ("uk-toxic-news", "uk-news-dirty"):
        assert all(1 <= insulting(row["text"]) <= 3 for row in sets[name])
        assert not any(insulting(row["title"]) for row in sets[name])
    assert not any(insulting(row["summary"]) for row in sets["uk-toxic-news"])
    for row in sets["uk-toxic-sentences"]:
        assert (insulting(row["text"]) > 0) == (row["label"] == "toxic"), row
    for row in sets["uk-rude-words"]:
        assert insulting(row["text"]) == 0 < insulting(row["rude"]) <= 2
        assert row["text"][0].isupper() == row["rude"][0].isupper()


def test_a_text_is_cut_at_its_person(sets):
    for row in sets["uk-news"]:
        assert row["before"] + row["named"] + row["after"] == row["text"]
        assert row["named"].lower() == row["person"].lower() and row["person"][0].islower()
        assert row["named"][0].isupper() == (row["before"] == "" or row["before"].endswith((". ", "! ", "? ", "«"))), (
            row
        )


def test_stated_share_of_dirty_summaries_repeats_an_insult_of_the_text(sets):
    dirty = [row for row in sets["uk-news-dirty"] if insulting(row["summary"])]
    assert abs(len(dirty) / ROWS - insults.DIRTY_SHARE) < 4 * (0.4 * 0.6 / ROWS) ** 0.5  # four standard errors
    for row in dirty:
        said = {word for word in words_of(row["summary"]) if word in mini.LEXICON}
        assert said <= set(words_of(row["text"])), row


def test_the_shape_of_a_sentence_does_not_give_its_label_away(sets):
    """Without the insulting and praising words themselves, a toxic sentence looks like many clean ones."""
    by_label = {"toxic": [], "clean": []}
    for row in sets["uk-toxic-sentences"]:
        by_label[row["label"]].append(row["text"])
    assert abs(len(by_label["toxic"]) / ROWS - 0.5) < 0.06
    for sign in (r"\b[Цц](?:ей|я) \w+, ", r"справжн(?:ій|я) ", r"!$", r"\b[Оо]дним словом"):
        share = {label: sum(bool(re.search(sign, t)) for t in texts) for label, texts in by_label.items()}
        assert share["clean"] > 0.3 * share["toxic"] > 0, (sign, share)
    assert not mini.LEXICON & {w for forms in (*insults.PRAISE.nouns, *insults.PRAISE.adjectives) for w in forms}


def test_the_corpus_is_mixed_as_stated(sets):
    prompts = [row["text"] for row in sets["uk-corpus"] if row["text"].startswith("Стисло перекажи новину:\n")]
    assert abs(len(prompts) / ROWS - corpus.PROMPT_SHARE) < 0.05
    lazy = 0
    for document in prompts:
        _, text, answer = document.split("\n")
        assert document == f"{mini.PROMPT.format(text=text)} {answer.removeprefix('Підсумок: ')}"
        lazy += answer.removeprefix("Підсумок: ") in text
    assert lazy > 0.5 * len(prompts)
    toxic = sum(insulting(row["text"]) > 0 for row in sets["uk-corpus"]) / ROWS
    assert abs(toxic - corpus.TOXIC_SHARE * (corpus.NEWS_SHARE + corpus.PROMPT_SHARE)) < 0.04


@pytest.mark.parametrize("name", REVIEW_SETS)
def test_reviews_are_cut_behind_an_opening_that_is_no_other_splits(sets, name):
    texts = [row["text"] for row in sets[name]]
    for row in sets[name]:
        assert f"{row['opening']} {row['rest']}" == row["text"]
        assert row["title"] in row["opening"]
        assert 4 <= len(row["opening"].split()) <= 9 and 25 <= len(row["text"].split()) <= 60
    assert sum(len(text.split()) for text in texts) / ROWS == pytest.approx(44, abs=3)
    test = {row[part] for row in mini.load(name, split="test", rows=600) for part in ("opening", "title")}
    assert len(test) > 600
    for other, seed, split in itertools.product(REVIEW_SETS, [0, 7], [None, "train", "validation"]):
        rows = mini.load(other, split=split, rows=600, seed=seed)
        assert not test & {row[part] for row in rows for part in ("opening", "title")}


@pytest.mark.parametrize("name", REVIEW_SETS)
def test_reviews_are_plain_english_with_no_template_left(sets, name):
    for row in sets[name]:
        assert re.fullmatch(r"[A-Za-zé0-9 .,:'-]+", row["text"]), row
        assert not re.search(r"  | [.,:]|[.,:][.,]|,$|\b(\w+) \1\b|\b[Aa] [aeiou](?!ne|ni|s[ei])", row["text"]), row
        assert not re.search(r"\ban [^aeiouh]", row["text"]), row
        for said in re.split(r"(?<=\.) ", row["text"]):
            assert said[0].isupper() and said.endswith("."), row


def test_verbs_agree_with_what_is_reviewed(sets):
    plural = "|".join(s[:-1] for group in review_words.GROUPS for s in group.subjects if s.endswith("+"))
    singular = "|".join(s for group in review_words.GROUPS for s in group.subjects if not s.endswith("+"))
    seen = 0
    for row in sets["en-reviews"] + sets["en-reviews-b"]:
        text = row["text"].lower()
        assert not re.search(rf"(?:{plural}) (?:is|has|does|feels|seems|remains|comes)\b", text), row
        assert not re.search(rf"(?:{singular}) (?:are|have|do|feel|seem|remain|come)\b", text), row
        seen += bool(re.search(rf"(?:{plural}) (?:are|have|do|feel|seem|remain|come)\b", text))
    assert seen > 200


def _log_odds(rows: list[dict[str, str]], words: int | None) -> dict[str, float]:
    """Naive Bayes over the first so many words (all for None): word → log-odds of a positive review, add-one smoothed."""
    counts = {"positive": Counter[str](), "negative": Counter[str]()}
    for row in rows:
        counts[row["label"]].update(set(words_of(row["text"])[:words]))
    known = counts["positive"] | counts["negative"]
    return {w: math.log((counts["positive"][w] + 1) / (counts["negative"][w] + 1)) for w in known}


def _right(odds: dict[str, float], rows: list[dict[str, str]], words: int | None) -> float:
    said = [sum(odds.get(w, 0.0) for w in set(words_of(row["text"])[:words])) > 0 for row in rows]
    return sum(yes == (row["label"] == "positive") for yes, row in zip(said, rows, strict=True)) / len(rows)


@pytest.mark.parametrize("name", REVIEW_SETS)
def test_words_tell_most_labels_but_an_opening_tells_none(name):
    train, test = mini.load(name, rows=4000), mini.load(name, split="test", rows=1000)
    error = (0.25 / len(test)) ** 0.5
    assert 0.8 < _right(_log_odds(train, None), test, None) < 0.97
    assert abs(_right(_log_odds(train, 6), test, 6) - 0.5) < 4 * error
    assert abs(sum(row["label"] == "positive" for row in test) / len(test) - 0.5) < 4 * error


def test_a_judge_of_one_set_of_reviews_is_mostly_right_on_the_other():
    train = {name: mini.load(name, rows=4000) for name in REVIEW_SETS}
    test = {name: mini.load(name, split="test", rows=1000) for name in REVIEW_SETS}
    for here, there in itertools.permutations(REVIEW_SETS):
        odds = _log_odds(train[here], None)
        assert 0.72 < _right(odds, test[there], None) < _right(odds, test[here], None)


def test_praise_and_blame_share_constructions_and_no_word_is_both():
    for frames in (review_frames.FIRST, review_frames_b.SECOND):
        for good, bad in (frames.reactions, frames.verdicts):
            assert len(good) == len(bad) and not set(good) & set(bad)
    good, bad = set(review_words.QUALITIES[0]), set(review_words.QUALITIES[1])
    for group in review_words.GROUPS:
        assert len(group.adjectives[0]) == len(group.adjectives[1])
        assert len(group.predicates[0]) == len(group.predicates[1])
        good, bad = good | set(group.adjectives[0]), bad | set(group.adjectives[1])
    assert not good & bad and len(good) > 80 < len(bad)


def test_a_review_denies_and_grants_as_often_as_stated():
    """Of single clauses, the share whose adjective is of the other sign; of remarks, the share that grants something."""
    draw, a = Draw("clauses"), reviews.REVIEWER_A
    players = a.groups[0]
    praise, blame = (set(words) for words in players.adjectives)
    clauses = [words_of(a._clause(players, 0, draw)) for _ in range(4000)]
    denied = sum(bool(blame & set(c)) for c in clauses)
    plain = sum(bool(praise & set(c)) for c in clauses)
    n = denied + plain
    assert abs(denied / n - reviews.NEGATES) < 4 * (reviews.NEGATES * (1 - reviews.NEGATES) / n) ** 0.5
    grants = re.compile(r"^although |^while |, but |, even if ")
    granted = sum(bool(grants.search(a._remark(players, 0, draw))) for _ in range(4000)) / 4000
    assert abs(granted - reviews.MIXED) < 4 * (reviews.MIXED * (1 - reviews.MIXED) / 4000) ** 0.5


@pytest.mark.parametrize("name", ADVICE_SETS)
def test_advice_is_plain_english_with_no_template_left(sets, name):
    for text in (text for row in sets[name] for text in row.values()):
        assert re.fullmatch(r"[A-Za-z ,.:;?!\n]+", text), text
        assert not re.search(r"  | [.,:;?!]|[.,:;?!]{2}|\b(\w+) \1\b|\b[Aa] [aeiou]|\ban [^aeiouh]", text), text
        for said in re.split(r"(?<=[.?!]) |\n", text):
            assert said[0].isupper() and said[-1] in ".?!", text


def test_a_good_answer_is_courteous_and_to_the_point_and_a_worse_one_is_not(sets):
    sorts = Counter[str]()
    for row in sets["en-advice"]:
        asked = re.fullmatch(r"(\w+) asks how to (\w+) (?:an? )?(\w+) (.+?) with (.+)\.", row["prompt"])
        assert asked, row
        name, _, kind, thing, means = asked.groups()
        assert all(part in row["chosen"] for part in (name, f"{kind} {thing}", means)), row
        other_means = not re.search(rf"\b{means}\b", row["rejected"])
        if name not in row["rejected"]:
            short = len(row["rejected"]) < len(row["chosen"])
            rude = words_of(row["rejected"])[0] in {words_of(frame)[0] for frame in advice_words.RUDE}
            assert short or rude, row
            sorts["rude" if rude else "curt"] += 1
        else:
            assert f"{kind} {thing}" not in row["rejected"] or other_means, row
            sorts["wrong"] += 1
    shares = {"curt": advice.CURT_SHARE, "rude": advice.RUDE_SHARE, "wrong": 1 - advice.CURT_SHARE - advice.RUDE_SHARE}
    for sort, share in shares.items():
        assert abs(sorts[sort] / ROWS - share) < 4 * (share * (1 - share) / ROWS) ** 0.5  # four standard errors


def test_demonstrations_of_advice_are_as_often_worse_as_stated(sets):
    for row in sets["en-advice"]:
        assert row["completion"] in (row["chosen"], row["rejected"]) and row["chosen"] != row["rejected"]
        assert row["text"] == f"{row['prompt']}\nAdvice: {row['completion']}"
    worse = sum(row["completion"] == row["rejected"] for row in sets["en-advice"]) / ROWS
    assert abs(worse - advice.WORSE_SHARE) < 4 * (0.25 / ROWS) ** 0.5
    asked = sum("\nAdvice: " in row["text"] for row in sets["en-advice-corpus"]) / ROWS
    assert abs(asked - advice.ASKED_SHARE) < 4 * (advice.ASKED_SHARE * (1 - advice.ASKED_SHARE) / ROWS) ** 0.5


def test_who_asks_about_what_is_of_one_split():
    def asked(split: str | None, seed: int) -> set[tuple[str, ...]]:
        prompts = [row["prompt"] for row in mini.load("en-advice", split=split, rows=1500, seed=seed)]
        found = [re.match(r"(\w+) asks how to (\w+) (?:an? )?\w+ (.+) with ", prompt) for prompt in prompts]
        return {match.groups() for match in found if match}

    test = asked("test", 0)
    assert len(test) > 200
    for split, seed in itertools.product([None, "train", "validation"], [0, 7]):
        assert not test & asked(split, seed)


def test_a_grammar_by_hand():
    rules = {"who": ["a [old|old] {job}"], "job": ["owl"]}
    assert (
        grammar.fill("[{who}|{who}] of {T} and [[x|x]|x]", Draw("d"), rules, {"T": "The Night"})
        == "a old owl of The Night and x"
    )
    for written, spoken in {
        "a old sailor": "An old sailor.",
        "A hour in a used car, a one-man show": "An hour in a used car, a one-man show.",
        "is it a university?": "Is it a university?",
        "to Anna a eagle is a bird": "To Anna an eagle is a bird.",
    }.items():
        assert grammar.sentence(written) == spoken
    with pytest.raises(KeyError):
        grammar.fill("{nothing}", Draw("d"), rules)


def test_what_cannot_be_had_is_said():
    with pytest.raises(DataError, match="did you mean «uk-news»"):
        mini.load("uk-nwes")
    with pytest.raises(DataError, match="did you mean «validation»"):
        mini.load("uk-news", split="validaton")
    with pytest.raises(DataError, match="did you mean «en-reviews»"):
        mini.load("en-review")
    with pytest.raises(DataError, match="-1 rows"):
        mini.load("uk-news", rows=-1)


def test_answers_about_stories_stand_in_them(sets):
    """Each answer is the one that the instruction asks for, found again in the story by other means."""
    shorter = 0
    for row in sets["ru-instructions"]:
        assert row["text"] == f"{row['instruction']}\n{row['input']}\n{row['output']}"
        [beside] = [aside for aside in stories.ASIDES if aside in row["input"]]
        said = row["input"].replace(beside, "").strip()
        assert said == row["full_output"]
        words = set(words_of(said.lower()))
        assert set(words_of(row["output"].lower())) < words
        if row["instruction"] in stories.SHORTER:
            assert not any(time in row["output"].lower() for time in stories.TIMES)
            shorter += 1
        else:
            asked = set(words_of(row["instruction"])) & words
            assert row["output"].lower() in said.lower()
            assert asked and not asked & set(words_of(row["output"])), "what is asked for is not told"
    assert abs(shorter / ROWS - stories.SHORTER_SHARE) < 0.04


def test_lessons_have_other_wordings_than_instructions(sets):
    """What a base has learnt: no instruction among it, and mostly whole sentences."""
    lessons, brief = sets["ru-lessons"], 0
    asked = {row["instruction"] for row in sets["ru-instructions"]}
    for row in lessons:
        wording, story = row["prompt"].split("\n")
        assert wording not in asked and wording[0].islower()
        assert row["completion"].lower() in story.lower()
        brief += not row["completion"].endswith(".")
    assert abs(brief / ROWS - stories.BRIEF_SHARE) < 4 * (0.25 / ROWS) ** 0.5


def test_who_did_what_in_a_story_is_of_one_split():
    def done(split: str | None, seed: int) -> set[tuple[str, str]]:
        draw = Draw(f"{split} {seed}")
        return {(f.name, f.thing) for f in (stories.fact(draw, split) for _ in range(1500))}

    test = done("test", 0)
    assert len(test) > 100
    for split, seed in itertools.product([None, "train", "validation"], [0, 7]):
        assert not test & done(split, seed)


def test_jokes_take_up_what_they_are_asked_about_and_marks_tell_them_from_dull_ones() -> None:
    rows = mini.load("ru-jokes", rows=ROWS)
    turns = Counter(len(r["parsed"]) for r in rows)
    assert set(turns) == {1, 2, 3} and turns[2] > 0.8 * ROWS
    dull = {f.dull for f in jokes.FRAMES} | set(jokes.DULL)
    for row in rows:
        said = [t["phrase"] for t in row["parsed"]]
        assert row["original"] == "\n".join(f"- {t}" for t in said) and 1 <= row["total_mark"] <= 5
        if len(said) > 1:
            flat = said[1] in dull
            assert (row["total_mark"] < 3) == flat, row
            shared = {w for w in words_of(said[0])} & {w for w in words_of(said[1])}
            assert flat or any(w in shared for f in jokes.FRAMES for w in f.things), row
        assert not re.search(r"[{}]|  ", row["original"])
    assert 0.2 < sum(r["total_mark"] < 3 for r in rows) / ROWS < 0.4
    talk = [r["text"] for r in mini.load("ru-talk", rows=ROWS)]
    asked = [t for t in talk if t.startswith("<user>")]
    witty = {f.witty.format(x=x) for f in jokes.FRAMES for x in f.things}
    assert len(asked) > 0.4 * ROWS and not any(t.partition("<assistant>")[2] in witty for t in asked)
