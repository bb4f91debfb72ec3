"""Votes without a browser: how they are kept, scores and intervals, agreement, how many more, items, and training on them."""

from __future__ import annotations

import itertools
import json
import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression

from preferred import model_at, pairs, run, text
from temper import statistics
from temper.data import sources
from temper.errors import DataError, RunError
from temper.runfolder import read_json
from temper.serve import ranking
from temper.serve.items import Item, List, read
from temper.serve.playground import ranked
from temper.serve.ranking import Outcome
from temper.serve.votes import Battle, Votes, preferences

ASK = [{"role": "user", "content": "w5 w6"}]


def battle(
    id: str, verdict: Any = "left", *, left: str = "x", right: str = "y", item: str | None = None, who: str = "ann", messages: Any = None, **texts: str
) -> Battle:
    said: Any = {"left": texts.get("a", "w8 w9"), "right": texts.get("b", "w10")}
    return Battle(id, 0.0, who, item, messages or ASK, {}, {"left": left, "right": right}, said, {"left": True, "right": True}, verdict, 1.0)


# Scores


def drawn(games: int, strengths: dict[str, float], seed: int) -> list[Outcome]:
    """Verdicts as Bradley and Terry's model has them, a tenth of them ties."""
    rng = np.random.default_rng(seed)
    out = []
    for k in range(games):
        a, b = sorted(rng.choice(list(strengths), 2, replace=False))
        chance = 1 / (1 + np.exp(strengths[b] - strengths[a]))
        out.append(Outcome(a, b, 0.5 if rng.random() < 0.1 else float(rng.random() < chance), f"p{k}", "ann"))
    return out


STRENGTHS = {"a": 1.2, "b": 0.3, "c": 0.0, "d": -1.5}


def test_scores_are_those_of_a_logistic_regression() -> None:
    """scikit-learn's, unpenalised, of a row for each win, a tie being half of either, and the imaginary ties as rows."""
    found = drawn(300, STRENGTHS, 0)
    names = sorted(STRENGTHS)
    rows, weights, won = [], [], []
    games = [(o.a, o.b, o.score, 1.0) for o in found] + [(a, b, 0.5, ranking.PRIOR) for a, b in itertools.combinations(names, 2)]
    for a, b, score, weight in games:
        row = [float(n == a) - float(n == b) for n in names]
        for outcome, share in ((1, score), (0, 1 - score)):
            if share:
                rows.append(row)
                weights.append(weight * share)
                won.append(outcome)
    fit = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000).fit(rows, won, sample_weight=weights)
    expected = fit.coef_[0] - fit.coef_[0].mean()
    assert np.abs(ranking.bradley_terry(ranking.table(found, names)) - expected).max() < 1e-4
    by_name = {row["model"]: row["score"] for row in ranking.ranked(found)}
    assert [by_name[n] for n in names] == pytest.approx(1000 + 400 / np.log(10) * expected, abs=0.05)
    assert by_name["a"] - by_name["d"] == pytest.approx(400 / np.log(10) * 2.7, rel=0.25), "what they were drawn from"


@pytest.mark.parametrize("games", [1, 3, 40])
def test_scores_make_the_written_out_likelihood_greatest(games: int) -> None:
    """Also where one model always won, and where models fall into groups that never met."""
    wins = np.zeros((5, 5))
    wins[0, 1], wins[1, 2], wins[3, 4] = games, games, 1

    def unlikely(s: np.ndarray) -> float:
        out = 0.0
        for i, j in ((0, 1), (1, 2), (3, 4)):
            out += (wins[i, j] + ranking.PRIOR / 2) * np.log1p(np.exp(s[j] - s[i])) + ranking.PRIOR / 2 * np.log1p(np.exp(s[i] - s[j]))
        return out + 1e-9 * (s @ s)  # each group about 0

    expected = minimize(unlikely, np.zeros(5), method="BFGS", options={"gtol": 1e-9}).x
    assert np.abs(ranking.bradley_terry(wins) - (expected - expected.mean())).max() < 1e-3


def test_groups_are_what_no_chain_of_votes_connects() -> None:
    found = [Outcome("a", "c", 1, "1", "ann"), Outcome("b", "d", 1, "2", "ann"), Outcome("c", "e", 0, "3", "ann")]
    groups = {row["model"]: row["group"] for row in ranking.ranked(found)}
    assert groups == {"a": 0, "c": 0, "e": 0, "b": 1, "d": 1}


