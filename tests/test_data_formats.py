"""Templates and TRL's dataset types."""

from __future__ import annotations

from pathlib import Path

import pytest

from temper.data import formats, sources, templates
from temper.errors import DataError, RecipeError
from temper.types import Record

SHARED = Path(__file__).parents[2] / "shared" / "data"
ROW = {"q": "2+2?", "a": 4, "none": None, "nan": float("nan"), "list": ["x", "y"], "text": "a {b}", "a b.c": "odd"}


def made(templates, row=ROW, **options):
    return formats.apply([Record(row, "x.csv:7")], templates, **options)[0].row


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{q}", "2+2?"),
        ("Q: {q}\nA: {a}", "Q: 2+2?\nA: 4"),
        ("{{{q}}} {{}}", "{2+2?} {}"),
        ("{text}{text}", "a {b}a {b}"),  # a value is never read as a template
        ("<{none}{nan}>", "<>"),
        ("{none}", ""),
        ("{a b.c}", "odd"),
        ("", ""),
        ("plain", "plain"),
    ],
)
def test_templates(template, expected):
    assert made({"text": template}) == {"text": expected}


def test_a_prompt_is_the_beginning_of_a_text_and_its_completion_the_rest():
    made_by = {"prompt": "{text|first 3 words}", "completion": "{text | after 3 words}!"}
    rows = [Record({"text": "  Ця стрічка —\tсправжнє  диво"}, "a:1"), Record({"text": "коротко"}, "a:2")]
    made = [r.row for r in formats.apply(rows, made_by)]
    assert made[0] == {"prompt": "Ця стрічка —", "completion": "справжнє  диво!"}
    assert made[1] == {"prompt": "коротко", "completion": "!"}
    assert templates.columns("{text|first 3 words} {other|last 3 words}", "text") == {"text", "other|last 3 words"}
    with pytest.raises(DataError, match=r"only a text has words.*«text» holds") as caught:
        formats.apply([Record({"text": ["a"]}, "a:7")], {"text": "{text|first 1 word}"})
    assert caught.value.where == "a:7"


def test_one_column_alone_keeps_its_kind():
    messages = [{"role": "user", "content": "hi"}]
    assert made({"messages": "{m}"}, {"m": messages}) == {"messages": messages}
    assert made({"text": "{q}", "label": "{a}"}) == {"text": "2+2?", "label": 4}
    with pytest.raises(DataError, match="«prompt» is int"):
        made({"prompt": "{a}"})


