"""Every shipped recipe runs whole in its smoke profile; what each is about is looked at here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import temper
import temper.stages
from temper import recipe


@pytest.mark.parametrize("name", recipe.shipped())
def test_every_profile_has_the_stages_that_others_read(name: str) -> None:
    profiles = [None, *recipe.read(recipe.shipped()[name])["profiles"]]
    stages = [list(recipe.load(name, profile=p).stages) for p in profiles]
    assert {"mini", "smoke"} <= set(profiles)
    assert stages[profiles.index("mini")] == stages[profiles.index("smoke")]
    assert set(stages[0]) <= set(stages[profiles.index("mini")]), "a profile leaves out what the recipe is about"


def test_preference(tmp_path: Path) -> None:
    """The ladder stands on one set of rows, and each rung was trained as its story says."""
    run = temper.run("preference", {"threads": 1}, profile="smoke", out=tmp_path / "run", quiet=True)
    results = json.loads((run / "report/results.json").read_text())
    compared = results["evaluations"]["compare"]
    assert list(compared["models"]) == ["base", "lora", "sft", "dpo"]
    for scores in compared["models"].values():
        assert {"loss", "perplexity", "preference_accuracy", "margin", "implicit_margin"} <= set(scores)
    assert compared["models"]["sft"]["implicit_margin"]["value"] == 0, "it is the reference itself"
    assert compared["models"]["dpo"]["implicit_margin"]["value"] != 0
    assert {("base", "lora"), ("lora", "sft"), ("sft", "dpo")} <= {(c["a"], c["b"]) for c in compared["comparisons"]}
    first = json.loads((run / "dpo/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    shown = (run / "pipeline.log").read_text()
    lora, sft = (shown.split(f"── {name} (sft)")[1].split("── ")[0] for name in ("lora", "sft"))
    assert re.search(r"⟦[^⟧]* asks how to [^⟧]*Advice:", lora), "raw text is trained whole"
    assert re.search(r"asks how to [^⟦]*Advice:⟦", sft), "the prompt is masked"


@pytest.fixture(scope="session")
def reviews(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A finished run folder of review-sentiment's smoke profile, one thread."""
    return once(
        "smoke-reviews",
        lambda out: temper.run("review-sentiment", {"threads": 1}, profile="smoke", out=out, quiet=True) and None,
    )


def test_review_sentiment(reviews: Path) -> None:
    results = json.loads((reviews / "report/results.json").read_text())
    compared = results["evaluations"]["compare"]["models"]
    assert list(compared) == ["sft", "reinforce", "rloo", "warp"]
    for scores in compared.values():
        assert {"reward_mean", "second_reward_mean", "kl", "distinct_2", "self_bleu", "loop_share"} <= set(scores)
    assert compared["sft"]["kl"]["value"] == 0 < compared["rloo"]["kl"]["value"]
    points = json.loads((reviews / "warp/front.json").read_text())["points"]
    assert [p["setting"]["liti"] for p in points] == [0, 0.5, 1]
    assert points[0]["x"]["value"] == 0 < points[1]["x"]["value"] < points[2]["x"]["value"]
    measured = json.loads((reviews / "reward/reward.json").read_text())["splits"]["test"]["accuracy"]
    assert measured["low"] <= measured["value"] <= measured["high"]
    page = (reviews / "report/index.html").read_text()
    assert "η = 0.5" in page and "second_reward_mean" in page


def test_instruct_t5(tmp_path: Path) -> None:
    """Three adapters on one T5, a sweep over their sizes, and ways to decode compared as models are."""
    run = temper.run("instruct-t5", {"threads": 1}, profile="smoke", out=tmp_path / "run", quiet=True)
    results = json.loads((run / "report/results.json").read_text())
    compared = results["evaluations"]["compare"]
    assert list(compared["models"]) == ["base", "prompt", "lora", "lora_prompt"]
    for scores in compared["models"].values():
        assert {"rouge1", "rougeL", "bleu", "meteor", "token_f1"} <= set(scores)
    trained = {n: results["stages"][n]["trainable_parameters"] for n in ("lora", "prompt", "lora_prompt")}
    # q and v of 2 encoder layers and of 2 × 2 attentions of the decoder, 32 × 32 each, rank 8; 20 tokens of width 32 twice
    # (PEFT keeps as many for a decoder, which are not used)
    assert trained["lora"] == 2 * 6 * 8 * (32 + 32)
    assert trained["lora_prompt"] == trained["lora"] + trained["prompt"]
    sweep = json.loads((run / "sizes/trials.json").read_text())
    assert len(sweep["trials"]) == 2
    assert len(results["evaluations"]["ways"]["models"]) == 3
    page = (run / "report/index.html").read_text()
    assert all(way in page for way in ("greedy", "beams", "drawn"))


