"""Dialogues of all forms → messages; cleaning them, and ordering them by a mark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import temper
from temper.data import dialogues, formats
from temper.data.card import read_rows
from temper.data.clean import Best, Cleaned, Drop, clean, in_order
from temper.errors import DataError, RecipeError
from temper.types import Record

SHARED = Path(__file__).parents[2] / "shared" / "data"
JOKE = ["Почему в супе муха?", "Тише, а то все захотят."]
MESSAGES = [{"role": "user", "content": JOKE[0]}, {"role": "assistant", "content": JOKE[1]}]


def talk(*roles: str) -> dict[str, Any]:
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return {"messages": [{"role": names[r], "content": f"{r}{k}"} for k, r in enumerate(roles)]}


def records(rows: list[dict[str, Any]]) -> list[Record]:
    return [Record(row, f"jokes.jsonl:{k + 1}") for k, row in enumerate(rows)]


@pytest.mark.parametrize(
    "turns",
    [
        MESSAGES,
        JOKE,
        json.dumps(JOKE, ensure_ascii=False),
        [{"from": "human", "value": JOKE[0]}, {"from": "gpt", "value": JOKE[1]}],
        [{"from": "User", "value": JOKE[0]}, {"from": "ASSISTANT", "value": JOKE[1]}],
        [{"speaker_name": "Гость", "phrase": JOKE[0]}, {"speaker_name": "Официант", "phrase": JOKE[1]}],
        [{"speaker_name": "", "phrase": JOKE[0]}, {"speaker_name": None, "phrase": JOKE[1]}],
        [{"phrase": JOKE[0]}, {"phrase": JOKE[1]}],
    ],
)
def test_every_form_is_the_same_conversation(turns: Any) -> None:
    assert dialogues.messages(turns) == MESSAGES
    (made,) = formats.applied(records([{"parsed": turns}]), {"messages": "{parsed}"})
    assert made.row == {"messages": MESSAGES}


def test_sharegpts_column_needs_no_template() -> None:
    rows = [{"id": 1, "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]  # fmt: skip
    (made,) = formats.applied(records(rows), {})
    assert [m["role"] for m in made.row["messages"]] == ["system", "user", "assistant"]
    with pytest.raises(DataError, match="turn 2 is from «narrator»") as caught:
        dialogues.messages([{"from": "human", "value": "q"}, {"from": "narrator", "value": "x"}], "f:9")
    assert caught.value.where == "f:9"


def test_the_second_speaker_is_the_assistant_and_turns_of_one_role_are_one_message() -> None:
    turns = [("Муж", "a"), ("Муж", "b"), ("Жена", "c"), ("Сын", "d"), ("Муж", "e"), ("Жена", "f")]
    got = dialogues.messages([{"speaker_name": n, "phrase": p} for n, p in turns])
    assert [(m["role"], m["content"]) for m in got] == [("user", "a\nb"), ("assistant", "c"), ("user", "d\ne"), ("assistant", "f")]  # fmt: skip
    alone = dialogues.messages([{"speaker_name": "Муж", "phrase": p} for p in "ab"])
    assert alone == [{"role": "user", "content": "a\nb"}]


@pytest.mark.parametrize("odd", ["no list", "[not json", [], [1, 2], ["a", {"from": "x"}], 7, None])
def test_what_is_no_dialogue_is_refused_by_its_reader(odd: Any) -> None:
    with pytest.raises(DataError):
        list(formats.applied(records([{"m": odd}]), {"messages": "{m}"}))


def test_turns_are_counted_and_dropped() -> None:
    rows = [talk("u"), talk("u", "a"), talk("s", "u", "a"), talk("u", "a", "u"), talk("u", "a", "u", "a")]
    cleaned = clean(records(rows), Drop(turns=(2, 2)))
    assert [r.row for r in cleaned.kept] == rows[1:3]
    assert cleaned.counts == {"too many turns": 2, "too few turns": 1}
    with pytest.raises(ValueError, match="fewest"):
        Drop(turns=(3, 2))


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ("aua", "message 1 is from the assistant and nothing stands before it"),
        ("uu", "message 2 is from the user and follows one from the user"),
        ("uaa", "message 3 is from the assistant and follows one from the assistant"),
        ("usa", "message 2 is from the system and follows one from the user"),
        ("uta", "message 2 is from the tool and follows one from the user"),
    ],
)
def test_roles_out_of_order(roles: str, said: str) -> None:
    rows = records([talk("u", "a"), talk(*roles)])
    with pytest.raises(DataError, match=said) as caught:
        clean(rows, Drop())
    assert caught.value.where == "jokes.jsonl:2" and "disordered" in caught.value.do
    cleaned = clean(rows, Drop(disordered=True))
    assert len(cleaned.kept) == 1 and cleaned.counts == {"roles out of order": 1}


@pytest.mark.parametrize("roles", ["ua", "sua", "uata", "uatta", "uaua", "u"])
def test_roles_in_order(roles: str) -> None:
    assert dialogues.disorder(talk(*roles)) is None


def test_the_best_come_first_and_equal_marks_stay_as_they_came() -> None:
    rows = records([{"text": str(k), "mark": m} for k, m in enumerate([1, "4.5", 3.0, 4.5, 2])])
    whole = in_order(Cleaned(rows, []), Best(by="mark"))
    assert [r.row["text"] for r in whole.kept] == ["1", "3", "2", "4", "0"] and not whole.counts
    best = in_order(Cleaned(rows, [(rows[0], "empty")]), Best(by="mark", rows=2))
    assert [r.row["text"] for r in best.kept] == ["1", "3"]
    assert best.counts == {"not among the best 2 by mark": 3, "empty": 1}
    high = in_order(Cleaned(rows, []), Best(by="mark", at_least=3, rows=4))
    assert [r.row["text"] for r in high.kept] == ["1", "3", "2"]


@pytest.mark.parametrize(
    ("row", "said"),
    [({"mark": None}, "no number"), ({"mark": "good"}, "no number"), ({"mark": float("nan")}, "no number"), ({"marks": 3}, "no column «mark»")],
)  # fmt: skip
def test_a_row_without_a_mark_is_named(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        in_order(Cleaned(records([{"mark": 1}, row]), []), Best(by="mark"))
    assert caught.value.where == "jokes.jsonl:2"


def test_none_is_good_enough() -> None:
    with pytest.raises(DataError, match="the highest is 2"):
        in_order(Cleaned(records([{"mark": 2}]), []), Best(by="mark", at_least=3))


def test_a_filter_that_is_none_is_told_with_those_that_are() -> None:
    with pytest.raises(DataError) as caught:
        list(formats.applied(records([{"parsed": JOKE}]), {"text": "{parsed|last turns}"}))
    assert "first turn, last turn" in caught.value.do
    (row,) = formats.applied(records([{"parsed": JOKE}]), {"prompt": "{parsed|first turn}", "completion": "{parsed|last turn}"})  # fmt: skip
    assert row.row == {"prompt": JOKE[0], "completion": JOKE[1]}
    with pytest.raises(DataError, match="only a dialogue has turns"):
        list(formats.applied(records([{"parsed": "plain"}]), {"text": "{parsed|last turn}"}))


def test_a_label_by_a_threshold() -> None:
    rows = records([{"t": "a", "mark": "3.5"}, {"t": "b", "mark": 3.49}])
    made = list(formats.applied(rows, {"text": "{t}", "label": "{mark|at least 3.5}"}))
    assert [r.row["label"] for r in made] == ["yes", "no"]
    with pytest.raises(DataError, match="no number"):
        list(formats.applied(records([{"t": "a", "mark": ""}]), {"text": "{t}", "label": "{mark|at least 3.5}"}))


def made(tmp_path: Path, **stage: Any) -> Path:
    raw = {"name": "x", "seed": 1, "stages": {"jokes": {"stage": "data", "validation": 0, "test": 0, **stage}}}
    (tmp_path / "own.yaml").write_text(json.dumps(raw))
    return temper.run(tmp_path / "own.yaml", out=tmp_path / "run", quiet=True)


def test_a_data_stage_orders_its_rows_and_keeps_the_mark(tmp_path: Path) -> None:
    rows = [{"parsed": [f"вопрос {k}", f"ответ {k}"], "total_mark": k % 7} for k in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    run = made(tmp_path, source="a.jsonl", messages="{parsed}", best={"by": "total_mark", "rows": 10})
    got = [r.row for r in read_rows(run / "jokes/data/train.parquet")]
    marks = [r["total_mark"] for r in got]
    assert marks == sorted(marks, reverse=True) and len(marks) == 10 and min(marks) == 5
    card = json.loads((run / "jokes/card.json").read_text())
    assert card["rows_in"] == 40 and card["dropped"] == {"not among the best 10 by total_mark": 30}
    with pytest.raises(DataError, match=r"best\.by: there is no column «mark»"):
        made(tmp_path, source="a.jsonl", messages="{parsed}", best={"by": "mark", "rows": 10})
    with pytest.raises(RecipeError, match=r"best\.row"):
        made(tmp_path, source="a.jsonl", messages="{parsed}", best={"by": "total_mark", "row": 10})


def test_a_misspelt_role_among_the_prefixes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown key «jokes\.format\.speakers\.asistant»") as caught:
        made(tmp_path, source="a.jsonl", messages="{parsed}", format={"chat": "speakers", "speakers": {"user": "<a>", "asistant": "<b>"}})  # fmt: skip
    assert "assistant" in caught.value.do and "own.yaml:1" in caught.value.where


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data is not here")
def test_real_dialogues(tmp_path: Path) -> None:
    """45,000 jokes: those of two turns stay, and no turn is lost or changed."""
    file = SHARED / "ru_anekdots_dialogs" / "dialogs_45k.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()[:3000]]
    (tmp_path / "some.jsonl").write_text("\n".join(json.dumps(x, ensure_ascii=False) for x in lines))
    run = made(tmp_path, source="some.jsonl", messages="{parsed}", drop={"turns": [2, 2]})
    got = [[m["content"] for m in r.row["messages"]] for r in read_rows(run / "jokes/data/train.parquet")]
    wanted = [x["parsed"] for x in lines if len(x["parsed"]) == 2]
    assert 0.9 * len(wanted) < len(got) <= len(wanted) and all(g in wanted for g in got)


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data is not here")
@pytest.mark.parametrize("language", ["ru", "en"])
def test_real_marks(tmp_path: Path, language: str) -> None:
    file = SHARED / "clean_comedy_gold" / f"clean_comedy_gold_{language}.csv"
    run = made(tmp_path, source=str(file), text="{text}", label="{score|at least 3}", best={"by": "score", "rows": 300})
    rows = [r.row for r in read_rows(run / "jokes/data/train.parquet")]
    marks = [float(r["score"]) for r in rows]
    assert len(rows) == 300 and marks == sorted(marks, reverse=True)
    assert all((r["label"] == "yes") == (m >= 3) for r, m in zip(rows, marks, strict=True))
