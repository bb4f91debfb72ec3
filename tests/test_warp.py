"""WARP: what it writes, that its parts are the paper's, that a kill anywhere changes nothing, and what is refused."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import temper.stages  # noqa: F401  fills the registry
from staged_runs import Workshop, copy_stages, lines_of, weights
from temper import merging
from temper import recipe as recipes
from temper.errors import RecipeError
from temper.models.folders import Tensors
from temper.runfolder import progress, read_json
from temper.stages.front import front, reopened
from test_resume import same

WARP: dict[str, Any] = {
    "stage": "warp", "model": "base", "data": "news", "adapter": {"method": "lora", "r": 4},
    "reward": [{"rouge": {"variant": "rougeL"}, "weight": 0.5}, {"length": {"target": 6}, "weight": 0.5}],
    "classifier": None, "completions": 2, "batch_size": 2, "lr": 1e-2, "decoding": {"max_new_tokens": 6, "temperature": 0.9},
    "rollout_steps": 1, "iterations": 1, "max_steps": 3, "precision": "float32", "kl": None, "checkpoint_every": 1,
    "rounds": 2, "policies": 2, "front": [0, 0.5, 1], "front_prompts": 6,
}  # fmt: skip


def how(**fields: Any) -> dict[str, Any]:
    return {"overrides": {"stages": {"grpo": {**WARP, **fields}}}, "only": ["grpo"]}


def started(smoke_run: Path, folder: Path) -> Path:
    return copy_stages(smoke_run, folder, "corpus", "tiny", "news")


@pytest.fixture(scope="module")
def finished(forks: Workshop, smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run that nobody kills."""
    folder = started(smoke_run, tmp_path_factory.mktemp("warp") / "run")
    ended = forks.run(folder, **how())
    assert ended["status"] == 0, ended["traceback"]
    return folder


