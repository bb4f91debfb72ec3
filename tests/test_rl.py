"""Learning from rewards: rollouts and updates that a kill may fall between, ratios, what is refused, what is told."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import temper.app
from staged_runs import Workshop, copy_stages, lines_of, weights
from temper import recipe as recipes
from temper import rewards
from temper.errors import DataError, ModelError, RecipeError, TrainingError
from temper.pipeline import Choice
from temper.runfolder import read_json
from temper.stages.rl import Rl
from temper.types import Record
from test_resume import die_at_each, reference, started

RL: dict[str, Any] = {
    "stage": "rl", "model": "base", "data": "news", "adapter": {"method": "lora", "r": 4},
    "reward": [{"rouge": {"variant": "rougeL"}, "weight": 0.5}, {"length": {"target": 6}, "weight": 0.5}],
    "classifier": None, "completions": 4, "batch_size": 3, "lr": 1e-2, "decoding": {"max_new_tokens": 10, "temperature": 1.0},
    "rollout_steps": 2, "iterations": 2, "max_steps": 10, "precision": "float32", "merge": True,
}  # fmt: skip
LONGER = {"decoding": {"max_new_tokens": 40, "temperature": 1.0}}  # so that some answers end


def run(folder: Path, smoke_run: Path, **fields: Any) -> Path:
    """The stage alone, on the finished data and base of the smoke run."""
    if not folder.exists():
        copy_stages(smoke_run, folder, "corpus", "tiny", "news")
    temper.app.run_recipe(
        "detox-summarization",
        profile="smoke",
        overrides={"threads": 1, "stages": {"grpo": {**RL, **fields}}},
        choice=Choice(only=["grpo"]),
        out=folder,
        quiet=True,
    )
    return folder / "grpo"


def metrics(stage: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of rollouts, and of steps."""
    lines = lines_of(stage / "metrics.jsonl")
    return [x for x in lines if "reward" in x], [x for x in lines if "loss" in x]


def test_what_a_run_writes_and_that_ratios_are_right(smoke_run: Path, tmp_path: Path) -> None:
    stage = run(tmp_path / "run", smoke_run)
    rollouts, steps = metrics(stage)
    assert [x["step"] for x in rollouts] == [1, 5, 9] and [x["step"] for x in steps] == list(range(1, 11))
    for x in rollouts:
        assert x["reward"] == pytest.approx(0.5 * x["reward_rouge"] + 0.5 * x["reward_length"])
        assert {"reward_std", "length", "cut", "entropy", "groups_without_variance"} <= set(x)
        assert 0 <= x["cut"] <= 1 and 0 < x["length"] <= 10
    for x in steps:
        # the first pass over a rollout's first batch is on policy; after an update nothing is
        if (x["step"] - 1) % 4 == 0:
            assert x["ratio"] == pytest.approx(1, abs=1e-5) and x["clipped"] == 0
        assert x["sampling_gap"] < 1e-4
    assert any(abs(x["ratio"] - 1) > 1e-4 for x in steps)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-7) and steps[-1]["kl"] > 1e-4
    samples = lines_of(stage / "samples.jsonl")
    assert {x["step"] for x in samples} == {1, 5, 9}
    assert set(samples[0]) == {"step", "prompt", "completion", "reference", "reward"}
    assert not (stage / "rollouts").exists() and (stage / "model").is_dir() and (stage / "adapter").is_dir()
    facts = read_json(stage / "stage.json")["facts"]
    assert facts["sampler"].startswith("native sampler")


def test_the_reward_rises(smoke_run: Path, tmp_path: Path) -> None:
    """A base that knows next to nothing learns to write a digit into every answer."""
    stage = run(
        tmp_path / "run", smoke_run, reward=[{"regex": {"pattern": "[0-9]"}}], rollout_steps=1, iterations=1,
        max_steps=25, batch_size=8, completions=8, lr=3e-3, kl={"beta": 0.0}, adapter=None, merge=False,
    )  # fmt: skip
    found = [x["reward"] for x in metrics(stage)[0]]
    assert np.mean(found[-5:]) > np.mean(found[:5]) + 0.3, found