def test_the_real_profile_of_instruct_t5_has_the_numbers_of_the_work_it_retells() -> None:
    stage = recipe.load("instruct-t5").stages["lora_prompt"]
    assert (stage.adapter.r, stage.adapter.tokens, stage.adapter.targets) == (8, 20, ["q", "v"])
    assert (stage.max_prompt, stage.max_answer, stage.too_long) == (100, 200, "cut")
    assert (stage.batch_size, stage.accumulation, stage.epochs, stage.lr, stage.weight_decay) == (8, 4, 10, 3e-4, 0.01)
    assert stage.precision == "fp16" and stage.activation_checkpointing and stage.keep_best
    assert recipe.load("instruct-t5", profile="full").stages["instructions"].completion == "{full_output}"


def test_dialogue_style(tmp_path: Path) -> None:
    """Two ways on the same dialogues: the table says what each gives and costs, the adapter folds into its rounded base."""
    run = temper.run("dialogue-style", {"threads": 1}, profile="smoke", out=tmp_path / "run", quiet=True)
    results = json.loads((run / "report/results.json").read_text())
    compared = results["evaluations"]["compare"]["models"]
    assert list(compared) == ["large", "qlora", "small", "full"]
    for scores in compared.values():
        assert {"bleu", "meteor", "token_f1", "chrf", "length", "style"} <= set(scores)
    text = (run / "report/report.md").read_text()
    table = text.split("### What each way gives and costs")[1].split("<sub>")[0]
    rows = {
        c[0]: c[1:] for line in table.splitlines() if len(c := [x.strip() for x in line.strip("|").split("|")]) == 3
    }
    assert rows["began as"] == ["large", "small"]
    for metric, scores in {m: [compared[n][m]["value"] for n in compared] for m in ("token_f1", "chrf")}.items():
        shown = next(v for k, v in rows.items() if k.replace("\\", "").startswith(metric))
        for cell, before, after in zip(shown, scores[::2], scores[1::2], strict=True):
            left, right = cell.split(" (")[0].replace("−", "-").split(" → ")
            assert abs(float(left) - before) < 0.06 and abs(float(right) - after) < 0.06
    assert rows["examples"] == ["40", "20"] and [c.split()[0] for c in rows["base held in"]] == ["nf4", "float32"]
    assert all(re.match(r"[\d.]+ [kMG]?B", c) for name in ("peak memory", "size on disk") for c in rows[name])
    trained = [results["stages"][n]["trainable_parameters"] for n in ("qlora", "full")]
    assert [int(c.split(" ")[0].replace(",", "")) for c in rows["trainable parameters"]] == trained
    page = (run / "report/index.html").read_text()
    assert "What each way gives and costs" in page
    assert "float32 over nf4 weights" in (run / "pipeline.log").read_text()
    fact = json.loads((run / "merged/stage.json").read_text())["facts"]["merge"]
    assert "log-probabilities equal the adapter's" in fact
    held = json.loads((run / "qlora/stage.json").read_text())["facts"]
    assert held["base held in"] == "nf4" and held["written_as"] == "<user> question <assistant> answer and end token"
    assert (
        json.loads((run / "full/stage.json").read_text())["facts"]["special tokens added"]
        == "<system>, <user>, <assistant>"
    )
    rows_out = [json.loads(line) for line in (run / "full/samples.jsonl").read_text().splitlines()]
    assert all(r["prompt"].startswith("<bos><user>") and r["prompt"].endswith("<assistant>") for r in rows_out)