@pytest.fixture(scope="module")
def halfway(forks: Workshop, smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, killed and started again, at last at step 3 of the first policy of round 2. All its parts are there."""
    folder = started(smoke_run, tmp_path_factory.mktemp("warp") / "halfway")
    for moment in (
        "after grpo.partial/policies/1.1/checkpoints/step-2",
        "before grpo.partial/policies/1.2/weights.json",
        "before grpo.partial/starts/1.json",
        "step 3 in grpo.partial/policies/2.1/metrics.jsonl",
    ):
        assert forks.run(folder, die_at=moment, **how())["status"] == -signal.SIGKILL, moment
    return folder


def test_what_it_writes(finished: Path) -> None:
    stage = finished / "grpo"
    lines = lines_of(stage / "metrics.jsonl")
    for policy, first in (("1.1", 1), ("1.2", 1), ("2.1", 4), ("2.2", 4)):
        steps = [x["step"] for x in lines if x["policy"] == policy and "loss" in x]
        assert steps == [first, first + 1, first + 2]
    assert {x["policy"] for x in lines_of(stage / "samples.jsonl")} == {"1.1", "1.2", "2.1", "2.2"}
    info = read_json(stage / "stage.json")
    assert info["steps"] == 12 and info["trained_tokens"] > 0 and info["inputs"].keys() == {"tiny", "news"}
    assert "mean cosine" in info["facts"]["round 2"] and "moving average" in info["summary"]
    assert {p.name for p in stage.iterdir() if p.is_dir()} == {"model", "merged"}
    assert not any("checkpoints" in name or "policies" in name for name in info["files"])


def test_the_ends_of_the_front_are_the_start_and_the_last_merge(finished: Path) -> None:
    found = read_json(finished / "grpo" / "front.json")
    assert [p["label"] for p in found["points"]] == ["η = 0", "η = 0.5", "η = 1"]
    assert [p["setting"] for p in found["points"]] == [{"liti": 0.0}, {"liti": 0.5}, {"liti": 1.0}]
    kl = [p["x"] for p in found["points"]]
    assert kl[0]["value"] == kl[0]["high"] == 0 < kl[1]["low"] <= kl[1]["value"] < kl[2]["value"]
    for point in found["points"]:
        assert point["y"]["low"] <= point["y"]["value"] <= point["y"]["high"] and point["y"]["n"] == 6


def test_a_script_can_measure_the_same_points(finished: Path, tmp_path: Path) -> None:
    """And others: of any models, here of the stage's own model beside the last merge."""
    stage = finished / "grpo"
    loaded = recipes.load("detox-summarization", profile="smoke", overrides={"threads": 1, "stages": {"grpo": WARP}})
    job = reopened(loaded, finished, "grpo", tmp_path / "measured")
    warp: Any = loaded.stages["grpo"]
    start = finished / "tiny" / "model"
    found = front(job, warp, start, stage / "merged", [1.0], prompts=6)
    assert found["points"] == read_json(stage / "front.json")["points"][-1:]
    other = reopened(loaded, finished, "grpo", tmp_path / "other")
    [model] = front(other, warp, start, stage / "model", [1.0], prompts=3, completions=2)["points"]
    assert 0 < model["x"]["value"] < found["points"][0]["x"]["value"] and model["x"]["n"] == 3


def test_policies_differ_and_their_products_are_merged(halfway: Path, finished: Path) -> None:
    """Round 1 by hand from the adapters: B·A of each, WARP's formula, LITI."""
    part = halfway / "grpo.partial"
    start, after = Tensors(part / "starts" / "0"), Tensors(part / "starts" / "1")
    policies = [Tensors(part / "policies" / name / "weights") for name in ("1.1", "1.2")]
    moved = 0
    for name in start.shapes:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in policies[0].shapes:
            assert torch.equal(start[name], after[name]), name
            continue
        scale = 8 / 4  # alpha / r
        a, b = (scale * p[f"{module}.lora_B.weight"] @ p[f"{module}.lora_A.weight"] for p in policies)
        assert (a - b).abs().max() > 1e-3, "the same twice: no noise or order of its own"
        angle = torch.arccos((a * b).sum() / a.norm() / b.norm())
        slerp = (torch.sin(angle / 2) / torch.sin(angle)) * (a + b)
        assert torch.allclose(after[name], start[name] + 0.3 * slerp, atol=1e-6), name
        moved += 1
    assert moved == 14
    first = [lines_of(part / "policies" / n / "samples.jsonl") for n in ("1.1", "1.2")]
    assert [x["prompt"] for x in first[0]] != [x["prompt"] for x in first[1]]
    model, merged, base = (
        Tensors(p) for p in (finished / "grpo" / "model", finished / "grpo" / "merged", part / "starts" / "1")
    )
    for name in base.shapes:
        assert torch.allclose(model[name], 0.7 * base[name] + 0.3 * merged[name], atol=1e-6)


def test_whole_weights_are_merged_alike(forks: Workshop, smoke_run: Path, tmp_path: Path) -> None:
    """Full fine-tuning of three policies, one round: the merge is the rule's of what they are."""
    fields = {"adapter": None, "lr": 1e-3, "rounds": 1, "policies": 3, "front": [], "liti": 1.0, "max_steps": 1}
    folder = started(smoke_run, tmp_path / "run")
    ended = forks.run(folder, die_at="before grpo", **how(**fields))
    assert ended["status"] == -signal.SIGKILL
    part = folder / "grpo.partial"
    start, merged = Tensors(part / "starts" / "0"), Tensors(part / "merged")
    policies = [Tensors(part / "policies" / f"1.{m}" / "weights") for m in (1, 2, 3)]
    for name in start.shapes:
        expected = start[name] + merging.slerp([p[name] - start[name] for p in policies])
        assert torch.allclose(merged[name], expected, atol=1e-6), name
        assert torch.allclose(Tensors(part / "model")[name], merged[name], atol=1e-6)


def test_a_kill_in_a_later_round_changes_nothing(
    forks: Workshop, halfway: Path, finished: Path, tmp_path: Path
) -> None:
    """In round 2, policy 1, after a checkpoint: goes on there. What was finished is not done again."""
    folder = tmp_path / "again"
    shutil.copytree(halfway, folder)
    part = folder / "grpo.partial"
    assert progress(part) == (3 + 3 + 2, 0)
    sealed = {n: (part / "policies" / n / "weights.json").stat().st_mtime_ns for n in ("1.1", "1.2")}
    ended = forks.run(folder, die_at="after grpo.partial/front/0.5.json", **how())
    assert ended["status"] == -signal.SIGKILL
    assert {n: (part / "policies" / n / "weights.json").stat().st_mtime_ns for n in sealed} == sealed
    assert not any("step 1 in grpo.partial/policies/2.1" in m for m in ended["moments"]), "it began anew"
    ended = forks.run(folder, **how())
    assert ended["status"] == 0, ended["traceback"]
    assert not any("/policies/" in m and "step" in m for m in ended["moments"])
    same(folder, finished)
    assert weights(folder) == weights(finished)
    assert read_json(folder / "grpo" / "front.json") == read_json(finished / "grpo" / "front.json")


def test_damage_to_what_was_finished_is_made_good(
    forks: Workshop, halfway: Path, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(halfway, folder)
    file = folder / "grpo.partial" / "starts" / "1" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    ended = forks.run(folder, **how())
    assert ended["status"] == 0, ended["traceback"]
    assert weights(folder) == weights(finished)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"policies": 1}, "nothing to merge"),
        ({"merge": False}, "whole models"),
        ({"merging": "slurp"}, "there is no merge rule"),
        ({"front": [0, 1.5]}, "beyond 0 to 1"),
        ({"ema": 0}, "does not fit"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        recipes.load("detox-summarization", profile="smoke", overrides={"stages": {"grpo": {**WARP, **fields}}})


def test_the_front_needs_held_out_prompts() -> None:
    for etas, refused in (([0.0, 1.0], True), ([], False)):
        stages = {"news": {"validation": 0}, "grpo": {**WARP, "front": etas}, "sft": {"evaluate_every": 100}}
        if refused:
            with pytest.raises(RecipeError, match="the front is measured"):
                recipes.load("detox-summarization", profile="smoke", overrides={"stages": stages})
        else:
            recipes.load("detox-summarization", profile="smoke", overrides={"stages": stages})


def test_the_defaults_are_the_papers() -> None:
    """Ramé et al. 2024, section 4: β = 0.1 in the reward, μ = 0.01, M = 2, η = 0.3."""
    fields = {k: v for k, v in WARP.items() if k not in ("rounds", "policies", "kl")}
    loaded = recipes.load(
        "detox-summarization",
        profile="smoke",
        overrides={"stages": {"grpo": {**fields, "kl": None, "algorithm": None}}},
    )
    stage: Any = loaded.stages["grpo"]
    assert (stage.kl.beta, stage.kl.place, stage.ema, stage.policies, stage.liti) == (0.1, "reward", 0.01, 2, 0.3)
    assert stage.algorithm == "rloo" and stage.merging == "slerp" and stage.advantage == {"leave_one_out": {}}
