"""Trackers: what a recipe may say of them, and what they have of a run, read back from what they wrote themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import temper
import temper.stages
from staged_runs import Workshop, copy_stages, lines_of, weights
from temper import cli, pipeline
from temper import recipe as recipes
from temper.errors import RecipeError
from temper.job import Log
from temper.runfolder import read_json
from temper.trackers import Asked, asked
from temper.tracking.contents import Contents
from temper.tracking.memory import Memory, alone
from temper.tracking.start import Followers
from tracked import (
    ByHand,
    Series,
    clearml_session,
    items,
    logged,
    recipe,
    tensorboard_series,
    wandb_records,
)

OFFLINE = ["tensorboard", {"wandb": {"mode": "offline"}}, {"clearml": {"mode": "offline"}}]
BOARD = Asked("tensorboard", {"wait": 60.0})


@pytest.fixture(scope="session")
def tracked_run(once: Callable[[str, Callable[[Path], None]], Path], words_model: Path) -> Path:
    """The run with three trackers; then the same command again, and the same run sent once more."""

    def build(path: Path) -> None:
        file = recipe(path, words_model, OFFLINE)
        temper.run(file, out=path / "run", quiet=True)
        shutil.copytree(path / "run" / "trackers", path / "first")
        temper.run(file, out=path / "run", quiet=True)
        assert cli.main(["track", str(path / "run")]) == 0

    return once("tracked-run", build) / "run"


def close(found: Series, wanted: Series) -> None:
    """The same steps in the same order, and the same values but for float32."""
    assert set(found) >= set(wanted)
    for name, points in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [v for _, v in found[name]] == pytest.approx([v for _, v in points], rel=1e-6), name


# ── what a recipe may say ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("entry", "what", "do"),
    [
        ("mlfow", "there is no tracker «mlfow»", "did you mean «mlflow»?"),
        ({"mlflow": {"ulr": "x"}}, "tracker «mlflow» has no option «ulr»", "did you mean «url»?"),
        ({"wandb": {"mode": "off"}}, "tracker «wandb»: mode = 'off' does not fit", "it takes: online | offline"),
        ({"mlflow": {"url": "http://me:secret@host"}}, "url holds a password", "environment variables"),
        ({"mlflow": {}, "wandb": {}}, "one name with its options", "- mlflow: {url: …}"),
        ({"tensorboard": {"wait": -1}}, "wait = -1 does not fit", "≥ 0"),
    ],
)
def test_wrong_trackers_are_told_before_anything_runs(entry: Any, what: str, do: str, tmp_path: Path) -> None:
    file = recipe(tmp_path, tmp_path, [])
    file.write_text(f"trackers:\n  - {json.dumps(entry)}\n" + "".join(
        f"{k}: {json.dumps(v)}\n" for k, v in json.loads(file.read_text()).items() if k != "trackers"
    ))  # fmt: skip
    with pytest.raises(RecipeError) as error:
        recipes.load(file)
    assert what in error.value.what and do in error.value.do, error.value
    assert error.value.where in (f"{file}:1", f"{file}:2") and "secret" not in str(error.value)


def test_a_tracker_stands_once() -> None:
    with pytest.raises(RecipeError, match="«wandb» stands twice"):
        asked(["wandb", {"wandb": {"mode": "offline"}}], {}, "r.yaml")


def test_defaults_are_filled_in() -> None:
    [one] = asked([{"mlflow": None}], {}, "r.yaml")
    assert one == Asked("mlflow", {"url": None, "experiment": None, "models": "best", "wait": 60.0})


def test_what_is_missing_is_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words_model: Path
) -> None:
    """No package, or no server."""
    file = recipe(tmp_path, words_model, ["mlflow"])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RecipeError, match="not told of its server") as error:
        temper.run(file, out=tmp_path / "run", quiet=True)
    assert "set MLFLOW_TRACKING_URI" in error.value.do
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="needs the package mlflow") as error:
        temper.run(file, out=tmp_path / "run", quiet=True)
    assert error.value.do == """pip install "temper-lm[mlflow]", or do without trackers: --set 'trackers=[]'"""
    assert not (tmp_path / "run").exists()


def test_trackers_are_in_no_key(tmp_path: Path, words_model: Path) -> None:
    def keys(trackers: list[Any]) -> dict[str, str]:
        loaded, found = recipes.load(recipe(tmp_path, words_model, trackers)), dict[str, str]()
        for name in recipes.order(loaded):
            found[name] = pipeline.key_of(loaded, name, found)
        return found

    assert keys([]) == keys(OFFLINE)


# ── what they have ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_is_the_same_with_trackers(tracked_run: Path, plain_run: Path) -> None:
    assert weights(tracked_run) == weights(plain_run) != {}
    for stage in ("sft", "weak"):
        assert lines_of(tracked_run / stage / "metrics.jsonl") == lines_of(plain_run / stage / "metrics.jsonl") != []


def test_nothing_is_sent_twice(tracked_run: Path) -> None:
    """Not by the same command again, whose stages are all cached, and not by `temper track`."""
    for name in ("tensorboard", "wandb", "clearml"):
        first = read_json(tracked_run.parent / "first" / f"{name}.json")
        assert read_json(tracked_run / "trackers" / f"{name}.json") == first
        assert first["problem"] is None and first["runs"][0]["outcome"] == "finished"
        [sent] = first["runs"]
        assert sent["points"] == sum(map(len, logged(tracked_run).values())) > 100


def test_tensorboard_has_every_number(tracked_run: Path) -> None:
    found = tensorboard_series(tracked_run / "trackers" / "tensorboard" / "1")
    close(found, logged(tracked_run))
    evaluation = read_json(tracked_run / "compare" / "evaluation.json")
    loss = evaluation["models"]["sft"]["loss"]
    for part, name in (("value", ""), ("low", "/low"), ("high", "/high")):
        assert found[f"compare/sft/loss{name}"] == [(0, pytest.approx(loss[part]))]
    [one] = [c for c in evaluation["comparisons"] if (c["metric"], c["a"], c["b"]) == ("loss", "base", "sft")]
    assert found["compare/sft - base/loss/difference"][0][1] == pytest.approx(one["difference"])
    assert found["cost/sft/seconds"][0][1] == pytest.approx(read_json(tracked_run / "sft" / "stage.json")["seconds"])


def test_tensorboard_has_settings_and_texts(tracked_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    read = EventAccumulator(str(tracked_run / "trackers" / "tensorboard" / "1"), {"tensors": 0})
    read.Reload()
    content = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["sft.lr"].number_value == 1e-2 and settings["seed"].number_value == 20
    assert settings["sft.schedule"].string_value == "cosine"  # a default, too
    for tag, part in (
        ("report/report.md", "|"), ("recipe.yaml", "tracked"), ("sft/samples", "completion"), ("about", "packages.torch"),
    ):  # fmt: skip
        assert part in read.Tensors(tag)[0].tensor_proto.string_val[0].decode(), tag


def test_wandb_has_every_number_and_file(tracked_run: Path) -> None:
    found: Series = {}
    rows: list[int] = []
    settings, summary, artifacts = {}, {}, {}
    for record in wandb_records(tracked_run / "trackers" / "wandb"):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = items(record.history.item)
            rows.append(row["_step"])
            for name, value in row.items():
                step = row.get(f"{name.rpartition('/')[0]}/step")
                if step is not None and not name.endswith("/step"):
                    found.setdefault(name, []).append((step, value))
        elif kind == "config":
            settings |= items(record.config.update)
        elif kind == "run":
            settings |= items(record.run.config.update)
            assert (record.run.project, record.run.display_name) == ("tracked", "run")
        elif kind == "summary":
            summary |= items(record.summary.update)
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            made = record.request.log_artifact.artifact
            artifacts[made.name] = (made.type, [e.path for e in made.manifest.contents])
        elif kind == "artifact":
            artifacts[record.artifact.name] = (
                record.artifact.type,
                [e.path for e in record.artifact.manifest.contents],
            )
    close(found, logged(tracked_run))
    assert rows == list(range(len(rows)))
    assert settings["sft.lr"] == 1e-2 and settings["sft.adapter.r"] == 4 and settings["about"]["packages.torch"]
    loss = read_json(tracked_run / "compare" / "evaluation.json")["models"]["sft"]["loss"]["value"]
    assert summary["compare/sft/loss"] == pytest.approx(loss)
    assert artifacts["run-report-index.html"] == ("file", ["report/index.html"])
    assert {"run-recipe.yaml", "run-report-results.json", "run-sft-samples.jsonl"} <= set(artifacts)
    assert "adapter_model.safetensors" in artifacts["run-model-sft"][1]  # the best one alone
    assert [name for name in artifacts if "model" in name] == ["run-model-sft"]


def test_wandb_took_nothing_by_itself(tracked_run: Path) -> None:
    folder = tracked_run / "trackers" / "wandb"
    files = {p.name for p in folder.glob("offline-run-*/files/**/*") if p.is_file()}
    assert not files & {"requirements.txt", "wandb-metadata.json", "output.log", "diff.patch", "conda-environment.yaml"}
    kinds = {record.WhichOneof("record_type") for record in wandb_records(folder)}
    assert not kinds & {"stats", "output", "output_raw"}


def test_clearml_has_every_number_and_file(tracked_run: Path) -> None:
    task, reports, files = clearml_session(tracked_run / "trackers" / "clearml")
    found: Series = {}
    single: dict[str, float] = {}
    for r in reports:
        if r["type"] == "training_stats_scalar" and r["metric"] == "Summary":
            single[r["variant"]] = r["value"]
        elif r["type"] == "training_stats_scalar":
            found.setdefault(r["metric"], []).append((r["iter"], r["value"]))
    close(found, logged(tracked_run))
    assert {r["metric"] for r in reports if r["type"] == "plot"} == {"sft/samples", "weak/samples"}
    loss = read_json(tracked_run / "compare" / "evaluation.json")["models"]["sft"]["loss"]["value"]
    assert single["compare/sft/loss"] == pytest.approx(loss)
    settings = {name: entry["value"] for name, entry in task["hyperparams"]["General"].items()}
    assert (settings["sft.lr"], settings["sft.adapter.r"], settings["seed"]) == ("0.01", "4", "20")
    names = {artifact["key"] for artifact in task["execution"]["artifacts"]}
    assert {"report/index.html", "report/report.md", "report/results.json", "recipe.yaml", "models/sft"} <= names
    assert any(name.endswith("/index.html") for name in files) and any("models" in name for name in files)
    assert not task.get("script", {}).get("diff") and "console" not in json.dumps(reports)


# ── resuming ────────────────────────────────────────────────────────────────────────────────────────────────────────


def follow(run: Path, *, until: Callable[[], bool] = lambda: True, patience: float = 60.0) -> Followers:
    """Followers of a run at work, once `until` holds."""
    import time

    followers = Followers([BOARD], run, Log(None, quiet=True))
    followers.start()
    ends = time.monotonic() + patience
    while not until():
        assert time.monotonic() < ends
        time.sleep(0.05)
    return followers


def has(run: Path, step: int) -> Callable[[], bool]:
    return lambda: any(sent.steps.get("sft/loss", 0) >= step for sent in Memory(run, "tensorboard").runs)


def losses(run: Path, number: int = 1) -> list[int]:
    return [step for step, _ in tensorboard_series(run / "trackers" / "tensorboard" / str(number))["sft/loss"]]


def test_steps_that_are_taken_again_are_not_sent_again(tmp_path: Path) -> None:
    """While the run goes on; lines that are not whole wait."""
    run = ByHand(tmp_path / "run")
    run.log(1, 2, 3, 4, 5)
    followers = follow(run.path, until=has(run.path, 5))
    run.go_back(2)
    with open(run.partial / "metrics.jsonl", "a") as out:
        out.write('{"step": 3, "lo')
    assert followers.finish(stopped=False)
    again = follow(run.path)
    run.go_back(2)
    run.log(3, 4, 5, 6)
    run.end()
    assert again.finish()
    assert losses(run.path) == [1, 2, 3, 4, 5, 6]
    [sent] = Memory(run.path, "tensorboard").runs
    assert sent.outcome == "finished" and sent.points == 6


def test_other_results_are_another_run_and_old_ones_go_on(tmp_path: Path) -> None:
    first = ByHand(tmp_path / "run")
    first.log(1, 2)
    assert follow(first.path).finish()
    shutil.move(first.partial, tmp_path / "aside")
    second = ByHand(first.path, key="b" * 64, lr=0.2)
    second.log(1, 2, 3)
    assert follow(first.path).finish()
    shutil.rmtree(second.partial)
    shutil.move(tmp_path / "aside", first.partial)
    (first.path / "manifest.json").write_text(json.dumps(first.manifest))
    first.log(3, 4)
    first.end()
    assert follow(first.path).finish()
    assert losses(first.path, 1) == [1, 2, 3, 4] and losses(first.path, 2) == [1, 2, 3]


def test_a_killed_run_leaves_no_step_twice(forks: Workshop, smoke_run: Path, tmp_path: Path) -> None:
    run = copy_stages(smoke_run, tmp_path / "run", "corpus", "tiny", "news")
    settings = {"max_steps": 8, "checkpoint_every": 3, "samples": 0, "lr": 1e-3}
    how: dict[str, Any] = {"overrides": {"trackers": ["tensorboard"], "stages": {"sft": settings}}, "only": ["sft"]}
    ended = forks.run(run, die_at="step 6 in sft.partial/metrics.jsonl", **how)
    assert ended["status"] < 0
    assert forks.run(run, **how)["status"] == 0
    close(tensorboard_series(run / "trackers" / "tensorboard" / "1"), {"sft/loss": logged(run)["sft/loss"]})
    [sent] = Memory(run, "tensorboard").runs
    assert sent.outcome == "finished"


def test_one_process_sends_a_run_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ByHand(tmp_path / "run")
    (run.path / "trackers").mkdir()
    with alone(run.path, "tensorboard") as mine:
        assert mine
        assert cli.main(["track", str(run.path), "--to", "tensorboard"]) == 1
    assert "another process is sending this run" in " ".join(capsys.readouterr().out.split())


# ── what is sent of what ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_best_model_is_that_of_the_last_evaluation(tracked_run: Path) -> None:
    contents = Contents(tracked_run)
    contents.look()
    values = {
        m: s["loss"]["value"] for m, s in read_json(tracked_run / "compare" / "evaluation.json")["models"].items()
    }
    assert values["sft"] < values["weak"]
    assert contents.models("best") == [("sft", tracked_run.resolve() / "sft" / "adapter")] or contents.models(
        "best"
    ) == [("sft", tracked_run / "sft" / "adapter")]
    assert [name for name, _ in contents.models("all")] == ["sft", "weak"] and contents.models("none") == []
    contents.stages = [stage for stage in contents.stages if stage.name != "compare"]
    assert [name for name, _ in contents.models("best")] == ["weak"]  # the last one made


def test_scores_of_a_sweep_stand_over_its_trials(tmp_path: Path) -> None:
    run = ByHand(tmp_path / "run")
    value = {"value": 1.5, "low": 1.0, "high": 2.0}
    trials = [
        {"number": n, "settings": {"sft.lr": 0.1 * n}, "values": {"c.sft.loss": value}, "state": state}
        for n, state in ((1, "done"), (0, "failed"), (2, "running"), (3, "done"))
    ]
    (run.partial / "trials.json").write_text(json.dumps({"trials": trials}))
    contents = Contents(run.path)
    contents.look()
    [item] = [i for i in contents.news({}, {}, "best", final=True) if i.what == "points"]
    assert [tuple(p) for p in item.args[0]] == [("sft/c.sft.loss", 1, 1.5), ("sft/sft.lr", 1, 0.1)]


def test_policies_are_series_of_their_own_and_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    run = ByHand(tmp_path / "run")
    lines = ['{"policy": "1.2", "step": 3, "loss": 0.5, "best": true, "kl": null, "x": NaN}', "[1]", "{"]
    (run.partial / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    contents = Contents(run.path)
    contents.look()
    assert [tuple(p) for p in contents._points(contents.stages[0])] == [("sft/1.2/loss", 3, 0.5)]
    assert list(contents._points(contents.stages[0])) == []  # read on from where it was


def test_trackers_need_no_torch(tmp_path: Path) -> None:
    """A process that follows a run takes little beside it."""
    code = "import sys, temper.tracking.follow; print(sorted({'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.strip() == "[]"
