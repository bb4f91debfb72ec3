"""A sweep: what it tries, what it trains and what it takes, kills, failures, one study of two processes, bad input."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import temper.stages  # noqa: F401  fills the registry
from staged_runs import ENVIRONMENT
from temper import pipeline, plan, recipe
from temper.app import run_recipe
from temper.errors import RecipeError, TrainingError
from temper.pipeline import Choice
from temper.runfolder import RunFolder, read_json
from temper.stages.space import Range, grid
from temper.stages.study import Grid, Study
from temper.stages.trials import dominates

LRS, RANKS = [1e-3, 1e-2], [2, 4]
SWEEP = {
    "stage": "sweep",
    "vary": {"sft.lr": LRS, "sft.adapter.r": RANKS},
    "measure": ["compare.sft.loss", "compare.sft.kl"],
    "best": ["lowest", "lowest"],
}


def written(folder: Path, model: Path, sweep: dict[str, Any] | None = None, **more: Any) -> Path:
    """A recipe of data, LoRA, evaluation and a sweep over them, on a model that is there."""
    rows = [{"question": f"Скільки буде {n} та {n + 1}?", "answer": f"Разом {2 * n + 1}."} for n in range(30)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qa.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    stages: dict[str, Any] = {
        "qa": {"stage": "data", "source": "qa.jsonl", "prompt": "{question}", "completion": "{answer}", "test": 6,
               "validation": 0, "near_leaks": False, "drop": {"duplicates": "off"}},
        "sft": {"stage": "sft", "data": "qa", "model": "base", "adapter": {"method": "lora", "r": 4}, "lr": 1e-3,
                "batch_size": 4, "max_steps": 2},
        "other": {"stage": "sft", "data": "qa", "model": "sft", "max_steps": 1},
        "compare": {"stage": "evaluate", "models": ["base", "sft", "other"], "data": "qa", "metrics": ["loss", "kl"],
                    "decoding": {"max_new_tokens": 2}, "resamples": 100},
        "tuned": SWEEP | (sweep or {}),
        **more,
    }  # fmt: skip
    file = folder / "tune.yaml"
    file.write_text(json.dumps({"name": "tune", "model": str(model), "threads": 1, "stages": stages}), encoding="utf-8")
    return file


def results(run: Path, stage: str = "tuned") -> dict[str, Any]:
    """trials.json without what the clock decides."""
    found = read_json(run / stage / "trials.json")
    return {**found, "trials": [{k: v for k, v in t.items() if k != "seconds"} for t in found["trials"]]}


CHILD = """
import json, os, signal, sys
from pathlib import Path
from temper import app
from temper.engine import loop
from temper.stages import trials
from temper.pipeline import Choice

file, out, step, trial = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
seen = {"trials": 0}
begin, append = trials._trial, loop.append

def began(job, sweep, number, settings):
    seen["trials"] = number
    if number == trial and step == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return begin(job, sweep, number, settings)

def appended(path, line):
    append(path, line)
    if "trials" in str(path) and seen["trials"] == trial and line["step"] == step:
        os.kill(os.getpid(), signal.SIGKILL)

trials._trial, loop.append = began, appended
app.run_recipe(file, out=out, choice=Choice(only=["tuned"]), quiet=True)
"""


def start(file: Path, out: Path, *, step: int = 0, trial: int = -1) -> subprocess.Popen:
    """The sweep in a process of its own, killed before a trial begins (step 0) or after a step of it."""
    words = [sys.executable, "-c", CHILD, str(file), str(out), str(step), str(trial)]
    return subprocess.Popen(words, env={**os.environ, **ENVIRONMENT})


@pytest.fixture(scope="module")
def swept(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe, run folder) of a finished grid of 2 × 2 and an evaluation of its best model."""
    folder = tmp_path_factory.mktemp("swept")
    final = {"stage": "evaluate", "models": ["base", "tuned"], "data": "qa", "metrics": ["loss"], "resamples": 100}
    file = written(folder, tiny_model, final=final)
    run_recipe(file, out=folder / "run", choice=Choice(only=["final"]), quiet=True)
    return file, folder / "run"


def test_a_grid_tries_every_combination_and_trains_no_more_than_that(swept: tuple[Path, Path]) -> None:
    _, run = swept
    found = read_json(run / "tuned" / "trials.json")
    wanted = [{"sft.lr": lr, "sft.adapter.r": r} for lr, r in itertools.product(LRS, RANKS)]
    assert [t["settings"] for t in found["trials"]] == wanted and {t["state"] for t in found["trials"]} == {"done"}
    assert not (run / "sft").exists() and not (run / "other").exists()  # the sweep needs neither as it is written
    for trial in found["trials"]:
        folder = run / "tuned" / trial["folder"]
        assert (folder / "qa").is_symlink() and (folder / "qa").resolve() == (run / "qa").resolve()
        assert not (folder / "other").exists()
        measured = read_json(folder / "compare" / "evaluation.json")
        assert list(measured["models"]) == ["base", "sft"]
        for name in ("loss", "kl"):
            entry = trial["values"][f"compare.sft.{name}"]
            assert {k: entry[k] for k in ("value", "low", "high", "n")} == {
                k: measured["models"]["sft"][name][k] for k in ("value", "low", "high", "n")
            }