def test_intervals_cover_what_the_votes_were_drawn_from() -> None:
    """About 95 % of the time."""
    # a tenth are ties, which are no part of the model: what the estimate tends to is that of the mixture
    chance = 0.05 + 0.9 / (1 + np.exp(-1.8))
    true = 1000 + 400 / np.log(10) * np.log(chance / (1 - chance)) / 2
    hit = 0
    for seed in range(30):
        rows = {r["model"]: r for r in ranking.ranked(drawn(120, {"a": 0.9, "b": -0.9}, seed))}
        hit += rows["a"]["low"] <= true <= rows["a"]["high"]
    assert 25 <= hit <= 30, hit


def test_intervals_resample_prompts() -> None:
    """Ten people who say the same of each prompt tell no more of the models than one; ten times as many prompts do."""
    few = [Outcome("a", "b", float(k % 3 > 0), f"p{k}", "ann") for k in range(30)]
    people = [Outcome("a", "b", o.score, o.prompt, f"who{w}") for o in few for w in range(10)]
    prompts = [Outcome("a", "b", o.score, f"{o.prompt}-{w}", "ann") for o in few for w in range(10)]

    def width(found: list[Outcome]) -> float:
        (row,) = (r for r in ranking.ranked(found) if r["model"] == "a")
        return row["high"] - row["low"]

    assert width(people) == pytest.approx(width(few), rel=0.15)  # the imaginary tie weighs less
    assert width(prompts) == pytest.approx(width(people) / np.sqrt(10), rel=0.2)
    one, many, more = (ranking.couples(found)[0] for found in (few, people, prompts))
    assert (many["votes"], many["prompts"]) == (300, 30)
    assert {k: one[k] for k in ("rate", "low", "high", "p", "more")} == {k: many[k] for k in ("rate", "low", "high", "p", "more")}
    assert more["high"] - more["low"] < (one["high"] - one["low"]) / 2.5 and more["p"] < one["p"]


def test_couples_count_and_are_corrected_together() -> None:
    battles = [battle(f"1{k}", "left" if k < 9 else "both_bad") for k in range(12)]
    battles += [battle(f"2{k}", "right", left="z") for k in range(3)] + [battle("3", "tie", left="z", right="x")]
    found = ranked(battles)
    first, second, third = found["couples"]
    assert [(c["a"], c["b"]) for c in found["couples"]] == [("x", "y"), ("x", "z"), ("y", "z")]
    assert [first[k] for k in ("votes", "a_better", "b_better", "tied", "both_bad")] == [12, 9, 0, 0, 3]
    assert first["rate"] == 10.5 / 12 and second["rate"] == 0.5 and third["rate"] == 1
    assert [c["p_adjusted"] for c in found["couples"]] == statistics.holm([c["p"] for c in found["couples"]])
    assert first["p"] == pytest.approx(2 * 0.5**9, rel=0.3), "nine of nine that differ, two-sided"
    assert first["more"] == 0 and second["more"] is None and third["more"] is None
    scores = {m["model"]: [m[k] for k in ("votes", "won", "lost", "tied", "both_bad")] for m in found["models"]}
    assert scores == {"x": [13, 9, 0, 1, 3], "y": [15, 3, 9, 0, 3], "z": [4, 0, 3, 1, 0]}
    assert found["people"] == [{"who": "ann", "votes": 16}] and found["agreement"] is None
    assert ranked([]) == {"votes": 0, "models": [], "couples": [], "agreement": None, "people": []}


def test_so_many_more_prompts_separate_two_models_in_four_of_five_cases() -> None:
    """Seen with verdicts drawn at the rate that was seen: about 80 % of lists that long come out below 0.05."""
    found = [Outcome("a", "b", float(k % 5 < 3), f"p{k}", "ann") for k in range(40)]  # 24 of 40
    (row,) = ranking.couples(found)
    total = 40 + row["more"]
    sd = np.sqrt(0.6 * 0.4 * 40 / 39)
    assert total == pytest.approx(((norm.ppf(0.975) + norm.ppf(0.8)) * sd / 0.1) ** 2, abs=1)
    rng = np.random.default_rng(0)
    wins = rng.binomial(total, 0.6, 4000)
    shown = np.mean(np.abs(wins - total / 2) / (np.sqrt(total) / 2) > norm.ppf(0.975))
    assert shown == pytest.approx(0.8, abs=0.04)
    assert ranking.couples(found[:4])[0]["more"] is None, "of a few prompts nothing is said"
    assert ranking.couples([Outcome("a", "b", 1.0, f"p{k}", "ann") for k in range(5)])[0]["more"] is None


# Agreement


def said(*rows: list[float | None]) -> list[Outcome]:
    """Ratings of people, one row each: 0 worse, 1 neither, 2 better."""
    return [
        Outcome("a", "b", value / 2, f"p{k}", f"who{w}") for w, row in enumerate(rows) for k, value in enumerate(row) if value is not None
    ]  # fmt: skip


