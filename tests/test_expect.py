"""An evaluation that expects bounds: kept, the run goes on; broken, it stops; what cannot be meant is refused first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from temper import cli
from temper import recipe as recipes
from temper.errors import DataError, RecipeError
from temper.runfolder import read_json
from temper.stages import compare
from temper.stages.evaluate import Expectation
from temper.types import Scores


def recipe(folder: Path, model: object, *expect: dict[str, Any]) -> Path:
    """A look at a model that must keep bounds."""
    rows = [{"q": f"Скільки буде {n} та {n}?", "a": f"Разом {2 * n}."} for n in range(8)]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    qa = {"stage": "data", "source": "qa.jsonl", "prompt": "{q}", "completion": "{a}", "validation": 0, "test": 4}
    look = {"stage": "evaluate", "models": ["base"], "data": "qa", "metrics": ["loss", "length"], "resamples": 200}
    look |= {"decoding": {"max_new_tokens": 4}, "expect": list(expect)}
    file = folder / "expecting.yaml"
    file.write_text(json.dumps({"name": "e", "model": str(model), "threads": 1, "stages": {"qa": qa, "look": look}}))
    return file


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`temper run` with such bounds; its exit code and what it wrote to stderr."""

    def call(*expect: dict[str, Any]) -> tuple[int, str]:
        file = recipe(tmp_path, tiny_model, *expect)
        code = cli.main(["run", str(file), "--out", str(tmp_path / "run"), "--quiet"])
        return code, capsys.readouterr().err

    return call


def test_bounds_that_are_kept_and_bounds_that_are_broken(run: Run, tmp_path: Path) -> None:
    assert run() == (0, "")
    loss = read_json(tmp_path / "run" / "look" / "evaluation.json")["models"]["base"]["loss"]["value"]
    kept = {"model": "base", "metric": "loss", "at_least": loss - 0.01, "at_most": loss + 0.01}
    assert run(kept) == (0, "")
    for broken, bound in (
        ({"at_least": loss + 0.01}, f"at least {loss + 0.01:g}"),
        ({"at_most": loss - 0.01}, f"at most {loss - 0.01:g}"),
    ):
        code, told = run(
            {"model": "base", "metric": "length", "at_least": 0}, {"model": "base", "metric": "loss", **broken}
        )
        assert code == 1 and "Traceback" not in told
        assert f"error: loss of base is {loss:.3f}, and the recipe expects {bound}\n" in told and "\ndo: " in told
        assert {s["name"]: s["status"] for s in read_json(tmp_path / "run" / "manifest.json")["stages"]} == {
            "qa": "done", "look": "failed",
        }  # fmt: skip
        assert read_json(tmp_path / "run" / "look" / "stage.json")["config"]["expect"] == [kept]  # the last that held
        answers = tmp_path / "run" / "look.partial" / "answers"
        before = {p.name: p.stat().st_mtime_ns for p in answers.iterdir()}
        # the same command stops again, without asking the model once more
        again = run({"model": "base", "metric": "length", "at_least": 0}, {"model": "base", "metric": "loss", **broken})
        assert again == (code, told) and {p.name: p.stat().st_mtime_ns for p in answers.iterdir()} == before


@pytest.mark.parametrize(
    ("value", "bounds", "said"),
    [
        (2.0, {"at_least": 2, "at_most": 2}, None),
        (2.1, {"at_least": 1, "at_most": 2}, "is 2.100, and the recipe expects at most 2"),
        (0.9, {"at_least": 1, "at_most": 2}, "is 0.900, and the recipe expects at least 1"),
        (np.nan, {"at_least": 1}, "is nan, and the recipe expects at least 1"),
        (np.nan, {"at_most": 2}, "is nan, and the recipe expects at most 2"),
    ],
)
def test_no_number_keeps_no_bound(value: float, bounds: dict[str, float], said: str | None) -> None:
    scores = {"sft": {"loss": Scores.mean(np.full(3, value), "loss")}}
    expect = [Expectation(model="sft", metric="loss", **bounds)]
    if said is None:
        compare.check(expect, scores)
        return
    with pytest.raises(DataError) as stopped:
        compare.check(expect, scores)
    assert said in str(stopped.value)


@pytest.mark.parametrize(
    ("expect", "said"),
    [
        (
            {"model": "bse", "metric": "loss", "at_least": 1},
            "the model «bse», which is not evaluated; did you mean «base»",
        ),
        (
            {"model": "base", "metric": "los", "at_least": 1},
            "the metric «los», which is not evaluated; did you mean «loss»",
        ),
        ({"model": "base", "metric": "loss"}, "neither at_least nor at_most"),
        ({"model": "base", "metric": "loss", "at_least": 2, "at_most": 1}, "at_least 2 is above at_most 1"),
        ({"model": "base", "metric": "loss", "at_lest": 2}, "did you mean «at_least»"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(
    expect: dict[str, Any], said: str, tmp_path: Path
) -> None:
    file = recipe(tmp_path, "org/model", expect)
    with pytest.raises(RecipeError) as refused:
        recipes.load(file)
    assert said in str(refused.value) and "expecting.yaml:1" in str(refused.value)