def test_the_best_is_the_lowest_loss_and_is_used_afterwards(swept: tuple[Path, Path]) -> None:
    _, run = swept
    found = read_json(run / "tuned" / "trials.json")
    losses = [t["values"]["compare.sft.loss"]["value"] for t in found["trials"]]
    assert len(set(losses)) == 4 and found["best"] == losses.index(min(losses))
    best = run / "tuned" / found["trials"][found["best"]]["folder"]
    ours = (run / "tuned" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert ours == (best / "sft" / "adapter" / "adapter_model.safetensors").read_bytes()
    final = read_json(run / "final" / "evaluation.json")["models"]["tuned"]["loss"]["value"]
    assert final == pytest.approx(min(losses), abs=1e-6)
    weights = [t["folder"] for t in found["trials"] if (run / "tuned" / t["folder"] / "sft").exists()]
    assert weights == [found["trials"][found["best"]]["folder"]]  # keep: best


def test_the_front_is_of_trials_that_none_beats_in_both(swept: tuple[Path, Path]) -> None:
    _, run = swept
    found, front = read_json(run / "tuned" / "trials.json"), read_json(run / "tuned" / "front.json")
    both = [[t["values"][f"compare.sft.{m}"]["value"] for m in ("loss", "kl")] for t in found["trials"]]
    unbeaten = [i for i, (a, b) in enumerate(both) if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in both)]
    assert found["front"] == unbeaten
    assert (front["x"], front["y"]) == ("kl", "loss") and len(front["points"]) == 4
    assert front["points"][0]["setting"] == found["trials"][0]["settings"]


@pytest.mark.parametrize("step", [0, 1])
def test_a_killed_grid_ends_with_the_same_results(step: int, swept: tuple[Path, Path], tmp_path: Path) -> None:
    file, run = swept
    killed = start(file, tmp_path / "run", step=step, trial=1)
    assert killed.wait(120) == -signal.SIGKILL
    assert (tmp_path / "run" / "tuned.partial" / "trials.json").is_file()
    before = {p.parent.name: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("tuned.partial/trials/*/trial.json")}
    assert len(before) == 1
    (planned,) = [
        s for s in plan.make(recipe.load(file), tmp_path / "run", Choice(only=["tuned"])) if s.name == "tuned"
    ]
    assert (planned.state, planned.reason) == (plan.GOES_ON, "1 of its trials are done")
    run_recipe(file, out=tmp_path / "run", choice=Choice(only=["tuned"]), quiet=True)
    assert results(tmp_path / "run") == results(run)
    ours, theirs = (r / "tuned" / "adapter" / "adapter_model.safetensors" for r in (tmp_path / "run", run))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_longer_grid_takes_the_trials_that_are_there(swept: tuple[Path, Path], tmp_path: Path) -> None:
    file, run = swept
    out = tmp_path / "run"
    subprocess.run(["cp", "-a", str(run), str(out)], check=True)
    longer = {"stages": {"tuned": {"vary": {"sft.lr": [*LRS, 3e-3], "sft.adapter.r": [4]}}}}
    run_recipe(file, overrides=longer, out=out, choice=Choice(only=["tuned"]), quiet=True)
    new, old = read_json(out / "tuned" / "trials.json")["trials"], read_json(run / "tuned" / "trials.json")["trials"]
    assert [t["settings"]["sft.lr"] for t in new] == [*LRS, 3e-3]
    for trial in new[:2]:
        same = next(t for t in old if t["settings"] == trial["settings"])
        assert same["values"] == trial["values"] and same["seconds"] == trial["seconds"]  # to the millisecond: not run
    assert set(RunFolder(out).aside())  # the shorter one is kept


def test_a_failed_trial_is_a_trial_and_the_sweep_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    sweep = {"vary": {"sft.max_length": [8, None]}, "measure": "compare.sft.loss", "best": "lowest"}
    file = written(tmp_path, tiny_model, sweep)
    run_recipe(file, out=tmp_path / "run", choice=Choice(only=["tuned"]), quiet=True)
    found = read_json(tmp_path / "run" / "tuned" / "trials.json")
    assert [t["state"] for t in found["trials"]] == ["failed", "done"] and found["best"] == 1
    assert "no example fits into 8 tokens" in found["trials"][0]["error"]
    none = {"stages": {"tuned": {"vary": {"sft.max_length": [8, 9]}}}}
    with pytest.raises(TrainingError, match="all 2 trials failed"):
        run_recipe(file, overrides=none, out=tmp_path / "run", choice=Choice(only=["tuned"]), quiet=True)