def test_agreement_is_krippendorffs_alpha() -> None:
    """By hand, of two people and ten units in two categories: Krippendorff 2011, "Computing Krippendorff's alpha-reliability",
    example A: α = 0.095 (nominal, which of two categories ordinal is)."""
    meg, owen = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    found = ranking.agreement(said([2 * x for x in meg], [2 * x for x in owen]))  # type: ignore[misc]
    assert found is not None and found["alpha"] == pytest.approx(0.095, abs=5e-4)
    assert (found["people"], found["shared"]) == (2, 10) and found["low"] < 0.095 < found["high"]


def test_worse_and_better_are_further_apart_than_a_tie() -> None:
    """By hand: the ordinal distance of two ranks is (half of either and all between)²."""
    rows = [[0.0, 0, 1, 2, 2, 1, 2, None], [0.0, 1, 1, 2, 0, 1, 2, 2]]
    units = [pair for pair in zip(*rows, strict=True) if None not in pair]
    n = {v: sum(pair.count(v) for pair in units) for v in (0, 1, 2)}

    def apart(a: int, b: int) -> float:
        a, b = sorted((a, b))
        return (sum(n[v] for v in range(a, b + 1)) - (n[a] + n[b]) / 2) ** 2

    values = [v for pair in units for v in pair]
    observed = sum(apart(int(a), int(b)) for a, b in units) / len(units)  # type: ignore[arg-type]
    expected = sum(apart(int(a), int(b)) for a, b in itertools.permutations(values, 2)) / (len(values) * (len(values) - 1))  # type: ignore[arg-type]
    found = ranking.agreement(said(*rows))
    assert found is not None and found["alpha"] == pytest.approx(1 - observed / expected) and found["shared"] == 7


def test_without_anything_shared_there_is_no_agreement() -> None:
    assert ranking.agreement(said([0, 2, None, None], [None, None, 2, 0])) is None
    same = ranking.agreement(said([2, 2, 2], [2, 2, 2]))
    assert same is not None and same["alpha"] is None and same["low"] is None
    three = ranking.agreement(said([0, 2, 1, None], [0, 2, 1, None], [None, None, None, 2]))
    assert three is not None and three["alpha"] == 1 and three["people"] == 2, "who shares nothing does not count"


# Votes in a file


def begun(votes: Votes, id: str, who: str = "ann") -> None:
    votes.begin(id, who, ASK, {"left": "x", "right": "y"}, {"seed": 1})


def test_a_vote_is_kept(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "deep" / "v.sqlite")
    begun(votes, "1")
    assert votes.battle("2") is None and votes.judged() == []
    for side, other in (("left", "w8"), ("right", "")):
        votes.write("1", side, other, side == "left")  # type: ignore[arg-type]
        votes.write("1", side, "something else", True)  # type: ignore[arg-type]
    assert votes.judge("1", "tie", "bob") and not votes.judge("1", "left", "eve"), "once"
    votes.close()
    (found,) = Votes(tmp_path / "deep" / "v.sqlite").judged()
    assert (found.texts, found.ended) == ({"left": "w8", "right": ""}, {"left": True, "right": False}), "what came first"
    assert (found.verdict, found.who, found.messages, found.settings) == ("tie", "bob", ASK, {"seed": 1})


@pytest.mark.parametrize("kind", ["damaged", "foreign", "foreign with our version", "of a later version", "a folder"])
def test_a_file_that_is_none_of_ours_is_left_alone(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "v.sqlite"
    if kind == "damaged":
        file.write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 16)
    elif kind == "a folder":
        file.mkdir()
    else:
        with sqlite3.connect(file) as base:
            base.execute("CREATE TABLE songs (name TEXT)")
            base.execute(f"PRAGMA user_version = {dict(foreign=0).get(kind, 9 if 'later' in kind else 1)}")
        base.close()
    before = file.read_bytes() if file.is_file() else b""
    with pytest.raises(RunError) as caught:
        Votes(file)
    assert str(file) in str(caught.value) and "--votes" in caught.value.do
    assert not file.is_file() or file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["v.sqlite"]


def test_many_vote_at_once_in_two_processes_worth_of_connections(tmp_path: Path) -> None:
    bases = [Votes(tmp_path / "v.sqlite") for _ in range(2)]
    begun(bases[0], "same")
    won: list[bool] = []

    def work(k: int) -> None:
        votes = bases[k % 2]
        for i in range(15):
            begun(votes, f"{k}-{i}")
            votes.write(f"{k}-{i}", "left", "l", True)
            votes.write(f"{k}-{i}", "right", "r", True)
            assert votes.judge(f"{k}-{i}", "left", f"who{k}")
        won.append(votes.judge("same", "left", f"who{k}"))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]
    assert all(len(votes.judged()) == 8 * 15 + 1 for votes in bases)