@pytest.mark.parametrize(
    "fields",
    [
        {"checkpoint_every": 3, "lr": 3e-3, "precision": "bf16", "average": "token", "mask_cut": True, **LONGER},
        {
            "checkpoint_every": 1,
            "adapter": None,
            "kl": {"place": "reward", "beta": 0.1},
            "max_steps": 5,
            "merge": False,
        },
    ],
)
def test_a_run_dies_between_rollouts_and_updates(
    forks: Workshop, smoke_run: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    how: dict[str, Any] = {"overrides": {"stages": {"grpo": {**RL, **fields}}}, "only": ["grpo"]}
    start = started(smoke_run, tmp_path, "corpus", "tiny", "news")
    unkilled = start("unkilled")
    moments = [m for m in reference(forks, unkilled, **how) if "adapter/" not in m and "model/" not in m]
    assert any("rollouts/" in m for m in moments)
    assert die_at_each(forks, moments, start, unkilled, **how) >= 0.9 * len(moments) > 8


def test_a_damaged_rollout_costs_steps_and_not_the_result(forks: Workshop, smoke_run: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"overrides": {"stages": {"grpo": {**RL, "checkpoint_every": 3}}}, "only": ["grpo"]}
    folders = [copy_stages(smoke_run, tmp_path / n, "corpus", "tiny", "news") for n in ("whole", "torn")]
    assert forks.run(folders[0], **how)["status"] == 0
    moment = "step 7 in grpo.partial/metrics.jsonl"  # after checkpoint 6, in the middle of the second rollout
    assert forks.run(folders[1], die_at=moment, **how)["status"] == -signal.SIGKILL
    [file] = (folders[1] / "grpo.partial" / "rollouts").glob("1.rollout")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    ended = forks.run(folders[1], **how)
    assert ended["status"] == 0, ended["traceback"]
    assert weights(folders[0]) == weights(folders[1])
    warnings = read_json(folders[1] / "grpo" / "stage.json")["warnings"]
    assert any("in the middle of" in w for w in warnings)
    assert lines_of(folders[0] / "grpo" / "metrics.jsonl") == lines_of(folders[1] / "grpo" / "metrics.jsonl")


def test_a_baseline_of_earlier_rollouts_outlives_a_kill(forks: Workshop, smoke_run: Path, tmp_path: Path) -> None:
    """Also where a rollout must be sampled anew, whose forerunner is used up."""
    fields = {
        "algorithm": "reinforce", "completions": 1, "batch_size": 5, "rollout_steps": 1, "iterations": 1, "adapter": None,
        "kl": {"samples": "one", "level": "token"}, "max_steps": 5, "checkpoint_every": 2, "merge": False,
    }  # fmt: skip
    how: dict[str, Any] = {"overrides": {"stages": {"grpo": {**RL, **fields}}}, "only": ["grpo"]}
    folders = [copy_stages(smoke_run, tmp_path / n, "corpus", "tiny", "news") for n in ("whole", "killed")]
    assert forks.run(folders[0], **how)["status"] == 0
    assert forks.run(folders[1], die_at="step 4 in grpo.partial/metrics.jsonl", **how)["status"] == -signal.SIGKILL
    rollouts = folders[1] / "grpo.partial" / "rollouts"
    assert (rollouts / "1.rollout").exists(), "step 2 is the last checkpoint, and the next baseline stands in this"
    for number in (2, 3):
        (rollouts / f"{number}.rollout").unlink()
    assert forks.run(folders[1], **how)["status"] == 0
    assert weights(folders[0]) == weights(folders[1])
    # whose baseline is not nothing: another history gives other weights
    other = {**fields, "advantage": {"baseline": {"mean": "batch"}}}
    folder = copy_stages(smoke_run, tmp_path / "other", "corpus", "tiny", "news")
    assert forks.run(folder, overrides={"stages": {"grpo": {**RL, **other}}}, only=["grpo"])["status"] == 0
    assert weights(folder) != weights(folders[0])


def test_a_prompt_met_twice_in_a_rollout_is_answered_anew(smoke_run: Path, tmp_path: Path) -> None:
    """A rollout goes over the end of an epoch, whose last batch is a short one."""
    prompts = read_json(smoke_run / "news" / "card.json")["splits"]["train"]
    stage = run(
        tmp_path / "run", smoke_run, batch_size=30, rollout_steps=5, iterations=1, max_steps=5, completions=2,
        samples=200,
    )  # fmt: skip
    assert 90 < prompts < 120 and len(lines_of(stage / "samples.jsonl")) == prompts + 30
    by_prompt: dict[str, list[str]] = {}
    for line in lines_of(stage / "samples.jsonl"):
        by_prompt.setdefault(line["prompt"], []).append(line["completion"])
    twice = [texts for texts in by_prompt.values() if len(texts) > 1]
    assert twice and all(len(set(texts)) == len(texts) for texts in twice)


def test_dropout_is_off_in_samples_ratios_and_reference(smoke_run: Path, tmp_path: Path) -> None:
    """With it on, the ratio of the first update would not be 1 and the KL not 0."""
    stage = run(tmp_path / "run", smoke_run, adapter={"method": "lora", "r": 4, "dropout": 0.5}, max_steps=2)
    first = metrics(stage)[1][0]
    assert first["ratio"] == pytest.approx(1, abs=1e-5) and first["kl"] == pytest.approx(0, abs=1e-6)
    again = run(tmp_path / "none", smoke_run, max_steps=2)
    assert metrics(again)[1][0]["grad_norm"] == first["grad_norm"], "0.5 asked for and none, the same gradient"


USERS = """
def polite(prompts, completions, completion_ids, topic, **kwargs):
    assert len(prompts) == len(completions) == len(completion_ids) == len(topic)
    return [None if k == 0 else float(len(c) % 5) for k, c in enumerate(completions)]

def short(completions, **kwargs):
    return [1.0]

def broken(completions, topic, **kwargs):
    return [1 / (c != completions[-1]) for c in completions]

def nothing(completions, **kwargs):
    return [float("nan")] * len(completions)

async def slow(completions, **kwargs):
    return [float(len(c)) for c in completions]

def same(completions, **kwargs):
    return [0.5] * len(completions)

def words(completions, **kwargs):
    return ["good"] * len(completions)

def nested(completions, **kwargs):
    return [[1.0]] * len(completions)

def silent(completions, **kwargs):
    return [None] * len(completions)

def late(completions, **kwargs):
    return [0.0 if k < 4 else float(k) for k in range(len(completions))]
"""


def given(n: int = 3) -> rewards.Given:
    rows = [Record({"prompt": f"p{k}", "completion": f"r{k}", "topic": "t"}, f"rows.jsonl:{k + 1}") for k in range(n)]
    return rewards.Given(
        [f"p{k}" for k in range(n)], ["one two", "three", "4"][:n], ["one two"] * n, rows, [[1, 2]] * n
    )


def test_rewards_are_composed_and_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(USERS)
    parts = rewards.read(
        [{"rouge": {"variant": "rouge1"}, "weight": 2}, "mine:polite", {"regex": {"pattern": "[0-9]"}, "weight": 0.5}],
        folder=tmp_path,
    )
    total, each = rewards.compute(parts, given())
    assert each["rouge"].tolist() == [1, 0, 0] and each["regex"].tolist() == [0, 0, 1]
    assert np.isnan(each["mine:polite"][0]) and each["mine:polite"][1:].tolist() == [0, 1]
    assert total.tolist() == [2, 0, 1.5]
    assert rewards.compute(rewards.read(["mine:slow"], folder=tmp_path), given())[0].tolist() == [7, 5, 1]


@pytest.mark.parametrize(
    ("name", "what", "where"),
    [
        ("mine:short", "gave 1 values for 3 completions", "rows.jsonl:1"),
        ("mine:broken", "ZeroDivisionError", "rows.jsonl:"),
        ("mine:nothing", "gave nan", "rows.jsonl:1"),
        ("mine:words", "gave good", "rows.jsonl:1"),
        ("mine:nested", "gave [1.0]", "rows.jsonl:1"),
    ],
)
def test_a_reward_that_fails_is_told_with_its_row(tmp_path: Path, name: str, what: str, where: str) -> None:
    (tmp_path / "mine.py").write_text(USERS)
    with pytest.raises(DataError) as error:
        rewards.compute(rewards.read([name], folder=tmp_path), given())
    assert what in error.value.what and where in error.value.where and error.value.do


def test_what_the_classifier_says_is_not_put_down_to_the_reward() -> None:
    def judge(texts: Any) -> Any:
        raise ModelError("the classifier has no label «toxic»", do="write toxic_label: …")

    asked = dataclasses.replace(given(), toxicity=judge)
    with pytest.raises(
        ModelError, match=r"^the classifier has no label «toxic»\nwhere: rows.jsonl:1.*\ndo: write toxic_label: …$"
    ):
        rewards.compute(rewards.read(["toxicity"]), asked)


def test_a_users_reward_is_part_of_the_key(smoke_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(USERS)
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "name: own\nmodel: nowhere\nstages:\n  news: {stage: data, source: mini:uk-news, prompt: '{text}', completion: '{summary}'}\n"
        "  grpo: {stage: rl, data: news, reward: ['mine:polite']}\n"
    )
    stage = recipes.load(recipe).stages["grpo"]
    before = stage.fingerprint(tmp_path)
    (tmp_path / "mine.py").write_text(USERS + "\n# changed\n")
    assert stage.fingerprint(tmp_path) != before and len(before) == 1


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"completions": 1}, "groups of one"),
        ({"decoding": {"temperature": 0}}, "greedy"),
        ({"decoding": {"temperature": 1, "top_p": 0.9}}, "another distribution"),
        ({"kl": {"estimator": "k1"}}, "no gradient"),
        ({"kl": {"place": "reward", "estimator": "k3"}}, "not an unbiased"),
        ({"kl": {"level": "sequence", "estimator": "k3"}}, "grows with e"),
        ({"algorithm": "dapo", "kl": {"place": "loss", "beta": None}}, "not how much it weighs"),
        ({"algorithm": "rloo", "completions": 1}, "groups of one.*leave_one_out compares"),
        ({"algorithm": "reinforce", "advantage": "leave_one_out", "completions": 1}, "groups of one"),
        ({"advantage": {"global": {"mean": "group"}}, "completions": 1}, "groups of one"),
        ({"algorithm": "reinforce"}, "serves 4 steps"),
        ({"algorithm": "gspo", "average": "token"}, "one ratio a completion"),
        (
            {"algorithm": "reinforce++", "completions": 1, "batch_size": 1, "rollout_steps": 1},
            "nothing to compare it with",
        ),
        ({"algorithm": {"cispo": {"epsilon": 0.2}}}, "no option"),
        ({"advantage": {"baseline": {"mean": "moving"}}}, "does not fit"),
        ({"reward": ["toxicity"]}, "asks a classifier"),
        ({"classifier": "tiny"}, "no reward asks it"),
        ({"reward": ["tocixity"]}, "there is no reward"),
        ({"reward": [{"rouge": {"varient": "rougeL"}}]}, "no option"),
        ({"reward": [{"regex": {"pattern": "("}}]}, "not a regular expression"),
        ({"reward": ["length"]}, "needs «target»"),
        ({"reward": ["regex", "regex"]}, "needs «pattern»"),
        ({"reward": [{"rouge": {}}, {"rouge": {}}]}, "stands twice"),
        ({"algorithm": "gpro"}, "there is no algorithm"),
        ({"algorithm": {"grpo": {"epsilonn": 1}}}, "no option"),
        ({"advantage": "grop"}, "there is no advantage"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError, match=what) as error:
        recipes.load("detox-summarization", profile="smoke", overrides={"stages": {"grpo": {**RL, **fields}}})
    assert error.value.do or error.value.where


