"""The mini profiles with the claims they make: `make check`. Minutes, two cores, nothing else running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.claims

MINUTES = {"detox-summarization": 5, "review-sentiment": 6, "preference": 5, "instruct-t5": 6, "dialogue-style": 5}


def temper(*words: str, cwd: Path) -> tuple[str, float]:
    """Run the command as a user would; its output and the seconds it took."""
    began = time.perf_counter()
    done = subprocess.run(
        [str(Path(sys.executable).parent / "temper"), *words],
        cwd=cwd,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout, time.perf_counter() - began


def weights(run: Path) -> dict[str, str]:
    return {
        f"{stage.parent.name}/{name}": entry["sha256"]
        for stage in sorted(run.glob("*/stage.json"))
        for name, entry in json.loads(stage.read_text())["files"].items()
        if name.endswith(".safetensors")
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("claims")


def run_twice(name: str, folder: Path) -> dict[str, Any]:
    """A mini profile into one folder, again (cached), and into a second one (the same bits); its results.

    Speed is told, not asserted: machines are noisy. The target is in MINUTES.
    """
    _, first = temper("run", name, "--profile", "mini", "--out", f"{name}-a", cwd=folder)
    _, again = temper("run", name, "--profile", "mini", "--out", f"{name}-a", cwd=folder)
    results: dict[str, Any] = json.loads((folder / f"{name}-a/report/results.json").read_text())
    print(f"\n{name}: {first / 60:.1f} of {MINUTES[name]} minutes, cached {again:.1f} of 10 s")
    assert all(stage["cached"] for stage in results["stages"].values())
    temper("run", name, "--profile", "mini", "--out", f"{name}-b", cwd=folder)
    assert weights(folder / f"{name}-a") == weights(folder / f"{name}-b")
    return results


def comparisons(results: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(c["metric"], c["a"], c["b"]): c for c in results["evaluations"]["compare"]["comparisons"]}


def test_detox_summarization(folder: Path) -> None:
    """sft above base on rougeL and grpo below sft on toxicity, both shown; cached the second time; the same bits again."""
    results = run_twice("detox-summarization", folder)
    found = comparisons(results)
    rouge, toxicity = found["rougeL", "base", "sft"], found["toxicity_mean", "sft", "grpo"]
    print(f"sft − base rougeL {rouge}\ngrpo − sft toxicity {toxicity}")
    assert rouge["low"] > 0 and rouge["p_adjusted"] < 0.05
    assert toxicity["high"] < 0 and toxicity["p_adjusted"] < 0.05
    scores = {name: found["rougeL"]["value"] for name, found in results["evaluations"]["compare"]["models"].items()}
    print(f"rougeL {scores}")
    assert scores["grpo"] >= 0.9 * scores["sft"], "what it unlearns costs at most a tenth of the summaries"


def test_review_sentiment(folder: Path) -> None:
    """Each policy above sft on the reward; the reward model right on held-out pairs; a front that rises."""
    results = run_twice("review-sentiment", folder)
    found = comparisons(results)
    for name in ("reinforce", "rloo", "warp"):
        gain = found["reward_mean", "sft", name]
        print(f"{name} − sft reward_mean {gain}")
        assert gain["low"] > 0 and gain["p_adjusted"] < 0.05
    run = folder / "review-sentiment-a"
    right = json.loads((run / "reward/reward.json").read_text())["splits"]["test"]["accuracy"]
    points = json.loads((run / "warp/front.json").read_text())["points"]
    print(f"reward model {right}\nfront {[(p['label'], p['x']['value'], p['y']['value']) for p in points]}")
    assert right["low"] > 0.8
    assert points[-1]["y"]["low"] > points[0]["y"]["high"] and points[-1]["x"]["low"] > 0


def test_preference(folder: Path) -> None:
    """Each rung above the one before on its own measure: loss for lora, then for sft, accuracy of preferences for dpo."""
    results = run_twice("preference", folder)
    found = comparisons(results)
    rungs = {
        "lora": found["loss", "base", "lora"],
        "sft": found["loss", "lora", "sft"],
        "dpo": found["preference_accuracy", "sft", "dpo"],
        "margin": found["margin", "sft", "dpo"],
    }
    for name, rung in rungs.items():
        print(f"{name}: {rung}")
        assert rung["p_adjusted"] < 0.05
    assert rungs["lora"]["high"] < 0 > rungs["sft"]["high"]
    assert rungs["dpo"]["low"] > 0 < rungs["margin"]["low"]
    compared = results["evaluations"]["compare"]
    assert list(compared["models"]) == ["base", "lora", "sft", "dpo"]
    assert {scores["loss"]["n"] for scores in compared["models"].values()} == {compared["data"]["rows"]}, (
        "rows left out"
    )
    for name, scores in compared["models"].items():
        print(name, {metric: scores[metric]["value"] for metric in ("loss", "preference_accuracy", "margin", "rougeL")})


def test_instruct_t5(folder: Path) -> None:
    """LoRA with virtual tokens above the base on rougeL, and no worse than LoRA alone and virtual tokens alone."""
    results = run_twice("instruct-t5", folder)
    models = results["evaluations"]["compare"]["models"]
    assert list(models) == ["base", "prompt", "lora", "lora_prompt"]
    for name, scores in models.items():
        print(name, {m: scores[m]["value"] for m in ("rougeL", "exact_match", "token_f1", "bleu", "meteor")})
    found = comparisons(results)
    gain, beside = found["rougeL", "base", "lora_prompt"], found["rougeL", "lora", "lora_prompt"]
    print(f"lora_prompt − base {gain}\nlora_prompt − lora {beside}")
    assert gain["low"] > 0 and gain["p_adjusted"] < 0.05
    assert beside["low"] > -0.01 and models["lora_prompt"]["rougeL"]["low"] > models["prompt"]["rougeL"]["high"]


def test_dialogue_style(folder: Path) -> None:
    """Both ways above what they began as, on token F1 and chrF; the table of what each gives and costs is filled."""
    results = run_twice("dialogue-style", folder)
    found = comparisons(results)
    for before, after in (("large", "qlora"), ("small", "full")):
        for metric in ("token_f1", "chrf", "style"):
            gain = found[metric, before, after]
            print(f"{after} − {before} {metric} {gain}")
            assert gain["low"] > 0 and gain["p_adjusted"] < 0.05
    text = (folder / "dialogue-style-a/report/report.md").read_text()
    table = text.split("### What each way gives and costs")[1].split("<sub>")[0]
    print(table)
    assert "–" not in table and "| began as | large | small |" in table
