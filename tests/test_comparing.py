"""Models compared on rows of preferences: against transformers itself, on rows past the context, by a judge over HTTP, and
with models that other runs made."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from served import Asked, serving
from temper.app import run_recipe
from temper.errors import DataError, ModelError, RecipeError, TemperError
from temper.models import load
from temper.runfolder import read_json, write_json
from temper.stages.pretrain import Shape, train_tokenizer
from temper.stages.scoring import check_preferences
from temper.stages.seen import TRAINED_ON, fingerprint
from temper.types import Record
from tiny_models import build, sharpen

CONTEXT = 64
COLOURS = ["red", "green", "blue", "white", "black"]
ROWS = [
    {"q": f"Which colour has number {n}?", "good": f"It is {COLOURS[n % 5]}.", "bad": f"Nobody can say {'so ' * (n % 3)}{n}."}
    for n in range(12)
]  # fmt: skip
LONG = {"q": "Which colours are there?", "good": f"There are {', '.join(COLOURS * 6)}.", "bad": "None."}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models of one tokenizer: two Llamas (rotary), a GPT-2 (a table of positions); all of 64 places."""
    folder = tmp_path_factory.mktemp("models")
    texts = [" ".join(map(str, row.values())) for row in [*ROWS, LONG]]
    tokenizer = train_tokenizer(texts * 3, Shape(vocabulary=330))
    ends = {
        "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    llama = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        **ends,
    )
    gpt2 = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ends
    )
    for seed, (name, kind, config) in enumerate(
        [("one", LlamaForCausalLM, llama), ("two", LlamaForCausalLM, llama), ("tabled", GPT2LMHeadModel, gpt2)]
    ):
        torch.manual_seed(seed)
        model: Any = kind(config)
        sharpen(model, seed)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def run(folder: Path, rows: list[dict[str, str]], model: Path | str, **stage: Any) -> Path:
    """A run that evaluates on rows of preferences; the folder of its evaluation."""
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pairs = {
        "stage": "data", "source": "pairs.jsonl", "prompt": "{q}", "chosen": "{good}", "rejected": "{bad}", "validation": 0,
        "test": len(rows) - 1, "near_leaks": False, "drop": {"duplicates": "off"}, "format": {"chat": "plain"},
    }  # fmt: skip
    look = {"stage": "evaluate", "data": "pairs", "resamples": 200, "decoding": {"max_new_tokens": 4}, **stage}
    recipe = {"name": "r", "model": str(model), "threads": 1, "stages": {"pairs": pairs, "look": look}}
    (folder / "r.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    run_recipe(str(folder / "r.yaml"), out=folder / "run", quiet=True)
    return folder / "run" / "look"


def rows_asked(look: Path) -> list[dict[str, Any]]:
    return pq.read_table(look.parent / "pairs" / "data" / "test.parquet").to_pylist()


def by_transformers(model: Path, prompt: str, answer: str) -> tuple[float, int]:
    """Log-probability of an answer with its end token by transformers' own forward pass in float64, and its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    before, whole = (
        tokenizer(f"{prompt}\n").input_ids,
        [*tokenizer(f"{prompt}\n{answer}").input_ids, tokenizer.eos_token_id],
    )
    while whole[0] == whole[1] == tokenizer.bos_token_id:
        before, whole = before[1:], whole[1:]
    assert whole[: len(before)] == before
    with torch.no_grad():
        logps = hf(torch.tensor([whole])).logits[0].log_softmax(-1)
    scored = range(len(before), len(whole))
    return sum(logps[k - 1, whole[k]].item() for k in scored), len(scored)


def test_preferences_are_those_of_transformers(models: Path, tmp_path: Path) -> None:
    """Summed and against a reference; loss is the chosen answer's."""
    names = [str(models / "one"), str(models / "two")]
    asked = ["preference_accuracy", "margin", "loss", "perplexity"]
    look = run(tmp_path, ROWS, models / "one", models=names, metrics=asked, reference="base")
    found, kept = read_json(look / "evaluation.json"), pq.read_table(look / "rows.parquet")
    own = {}
    for name in ("one", "two"):
        own[name] = [
            [by_transformers(models / name, row["prompt"], row[side]) for side in ("chosen", "rejected")]
            for row in rows_asked(look)
        ]
    for name, scored in own.items():
        margins = np.array([chosen - rejected for (chosen, _), (rejected, _) in scored])
        start = np.array([chosen - rejected for (chosen, _), (rejected, _) in own["one"]])
        assert kept[f"{name}|margin"].to_numpy() == pytest.approx(margins, abs=2e-4)
        assert kept[f"{name}|implicit_margin"].to_numpy() == pytest.approx(margins - start, abs=4e-4)
        values = {metric: entry["value"] for metric, entry in found["models"][name].items()}
        assert values["preference_accuracy"] == pytest.approx((margins > 0).mean())
        assert values["implicit_accuracy"] == pytest.approx(0.5 if name == "one" else (margins > start).mean())
        nats, tokens = np.array([chosen for chosen, _ in scored]).sum(0)
        assert values["loss"] == pytest.approx(-nats / tokens, abs=1e-5)
        assert values["perplexity"] == pytest.approx(np.exp(-nats / tokens), rel=1e-5)
    compared = {(c["metric"], c["a"], c["b"]): c for c in found["comparisons"]}
    assert compared["margin", "one", "two"]["p"] is not None
    assert {"preference_accuracy", "margin", "loss", "perplexity"} <= {metric for metric, *_ in compared}
    signs = np.sign(
        [kept[f"{name}|{metric}"].to_numpy() for name, metric in (("one", "margin"), ("two", "implicit_margin"))]
    )
    assert len(set(signs.ravel())) == 2, "a test that has both cases"


def test_a_mean_over_tokens_is_asked_for_by_name(models: Path, tmp_path: Path) -> None:
    asked = [{"margin": {"by": "mean"}}]
    look = run(tmp_path, ROWS[:4], models / "one", models=["base"], metrics=asked)
    by_hand = []
    for row in rows_asked(look):
        (chosen, n), (rejected, m) = (
            by_transformers(models / "one", row["prompt"], row[s]) for s in ("chosen", "rejected")
        )
        by_hand.append(chosen / n - rejected / m)
    assert pq.read_table(look / "rows.parquet")["base|margin"].to_numpy() == pytest.approx(np.array(by_hand), abs=1e-4)
    entry = read_json(look / "evaluation.json")["models"]["base"]["margin"]
    assert entry["signature"] == "margin|nats/token" and entry["value"] == pytest.approx(np.mean(by_hand), abs=1e-4)


def test_a_row_past_the_context_is_scored_in_full_where_positions_go_on(models: Path, tmp_path: Path) -> None:
    rows = [*long_rows(3), *ROWS[:4]]
    look = run(tmp_path, rows, models / "one", models=["base"], metrics=["loss", "margin"])
    kept = pq.read_table(look / "rows.parquet").to_pylist()
    long = [(k, row) for k, row in enumerate(rows_asked(look)) if row["prompt"].startswith("Again")]
    assert long
    for k, row in long:
        nats, tokens = by_transformers(models / "one", row["prompt"], row["chosen"])
        assert tokens > CONTEXT
        assert kept[k]["base|loss"] == pytest.approx(-nats / tokens, abs=1e-4) and kept[k]["base|tokens"] == tokens
    assert any("longer than the context of base (64" in w for w in read_json(look / "stage.json")["warnings"])


def test_a_row_past_a_table_of_positions_is_left_out_for_all(models: Path, tmp_path: Path) -> None:
    names = ["base", str(models / "tabled")]
    look = run(
        tmp_path, [*long_rows(3), *ROWS[:5]], models / "one", models=names, metrics=["loss", "preference_accuracy"]
    )
    prompts = [row["prompt"] for row in rows_asked(look)]
    long = sum(p.startswith("Again") for p in prompts)
    kept, found = pq.read_table(look / "rows.parquet").to_pylist(), read_json(look / "evaluation.json")
    assert 0 < long < len(prompts)
    for name in ("base", "tabled"):
        assert {m: e["n"] for m, e in found["models"][name].items()} == dict.fromkeys(
            ("loss", "preference_accuracy"), len(prompts) - long
        )
        for prompt, row in zip(prompts, kept, strict=True):
            assert (
                prompt.startswith("Again")
                == np.isnan(row[f"{name}|loss"])
                == np.isnan(row[f"{name}|preference_accuracy"])
            )
    info = read_json(look / "stage.json")
    assert info["facts"]["rows too long to score"] == long
    assert any(f"{long} of {len(prompts)} rows are longer" in w and "nothing is cut" in w for w in info["warnings"])


def long_rows(n: int) -> list[dict[str, str]]:
    return [{**LONG, "q": f"Again {k}: {LONG['q']}", "good": f"{k}: {LONG['good']}"} for k in range(n)]


def made(folder: Path, name: str) -> str:
    (folder / name).mkdir(exist_ok=True)
    return name


@pytest.mark.parametrize(
    ("family", "end"), [("llama", None), ("qwen2", None), ("gemma3", None), ("gpt2", 128), ("opt", 128), ("gpt_neo", 128), ("bloom", None)]
)  # fmt: skip
def test_how_far_positions_reach(family: str, end: int | None) -> None:
    """What is said to have no end is asked one place further, and what has one cannot be."""
    model = build(family)
    assert load.reach(model) == end
    ids = torch.ones(1, 140, dtype=torch.long)
    if end is None:
        assert model(ids).logits.isfinite().all()
    else:
        with pytest.raises((IndexError, RuntimeError)):
            model(ids)


# Wins

REQUEST, FIRST, SECOND = (re.compile(rf"<{tag}>\n(.*?)\n</{tag}>", re.S) for tag in ("request", "first", "second"))


def longer_wins(asked: Asked) -> str:
    """A judge that is consistent: the longer answer, then the one later in the alphabet."""
    first, second = (found[1] for tag in (FIRST, SECOND) if (found := tag.search(asked.prompt)))
    return "FIRST" if (len(first), first) > (len(second), second) else "SECOND"


def duelled(folder: Path, models: Path, judge: str, **more: Any) -> dict[str, Any]:
    win_rate = {"win_rate": {"against": "base", "judge": judge}}
    names = ["base", str(models / "two")]
    look = run(folder, ROWS, models / "one", models=names, metrics=[win_rate], **more)
    rows = pq.read_table(look / "rows.parquet").to_pylist()
    return {**read_json(look / "evaluation.json"), "rows": rows, "info": read_json(look / "stage.json")}


def test_a_judge_over_http_sees_both_orders(models: Path, tmp_path: Path) -> None:
    with serving(longer_wins) as judge:
        found = duelled(tmp_path, models, f"{judge.url}#judge")
        differing = [r for r in found["rows"] if r["base|prediction"] != r["two|prediction"]]
        assert len(judge.requests) == 2 * len(differing) > 0
        assert all(asked.body["temperature"] == 0 for asked in judge.requests)
        assert {REQUEST.search(a.prompt)[1] for a in judge.requests} == {r["prompt"].strip() for r in differing}
    expected = []
    for row in found["rows"]:
        ours, theirs = row["two|prediction"].strip(), row["base|prediction"].strip()
        expected.append(0.5 if ours == theirs else float((len(ours), ours) > (len(theirs), theirs)))
    assert [row["two|win_rate"] for row in found["rows"]] == expected
    assert [row["base|win_rate"] for row in found["rows"]] == [0.5] * len(expected)
    entry = found["models"]["two"]["win_rate"]
    assert entry["value"] == pytest.approx(np.mean(expected)) and entry["signature"].startswith(
        "win_rate|against:base|by:http"
    )
    [comparison] = found["comparisons"]
    assert comparison["difference"] == pytest.approx(np.mean(expected) - 0.5) and comparison["p"] is not None


def test_a_judge_that_hears_only_the_order_gives_ties(models: Path, tmp_path: Path) -> None:
    with serving(lambda asked: "<think>SECOND is nice, FIRST too</think>\nFIRST") as judge:
        found = duelled(tmp_path, models, f"{judge.url}#judge")
    assert found["models"]["two"]["win_rate"]["value"] == 0.5
    assert "decided by the order alone" in found["info"]["facts"]["two against base"]


def test_replies_that_cannot_be_read_are_counted_and_left_out(models: Path, tmp_path: Path) -> None:
    def sometimes(asked: Asked) -> str:
        return "I would rather not say." if "number 3" in asked.prompt else "EQUAL"

    with serving(sometimes) as judge:
        found = duelled(tmp_path, models, f"{judge.url}#judge")
    lost = [r for r in found["rows"] if "number 3" in r["prompt"] and r["base|prediction"] != r["two|prediction"]]
    assert sum(np.isnan(r["two|win_rate"]) for r in found["rows"]) == len(lost)
    if lost:
        assert found["models"]["two"]["win_rate"]["n"] == len(found["rows"]) - len(lost)
        assert any("could not be read" in w and "rather not say" in w for w in found["info"]["warnings"])
    with serving(lambda asked: "Both are lovely.") as judge, pytest.raises(ModelError, match="no verdict of the judge"):
        duelled(tmp_path / made(tmp_path, "none"), models, f"{judge.url}#judge")


def test_a_reward_model_judges_too(models: Path, tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    config = LlamaConfig.from_pretrained(models / "one", num_labels=1)
    torch.manual_seed(7)
    judge = LlamaForSequenceClassification(config)
    sharpen(judge, 7)
    judge.save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(models / "one").save_pretrained(tmp_path / "judge")
    win_rate = {"win_rate": {"against": "base"}}
    asked = {"metrics": ["reward", win_rate], "reward_model": str(tmp_path / "judge")}
    look = run(tmp_path, ROWS, models / "one", models=["base", str(models / "two")], **asked)
    rows = pq.read_table(look / "rows.parquet").to_pylist()
    assert [r["two|win_rate"] for r in rows] == [
        (np.sign(r["two|reward_mean"] - r["base|reward_mean"]) + 1) / 2 for r in rows
    ]
    assert len({r["two|win_rate"] for r in rows}) > 1


# Models of other runs


@pytest.fixture
def other_run(models: Path, tmp_path: Path) -> Path:
    """A run with a stage that made a model, and one that made none."""
    stage = tmp_path / "earlier" / "sft"
    shutil.copytree(models / "two", stage / "model")
    write_json(stage / "stage.json", {"name": "sft", "key": "k", "facts": {"written_as": "a form of its own"}})
    write_json(tmp_path / "earlier" / "qa" / "stage.json", {"name": "qa", "key": "q", "facts": {}}) if made(
        tmp_path / "earlier", "qa"
    ) else None
    write_json(tmp_path / "earlier" / "manifest.json", {"stages": []})
    return tmp_path / "earlier"


def test_a_stage_of_another_run_is_a_model_with_a_readable_name(models: Path, other_run: Path, tmp_path: Path) -> None:
    seen = fingerprint(Record({"prompt": ROWS[0]["q"]}, ""))
    np.save(other_run / "sft" / TRAINED_ON, np.array([seen], np.uint64))
    names = ["base", str(other_run / "sft"), str(models / "two")]
    asked = {
        "models": names,
        "metrics": ["margin"],
        "expect": [{"model": names[1], "metric": "margin", "at_least": -1e6}],
    }
    look = run(tmp_path, [*ROWS, ROWS[0]], models / "one", **asked)
    found = read_json(look / "evaluation.json")["models"]
    assert list(found) == ["base", "earlier/sft", "two"]
    assert (
        found["earlier/sft"]["margin"]["value"] == found["two"]["margin"]["value"] != found["base"]["margin"]["value"]
    )
    told = " ".join(read_json(look / "stage.json")["warnings"])
    assert "stand in the training data of" in told and "a form of its own" in told


def test_what_is_no_model_in_another_run_is_told(models: Path, other_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="whole run") as caught:
        run(tmp_path, ROWS, models / "one", models=[str(other_run)], metrics=["margin"])
    assert "earlier/sft" in str(caught.value.do)
    with pytest.raises(ModelError, match="made no model"):
        run(tmp_path, ROWS, models / "one", models=[str(other_run / "qa")], metrics=["margin"])


# What cannot be meant


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"metrics": [{"win_rate": {"against": "sft", "judge": "http://localhost/v1#m"}}]}, "not among the models"),
        ({"metrics": [{"win_rate": {"against": "base", "judge": "gpt2"}}]}, "neither reward_model nor an endpoint"),
        (
            {"metrics": [{"win_rate": {"against": "base", "judge": "gpt2"}}], "reward_model": "rm"},
            "neither reward_model nor",
        ),
        ({"metrics": [{"win_rate": {"against": "base"}}]}, "asks a reward model, and none is named"),
        ({"metrics": ["win_rate"]}, "needs «against»"),
        ({"metrics": ["loss"], "reference": "base"}, "neither preference_accuracy nor margin"),
        ({"metrics": [{"margin": {"by": "max"}}]}, "does not fit"),
        ({"metrics": ["margin"], "models": ["http://localhost/v1#m"]}, "gives only text"),
    ],
)
def test_bad_input_is_told_before_anything_runs(stage: dict[str, Any], said: str, models: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        run(tmp_path, ROWS, models / "one", **({"models": ["base"]} | stage))
    assert said in f"{caught.value} {caught.value.do}"
    assert not (tmp_path / "run" / "look").exists()


@pytest.mark.parametrize(("base", "reference"), [("tabled", "one"), ("one", "tabled")])
def test_a_row_that_model_or_reference_cannot_score_is_no_other_tokenizer(
    base: str, reference: str, models: Path, tmp_path: Path
) -> None:
    rows = [*ROWS, LONG, {**LONG, "q": "Which ones?"}]
    look = run(tmp_path, rows, models / base, models=["base"], metrics=["margin"], reference=str(models / reference))
    short = [r for r in rows_asked(look) if r["rejected"] != LONG["bad"]]
    assert len(short) < len(rows) - 1

    def margin(model: str, r: dict[str, Any]) -> float:
        chosen, rejected = (by_transformers(models / model, r["prompt"], r[side])[0] for side in ("chosen", "rejected"))
        return chosen - rejected

    want = np.mean([margin(base, r) - margin(reference, r) for r in short])
    found = read_json(look / "evaluation.json")["models"]["base"]["implicit_margin"]
    assert found["n"] == len(short) and found["value"] == pytest.approx(want, abs=1e-4)


def test_rows_without_two_answers_and_another_tokenizer(models: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(models / "two", other)
    train_tokenizer(["what is there"] * 9, Shape(vocabulary=300)).save_pretrained(other)
    with pytest.raises(TemperError, match="different tokenizers"):
        run(tmp_path, ROWS, models / "one", models=["base"], metrics=["margin"], reference=str(other))
    with pytest.raises(DataError, match="compare chosen and rejected"):
        check_preferences([Record({"prompt": "1?", "completion": "one"}, "f:1")])


def test_a_question_is_known_again_in_whatever_form_it_was_trained_on() -> None:
    ask, answer, other = (
        {"role": r, "content": c} for r, c in (("user", "a  b"), ("assistant", "c"), ("assistant", "d"))
    )
    forms: list[dict[str, Any]] = [
        {"prompt": "a b"},
        {"prompt": "a b", "completion": "anything"},
        {"prompt": [ask], "completion": [answer]},
        {"messages": [ask, answer]},
        {"messages": [ask]},
        {"prompt": "a b", "chosen": "c", "rejected": "d"},
        {"prompt": "a b", "chosen": [answer], "rejected": [other]},
        {"chosen": [ask, answer], "rejected": [ask, other]},  # what both begin with is the prompt
    ]
    assert len({fingerprint(Record(row, "")) for row in forms}) == 1
    strange: list[dict[str, Any]] = [
        {"prompt": "a c"},
        {"text": "a b"},
        {"chosen": "a b", "rejected": "a c"},
        {"messages": [ask, answer, ask, other]},
        {"chosen": [ask, answer, ask, answer], "rejected": [ask, answer, ask, other]},
    ]
    assert len({fingerprint(Record(row, "")) for row in [*forms, *strange]}) == 1 + 3, (
        "what asks or says the same is one"
    )