def test_the_length_alone_may_be_set_and_it_still_samples() -> None:
    own = {**RL, "decoding": {"max_new_tokens": 7, "temperature": None}}  # null: as if the recipe had none
    loaded = recipes.load("detox-summarization", profile="smoke", overrides={"stages": {"grpo": own}})
    assert loaded.stages["grpo"].decoding.temperature == 1.0  # type: ignore[attr-defined]


def test_rewards_that_are_all_equal_stop_the_run(smoke_run: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="same reward") as error:
        run(tmp_path / "run", smoke_run, reward=[{"regex": {"pattern": "никогда-такого"}}])
    assert "samples.jsonl" in error.value.do


def test_rewards_that_are_all_silent_stop_the_run(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "silent_rewards.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrainingError, match="no completion had a reward") as error:
        run(tmp_path / "run", smoke_run, reward=["silent_rewards:silent"])
    assert "None" in error.value.do


def test_a_first_batch_without_any_advantage_does_not_stop_the_run(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first step whose gradient is zero is taken for a model in which nothing is trained. Here the first prompt of
    every rollout teaches nothing: of the first rollout the other one goes before."""
    (tmp_path / "late_rewards.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    stage = run(
        tmp_path / "run", smoke_run, reward=["late_rewards:late"], batch_size=1, iterations=1, max_steps=4, kl={"beta": 0}
    )  # fmt: skip
    assert [x["grad_norm"] > 0 for x in metrics(stage)[1]] == [True, False, False, True]


def test_a_prompt_without_room_for_an_answer_is_told(smoke_run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leave no room for 300 tokens in a context of 320") as error:
        run(tmp_path / "run", smoke_run, decoding={"max_new_tokens": 300, "temperature": 1.0})
    assert "mini:uk-news" in error.value.where


@pytest.mark.parametrize("adapter", [{"r": 4}, None], ids=["another adapter", "the whole model"])
def test_an_adapter_that_was_not_merged_is_folded_in_first(
    smoke_run: Path, tmp_path: Path, adapter: dict[str, int] | None
) -> None:
    """The reference is the model before this stage, the earlier adapter in it; otherwise its KL would not start at 0."""
    folder = copy_stages(smoke_run, tmp_path / "run", "corpus", "tiny", "news")
    temper.app.run_recipe(
        "detox-summarization",
        profile="smoke",
        overrides={
            "threads": 1,
            "stages": {
                "sft": {"merge": False, "max_steps": 4},
                "grpo": {**RL, "model": "sft", "max_steps": 3, "adapter": adapter},
            },
        },
        choice=Choice(only=["sft", "grpo"]),
        out=folder,
        quiet=True,
    )
    assert metrics(folder / "grpo")[1][0]["kl"] == pytest.approx(0, abs=1e-6)
    info = json.loads((folder / "grpo" / "stage.json").read_text())
    assert (info["trainable_parameters"] == info["parameters"]) == (adapter is None)


ONE = {"rollout_steps": 1, "iterations": 1}


@pytest.mark.parametrize(
    ("algorithm", "fields", "expected"),
    [
        ("grpo", {}, ({"group": {}}, "sequence", False, (0.04, "loss", "token", "k3"))),
        ("dr_grpo", {}, ({"group": {"scale": "none"}}, "constant", False, (0, "loss", "token", "k3"))),
        ("dapo", {"mask_cut": False}, ({"group": {}}, "token", False, (0, "loss", "token", "k3"))),
        ("dapo", {}, ({"group": {}}, "token", True, (0, "loss", "token", "k3"))),
        ("rloo", {}, ({"leave_one_out": {}}, "sum", False, (0.05, "reward", "sequence", "k1"))),
        ("rloo", {"advantage": "group", "average": "token"}, ("group", "token", False, (0.05, "reward", "sequence", "k1"))),
        ({"rloo": {"epsilon": 0.1}}, {"kl": {"place": "loss", "level": "sequence"}}, ({"leave_one_out": {}}, "sum", False, (0.05, "loss", "sequence", "k2"))),
        ("reinforce", ONE, ({"baseline": {}}, "sum", False, (0.05, "reward", "sequence", "k1"))),
        ("reinforce++", {"kl": {"beta": 0.2}}, ({"global": {}}, "sequence", False, (0.2, "reward", "token", "k1"))),
    ],
)  # fmt: skip
def test_a_name_gives_the_whole_of_its_paper_and_the_recipe_overrides(
    algorithm: Any, fields: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    given = {name: value for name, value in RL.items() if name != "stage"}
    rl = Rl.model_validate({**given, "algorithm": algorithm, **fields})
    kl = (rl.kl.beta, rl.kl.place, rl.kl.level, rl.kl.estimator)
    assert (rl.advantage, rl.average, rl.mask_cut, kl) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"algorithm": "rloo", "completions": 3},
        {"algorithm": "rloo", "kl": {"place": "loss", "level": "sequence", "samples": "one"}},
        {"algorithm": "gspo", "mask_cut": True, **LONGER},
        {"algorithm": "dapo", "kl": {"beta": 0.1, "samples": "one"}, **LONGER},
        {"algorithm": "reinforce++", "completions": 1, "batch_size": 7},
        {"algorithm": "reinforce", "advantage": {"baseline": {"mean": "none"}}, "completions": 1, **ONE},
    ],
    ids=str,
)
def test_algorithms_run(smoke_run: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    stage = run(tmp_path / "run", smoke_run, **{"max_steps": 5, "merge": False, **fields})
    rollouts, steps = metrics(stage)
    assert len(steps) == 5 and steps[0]["sampling_gap"] < 1e-4 and steps[0]["grad_norm"] > 0
    if "ratio" in steps[0]:
        assert steps[0]["ratio"] == pytest.approx(1, abs=1e-5) and abs(steps[3]["ratio"] - 1) > 1e-6
    for x in rollouts:
        assert {"distinct_2", "self_bleu", "loop_share", "same_opening"} <= set(x)
        assert 0 <= x["self_bleu"] <= 1
    if "kl" in {**steps[0], **rollouts[0]}:
        first = steps[0].get("kl", rollouts[0].get("kl"))
        assert first == pytest.approx(0, abs=1e-6), "the reference is the policy at the start"