def test_messages_from_templates_and_kept_columns():
    row = made(
        {"messages": [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{a}!"}]}, keep=["list"]
    )
    assert row["messages"] == [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4!"}]
    assert row["list"] == ["x", "y"] and set(row) == {"messages", "list"}


@pytest.mark.parametrize(
    ("text", "label"), [("1", 1), ("0.5", 0.5), ("True", True), (" false ", False), ("sports", "sports"), ("", "")]
)
def test_labels_of_csv_files_are_numbers_again(text, label):
    row = made({"text": "{t}", "label": "{l}"}, {"t": "x", "l": text})
    assert row["label"] == label and type(row["label"]) is type(label)


def test_a_missing_column_is_named_with_its_line():
    with pytest.raises(DataError) as caught:
        made({"prompt": "{summery}"}, {"summary": "s", "text": "t"})
    assert caught.value.where == "x.csv:7" and "did you mean «summary»?" in caught.value.do
    assert "«summery»" in caught.value.what and "summary, text" in caught.value.what


@pytest.mark.parametrize("template", ["{", "a } b", "{}", "{a{b}}"])
def test_lone_braces(template):
    with pytest.raises(RecipeError, match="lone"):
        made({"text": template})


def test_recipe_errors():
    with pytest.raises(RecipeError, match="did you mean «completion»"):
        made({"completions": "{q}"})
    with pytest.raises(RecipeError, match="both kept and made"):
        made({"text": "{q}"}, keep=["text"])
    with pytest.raises(DataError, match="no column «lst» to keep"):
        made({"text": "{q}"}, keep=["lst"])
    with pytest.raises(DataError, match="cannot stand inside"):
        made({"text": "list: {list}"})


U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "a"}, "language_modeling"),
        ({"messages": [U, A]}, "language_modeling"),
        ({"prompt": "a"}, "prompt_only"),
        ({"prompt": [U]}, "prompt_only"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": [U], "completion": [A]}, "prompt_completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"chosen": "b", "rejected": "c"}, "preference"),
        ({"chosen": [U, A], "rejected": [U, A]}, "preference"),
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired_preference"),
    ],
)
def test_types(row, kind):
    assert formats.dataset_type(row) == kind


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "no columns"),
        ({"question": "a"}, "question"),
        ({"completion": "a"}, "needs its prompt"),
        ({"chosen": "a", "prompt": "b"}, "both chosen and rejected"),
        ({"text": "a", "messages": [U]}, "not clear"),
        ({"prompt": "a", "messages": [U]}, "not clear"),
        ({"text": None}, "NoneType"),
        ({"text": ["a"]}, "list, not text"),
        ({"messages": []}, "not empty"),
        ({"messages": "hi"}, "list of messages"),
        ({"messages": [{"from": "human", "value": "x"}]}, "from, value"),
        ({"messages": [U, {"role": "gpt", "content": "x"}]}, r"messages\[1\]: unknown role 'gpt'"),
        ({"messages": [{"role": "user", "content": None}]}, "NoneType, not text"),
        ({"prompt": "a", "completion": [A]}, "some are text"),
        ({"prompt": "a", "completion": "b", "label": 0.7}, "true"),
        ({"prompt": "a", "completion": "b", "label": 2}, "true"),
    ],
)
def test_rows_of_no_type(row, said):
    with pytest.raises(DataError, match=said):
        formats.dataset_type(row, where="f:1")


def test_one_source_gives_one_type_that_the_stage_can_use():
    records = [Record({"prompt": "a", "completion": "b"}, "f:1"), Record({"prompt": "a"}, "f:2")]
    with pytest.raises(DataError, match="f:2"):
        formats.apply(records, {})
    with pytest.raises(DataError, match="preference"):
        formats.apply(records[:1], {}, ["preference"])
    assert formats.apply(records[:1], {}, ["prompt_completion"]) == records[:1]


def test_prompts_and_texts():
    system = {"role": "system", "content": "be brief"}
    assert formats.prompt_of({"messages": [system, U, A]}) == "be brief\nhi"
    assert formats.prompt_of({"messages": [U]}) is None
    assert formats.prompt_of({"chosen": [U, A], "rejected": [U, A]}) == "hi"
    assert formats.prompt_of({"prompt": " "}) is None and formats.prompt_of({"text": "a"}) is None
    assert formats.texts({"prompt": [U], "completion": "x", "url": "http"}) == {"prompt": "hi", "completion": "x"}
    assert formats.texts({"b": "2", "a": "1", "n": 3}) == {"a": "1", "b": "2"}
    assert formats.normalised(" Cafe\u0301\n\nÉTÉ ") == "café été"
    assert formats.canonical({"b": float("nan"), "a": (1, "я")}) == '{"a":[1,"я"],"b":null}'


@pytest.mark.skipif(not SHARED.exists(), reason="no shared data")
def test_real_rows():
    records = sources.read("ru_instruct_gpt4/train.tsv", base=SHARED).records
    rows = formats.apply(records, {"prompt": "{instruction}\n{input}", "completion": "{output}"}, ["prompt_completion"])
    assert all(new.row["prompt"].startswith(old.row["instruction"]) for new, old in zip(rows, records, strict=True))
    pairs = sources.read("rasbt_instruct_dpo/instruction-data-with-preference.json", base=SHARED).records
    templates = {"prompt": "{instruction}\n{input}", "chosen": "{chosen}", "rejected": "{rejected}"}
    assert len(formats.apply(pairs, templates, ["preference"])) == 1100


def test_a_text_carried_along_is_no_part_of_the_example() -> None:
    pair = {"prompt": "a", "completion": "b"}
    assert formats.texts(pair | {"text": "the whole article"}) == formats.texts(pair) == pair
    assert formats.texts({"text": "t", "note": "n"}) == {"text": "t"}