def test_the_worst_is_not_taken_for_the_best(tiny_model: Path, tmp_path: Path) -> None:
    file = written(tmp_path, tiny_model, {"vary": {"sft.lr": [1e-3]}, "measure": "compare.sft.loss", "best": None})
    with pytest.raises(RecipeError, match="loss is better the lower it is") as caught:
        run_recipe(file, out=tmp_path / "run", choice=Choice(only=["tuned"]), quiet=True)
    assert "best: lowest" in caught.value.do


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"vary": {"sfd.lr": [1]}}, "did you mean «sft»"),
        ({"vary": {"sft.adapter.rr": [1]}}, "did you mean «r»"),
        ({"vary": {"sft.adapter.r": [2, "four"]}}, "sft.adapter.r = 'four' does not fit"),
        ({"vary": {"sft.lr": [1e-3, -1.0]}}, "sft.lr = -1.0 does not fit"),
        ({"vary": {"sft.adapter.r": {"low": 1.0, "high": 4.0}}, "search": "random"}, "does not fit"),
        ({"vary": {"sft.lr": {"low": 1e-4, "high": 1e-3}}}, "a grid needs the values of sft.lr"),
        ({"vary": {"sft.lr": {"low": 1e-3, "high": 1e-4}}, "search": "tpe"}, "low 0.001 is not below high 0.0001"),
        ({"vary": {"sft.lr": {"low": 0, "high": 1, "log": True}}, "search": "tpe"}, "begins above 0"),
        ({"vary": {"sft.lr": []}}, "no value for sft.lr"),
        ({"vary": {"qa.source": ["qa.jsonl"]}, "measure": "compare.base.lost"}, "did you mean «loss»"),
        ({"measure": "compare.sfd.loss"}, "did you mean «sft»"),
        ({"measure": "compared.sft.loss"}, "did you mean «compare»"),
        ({"measure": "compare.loss"}, "no STAGE.MODEL.METRIC"),
        ({"measure": "compare.base.loss"}, "on which compare do not depend"),
        ({"measure": ["compare.sft.loss", "compare.base.loss"]}, "the same in every trial"),
        ({"vary": {"other.lr": [1e-3]}, "measure": "compare.sft.loss"}, "on which compare do not depend"),
        ({"trials": 3}, "a grid tries all its points"),
        ({"best": ["lowest"]}, "best has 1 entries for 2 measures"),
        ({"model_of": "other"}, "model_of: no stage «other»"),
    ],
)
def test_bad_input_is_told_before_anything_runs(sweep: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = written(tmp_path, tmp_path, {"best": None, **sweep})
    with pytest.raises(RecipeError) as caught:
        recipe.load(file)
    assert said in f"{caught.value.what}; {caught.value.do}" and "tune.yaml" in caught.value.where


def test_a_sweep_that_is_measured_by_its_own_result_is_refused(tmp_path: Path) -> None:
    circle = {"stage": "evaluate", "models": ["base", "tuned", "sft"], "data": "qa", "metrics": ["loss"]}
    file = written(tmp_path, tmp_path, {"measure": ["circle.tuned.loss"], "best": "lowest"}, circle=circle)
    with pytest.raises(RecipeError, match="reads its own result"):
        recipe.load(file)


def test_the_key_follows_whatever_a_trial_depends_on(tiny_model: Path, tmp_path: Path) -> None:
    file = written(tmp_path, tiny_model)

    def key(**changes: Any) -> str:
        loaded, keys = recipe.load(file, overrides={"stages": changes}), dict[str, str]()
        for name in Choice(only=["tuned"]).wanted(loaded):
            keys[name] = pipeline.key_of(loaded, name, keys)
        return keys["tuned"]

    now = key()
    assert key(sft={"batch_size": 3}) != now and key(qa={"test": 7}) != now and key(compare={"resamples": 101}) != now
    assert key(sft={"lr": 0.5}) == now  # every trial sets it
    assert key(other={"lr": 0.5}) == now and key(tuned={"keep": "all"}) == now


def test_of_two_points_one_may_be_better_in_everything() -> None:
    assert dominates([2.0, 1.0], [1.0, 1.0]) and not dominates([2.0, 0.0], [1.0, 1.0])
    assert Range(low=1, high=8).some() == [1, 8, 4] and len(grid({"a.b": [1, 2], "a.c": [1, 2, 3]})) == 6
    assert len(Grid({"a.b": [1, 2]})) == 2


def test_the_plan_of_a_sweep_is_the_sum_of_its_trials(swept: tuple[Path, Path], tmp_path: Path) -> None:
    file, run = swept

    def step(out: Path, **tuned: Any) -> plan.Step:
        loaded = recipe.load(file, overrides={"stages": {"tuned": tuned, "sft": {"batch_size": 4}}})
        return next(s for s in plan.make(loaded, out, Choice(only=["tuned"])) if s.name == "tuned")

    assert step(run).state == plan.CACHED
    loaded = recipe.load(file, overrides={"stages": {"sft": {"batch_size": 5}}})
    why = next(s for s in plan.make(loaded, run, Choice(only=["tuned"])) if s.name == "tuned")
    assert why.state == plan.RUNS and "what its trials run has changed" in why.reason
    new = step(tmp_path / "none")
    assert "4 trials of sft, compare, at most" in new.cost.basis
    assert new.cost.tokens and new.cost.seconds
    doubled = step(tmp_path / "none", vary={"sft.lr": [1e-3, 1e-2], "sft.adapter.r": [2, 4], "sft.max_steps": [2, 2]})
    assert doubled.cost.tokens == pytest.approx(2 * new.cost.tokens)
    drawn = step(tmp_path / "none", search="tpe", trials=10)
    assert drawn.cost.tokens == pytest.approx(2.5 * new.cost.tokens)
    unknown = {
        "data": {"stage": "generate", "data": "qa", "model": "base", "instruction": "{prompt}", "into": "prompt"}
    }
    loaded = recipe.load(file, overrides={"stages": {"sft": {"data": "data"}, **unknown}})
    told = next(s for s in plan.make(loaded, tmp_path / "none", Choice(only=["tuned"])) if s.name == "tuned")
    assert told.cost.seconds is not None or "nothing" in told.cost.basis


# Optuna

optuna = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="the extra `sweep` is not installed")
SPACE = {"vary": {"sft.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "sft.adapter.r": [2, 4]}, "search": "tpe"}


def study(folder: Path, total: int = 6, **more: Any) -> Study:
    folder.mkdir(exist_ok=True)
    space = {"a.x": Range(low=1e-3, high=1.0, log=True), "a.n": Range(low=1, high=4), "a.c": [{"k": 1}, None]}
    return Study(space, ["highest"], **{"name": "s", "storage": None, "folder": folder, "search": "tpe", "total": total,
                                        "seed": 3, "say": lambda _: None, **more})  # fmt: skip


def told(made: Study, most: int) -> list[dict[str, Any]]:
    out = []
    while len(out) < most and (asked := made.ask()) is not None:
        number, settings = asked
        value = settings["a.x"] * settings["a.n"]
        trial = {"number": number, "settings": settings, "values": {"m": {"value": value}}, "seconds": 1.0,
                 "state": "done" if number != 2 else "failed", "error": None, "folder": "f"}  # fmt: skip
        made.tell(trial)
        out.append(trial)
    return out


@optuna
def test_a_study_that_was_stopped_proposes_what_it_would_have(tmp_path: Path) -> None:
    whole = told(study(tmp_path / "a", 14), 20)
    assert len(whole) == 14 and len({t["settings"]["a.x"] for t in whole}) == 14
    assert all(1e-3 <= t["settings"]["a.x"] <= 1 and t["settings"]["a.n"] in (1, 2, 3, 4) for t in whole)
    first = told(study(tmp_path / "b", 14), 5)
    asked = study(tmp_path / "b", 14).ask()  # and killed in this trial
    again = study(tmp_path / "b", 14)
    assert again.ask() == asked
    rest = told(study(tmp_path / "b", 14), 20)
    assert first + rest == whole == study(tmp_path / "b", 14).trials


@optuna
def test_two_processes_share_a_study(tiny_model: Path, tmp_path: Path) -> None:
    shared = {**SPACE, "storage": f"sqlite:///{tmp_path / 'study.db'}", "trials": 4, "best": "lowest",
              "measure": "compare.sft.loss"}  # fmt: skip
    file = written(tmp_path, tiny_model, shared)
    both = [start(file, tmp_path / name) for name in ("one", "two")]
    assert [p.wait(180) for p in both] == [0, 0]
    found = [read_json(tmp_path / name / "tuned" / "trials.json") for name in ("one", "two")]
    assert [t["number"] for t in found[0]["trials"]] == [0, 1, 2, 3] and {t["state"] for t in found[0]["trials"]} == {
        "done"
    }
    values = [[t["values"] for t in f["trials"]] for f in found]
    assert values[0] == values[1] and found[0]["best"] == found[1]["best"]
    ours = [len(list((tmp_path / name / "tuned" / "trials").glob("*/trial.json"))) for name in ("one", "two")]
    assert sum(ours) in (4, 5)  # the best one is in both
    models = [(tmp_path / n / "tuned" / "adapter" / "adapter_model.safetensors").read_bytes() for n in ("one", "two")]
    assert models[0] == models[1]