# Rows of preferences


def test_votes_for_one_of_two_answers_are_rows() -> None:
    battles = [
        battle("1"), battle("2", "right"), battle("3", "tie"), battle("4", "both_bad"), battle("5", a="same", b="same"), battle("6", b=" \n"),
        battle("7", "tie"),
    ]  # fmt: skip
    rows, left_out = preferences(battles)
    assert left_out == {"tie": 2, "both_bad": 1, "equal answers": 1, "an empty answer": 1}
    assert [(r["prompt"], r["chosen"], r["rejected"], r["chosen_model"]) for r in rows] == [("w5 w6", "w8 w9", "w10", "x"), ("w5 w6", "w10", "w8 w9", "y")]
    talk = [{"role": "system", "content": "w7"}, *ASK]
    rows, _ = preferences([*battles, battle("8", messages=talk)])
    assert rows[0]["prompt"] == ASK and rows[-1]["prompt"] == talk and rows[0]["chosen"] == [{"role": "assistant", "content": "w8 w9"}]


def test_votes_are_read_as_data_and_trained_on(tmp_path: Path) -> None:
    """After it the model prefers what people did."""
    votes = Votes(tmp_path / "v.sqlite")
    for k, pair in enumerate(pairs(56)):
        first = k % 2 == 0
        votes.begin(str(k), "ann", [{"role": "user", "content": pair["prompt"]}], {"left": "x", "right": "y"}, {})
        votes.write(str(k), "left", pair["chosen" if first else "rejected"], True)
        votes.write(str(k), "right", pair["rejected" if first else "chosen"], True)
        votes.judge(str(k), "tie" if k % 7 == 6 else "left" if first else "right", "ann")
    rows, left_out = preferences(votes.judged())
    assert len(rows) == 48 and left_out == {"tie": 8}
    file = tmp_path / "votes.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [record.row for record in sources.read(str(file), base=Path(), rows=None).records] == rows
    stage = run(tmp_path / "p", model_at(tmp_path / "model"), rows)
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    told = [line for line in lines if "validation_accuracy" in line]
    assert told[-1]["validation_accuracy"] > 0.8 and told[-1]["validation_loss"] < 0.55 < np.log(2), told
    assert read_json(stage.parent / "rows" / "card.json")["splits"] == {"train": 40, "validation": 8}, "no row is dropped"


# Items


def items(n: int) -> list[Item]:
    return [Item(f"i{k}", [{"role": "user", "content": text(k)}]) for k in range(n)]


def test_each_person_has_an_order_and_sides_of_their_own_and_finds_them_again() -> None:
    listed = List("items", items(40), ["y", "x", "z"])
    assert listed.total == 120
    one, again, other = listed.tasks("ann"), List("items", items(40), ["z", "y", "x"]).tasks("ann"), listed.tasks("bob")
    assert one == again, "a name draws it, not the order of the models"

    def what(tasks: list[Any]) -> list[tuple[Any, ...]]:
        return [(t.item.id, *sorted(t.models.values())) for t in tasks]

    assert what(one) != what(other) and set(what(one)) == set(what(other)) and len(set(what(one))) == 120
    assert what(one) != sorted(what(one))
    left = [t.models["left"] < t.models["right"] for t in one]
    assert 40 < sum(left) < 80, "sides are drawn"
    sides = dict(zip(what(other), (t.models["left"] for t in other), strict=True))
    assert 40 < sum(sides[w] == t.models["left"] for w, t in zip(what(one), one, strict=True)) < 80
    seen = [battle("1", item=one[0].item.id, left=one[0].models["right"], right=one[0].models["left"]), battle("2", None, item=one[1].item.id, **one[1].models)]
    tasks, done = listed.open("ann", seen)
    assert done == 1 and tasks == one[1:], "an open comparison comes again; one that was judged does not, whatever its sides"


def test_items_are_prompts_each_once(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {"prompt": "c", "completion": "d"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [i.messages[-1]["content"] for i in read(str(file), None)] == ["a", "c"]
    assert len(read(str(file), 1)) == 1
    for bad in ({"prompt": " "}, {"text": "a"}):
        file.write_text(json.dumps(bad) + "\n", encoding="utf-8")
        with pytest.raises(DataError, match="prompt") as caught:
            read(str(file), None)
        assert "rows.jsonl:1" in str(caught.value.where)
