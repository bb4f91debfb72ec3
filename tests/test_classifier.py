"""The classifier stage: what it trains, what it saves, what it refuses; and toxicity in an evaluation."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import temper
from staged_runs import Workshop, copy_stages, lines_of, weights
from temper.data import mini
from temper.errors import DataError, RecipeError
from temper.hub import Source
from temper.models.classify import Classifier
from temper.runfolder import read_json
from temper.stages.classifier import area_under_curve

ROWS = {
    "stage": "data", "source": "mini:uk-toxic-sentences", "split": "train", "take": 60, "text": "{text}", "label": "{label}",
    "validation": 12, "test": 12, "near_leaks": False,
}  # fmt: skip
JUDGE = {
    "stage": "classifier", "data": "rows", "batch_size": 8, "lr": 2e-3, "evaluate_every": 3, "max_steps": None,
}  # fmt: skip
TOXIC = {"data": "news", "metrics": ["rougeL", "toxicity", {"lexicon": {"words": "mini"}}], "classifier": "judge"}


def recipe(stages: dict[str, Any]) -> dict[str, Any]:
    """Overrides of the smoke recipe: a classifier of rows of its own, and further stages."""
    return {"threads": 1, "stages": {"rows": ROWS, "judge": JUDGE} | stages}


@pytest.fixture(scope="module")
def judged(once: Callable[[str, Callable[[Path], None]], Path], smoke_run: Path, forks: Workshop) -> Path:
    """The smoke run with a classifier, and an evaluation that asks it of two samples a prompt."""
    compare = {**TOXIC, "models": ["base"], "samples": 2, "decoding": {"max_new_tokens": 8, "temperature": 1.0}}

    def build(path: Path) -> None:
        copy_stages(smoke_run, path, "corpus", "tiny", "news")
        ended = forks.run(path, recipe({"compare": compare}), only=["compare"])
        assert ended["status"] == 0, ended["traceback"]

    return once("judged-run", build)


def test_what_is_saved_scores_alike_in_transformers_alone_and_in_a_batch(judged: Path) -> None:
    folder = judged / "judge" / "model"
    texts = [row["text"] for row in mini.load("uk-toxic-sentences", split="test", rows=6)]
    ours = Classifier.open(Source(str(folder))).probability(texts)
    model, tok = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.config.id2label == {0: "clean", 1: "toxic"} and model.config.pad_token_id == tok.pad_token_id
    with torch.no_grad():
        alone = [model(**tok(t, return_tensors="pt")).logits.softmax(-1)[0, 1].item() for t in texts]
        batch = model(**tok(texts, padding=True, return_tensors="pt")).logits.softmax(-1)[:, 1].tolist()
    assert ours == pytest.approx(alone, abs=1e-6) and ours == pytest.approx(batch, abs=1e-6)
    assert np.ptp(ours) > 1e-3


def test_accuracy_is_of_rows_that_were_not_trained_on(judged: Path) -> None:
    info = read_json(judged / "judge" / "stage.json")
    judge = Classifier.open(Source(str(judged / "judge" / "model")))
    for split in ("validation", "test"):
        table = pyarrow.parquet.read_table(judged / "rows" / "data" / f"{split}.parquet").to_pylist()
        found = judge.probability([row["text"] for row in table])
        toxic = np.array([row["label"] == "toxic" for row in table])
        assert info["facts"][f"{split} accuracy"] == pytest.approx(((found > 0.5) == toxic).mean(), abs=1e-4)
        pairs = [(a > b) + (a == b) / 2 for a in found[toxic] for b in found[~toxic]]
        assert info["facts"][f"{split} area under the curve"] == pytest.approx(np.mean(pairs), abs=1e-4)
        assert f"{split}: " in info["summary"]


def test_the_loss_is_the_mean_of_minus_log_p(judged: Path) -> None:
    """The last validation loss of the best weights, by hand from what was saved."""
    lines = lines_of(judged / "judge" / "metrics.jsonl")
    best = min(x["validation_loss"] for x in lines if "validation_loss" in x)
    table = pyarrow.parquet.read_table(judged / "rows" / "data" / "validation.parquet").to_pylist()
    judge = Classifier.open(Source(str(judged / "judge" / "model")))
    p = judge.probabilities([row["text"] for row in table])
    right = [judge.labels.index(row["label"]) for row in table]
    assert best == pytest.approx(-np.log(p[np.arange(len(p)), right]).mean(), abs=1e-5)
    first = next(x["loss"] for x in lines if "loss" in x)
    assert 0.3 < first < 1.5  # a fresh head: about ln 2


def test_an_evaluation_has_the_classifiers_numbers(judged: Path) -> None:
    entry = read_json(judged / "compare" / "evaluation.json")["models"]["base"]
    rows = pyarrow.parquet.read_table(judged / "compare" / "rows.parquet").to_pydict()
    judge = Classifier.open(Source(str(judged / "judge" / "model")))
    seen = judge.probability(rows["base|prediction"])
    assert rows["base|toxicity_mean"] == pytest.approx(seen, abs=1e-6)
    expected = {"mean": seen.mean(), "p95": np.quantile(seen, 0.95), "max": seen.max(), "share": (seen > 0.5).mean()}
    for name, value in expected.items():
        assert entry[f"toxicity_{name}"]["value"] == pytest.approx(value, abs=1e-6)
        assert entry[f"toxicity_{name}"]["higher_is_better"] is False
    assert entry["toxicity_max"]["low"] is None and entry["toxicity_p95"]["low"] <= expected["p95"]
    highest = np.array(rows["base|toxicity_expected_max"])
    first = np.array(rows["base|toxicity_mean"])  # of the same pass: other company rounds otherwise
    assert (highest >= first).all() and (highest > first + 1e-6).any()
    assert entry["toxicity_expected_max"]["value"] == pytest.approx(highest.mean())
    assert "of:2" in entry["toxicity_expected_max"]["signature"]
    assert "lexicon" in entry and "no test" not in (judged / "report" / "report.md").read_text()


def test_a_cut_run_ends_as_one_that_was_not(forks: Workshop, judged: Path, tmp_path: Path) -> None:
    stages = {"judge": {**JUDGE, "adapter": {"r": 4, "dropout": 0.1}, "checkpoint_every": 2}}
    how: dict[str, Any] = {"overrides": recipe(stages), "only": ["judge"]}
    whole = copy_stages(judged, tmp_path / "whole", "corpus", "tiny", "rows")
    ended = forks.run(whole, **how)
    assert ended["status"] == 0, ended["traceback"]
    moments = [m for m in ended["moments"] if "step-4" in m or "best-3" in m or "judge.partial/model" in m]
    folder = copy_stages(judged, tmp_path / "cut", "corpus", "tiny", "rows")
    died = [forks.run(folder, die_at=moment, **how)["status"] for moment in moments[:: max(1, len(moments) // 4)]]
    assert died.count(-signal.SIGKILL) >= 3
    assert forks.run(folder, **how)["status"] == 0
    assert weights(folder) == weights(whole)
    assert lines_of(folder / "judge" / "metrics.jsonl") == lines_of(whole / "judge" / "metrics.jsonl")
    # the head, which no base has, was trained beside the adapter and saved; the adapter is in the body
    saved, base = (
        load_file(whole / "judge" / "model" / "model.safetensors"),
        AutoModelForCausalLM.from_pretrained(whole / "tiny" / "model").state_dict(),
    )
    assert "score.weight" in saved and not any("lora" in name for name in saved)
    assert not torch.equal(
        saved["model.layers.0.self_attn.q_proj.weight"], base["model.layers.0.self_attn.q_proj.weight"]
    )
    assert torch.equal(saved["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_training_from_an_encoder_learns(tmp_path: Path, judged: Path) -> None:
    """A fresh encoder on a task of one word: all right on rows it has not seen."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    tok = AutoTokenizer.from_pretrained(judged / "tiny" / "model")
    torch.manual_seed(0)
    shape = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64}
    config = DistilBertConfig(vocab_size=len(tok), pad_token_id=tok.pad_token_id, **shape)
    DistilBertForMaskedLM(config).save_pretrained(tmp_path / "encoder")
    tok.save_pretrained(tmp_path / "encoder")
    draw = np.random.default_rng(0)
    words = ["дощ", "сніг", "вітер", "ранок", "вечір", "місто", "поле", "ріка"]
    rows = [{"t": f"{' '.join(draw.choice(words, 3))} {w}", "y": w} for w in draw.choice(["так", "ні"], 160)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel: ./encoder\nthreads: 1\nstages:\n"
        '  rows: {stage: data, source: rows.jsonl, text: "{t}", label: "{y}", validation: 20, test: 30, drop: {duplicates: exact}}\n'
        "  judge: {stage: classifier, data: rows, epochs: 6, batch_size: 8, lr: 3e-3, micro_tokens: 64}\n"
    )
    folder = temper.run(tmp_path / "r.yaml", out=tmp_path / "out", quiet=True)
    facts = read_json(folder / "judge" / "stage.json")["facts"]
    assert facts["test accuracy"] >= 0.95 and "padded together" in facts["proof"]
    assert "DistilBertForSequenceClassification" in (folder / "judge" / "model" / "config.json").read_text()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([("a", "x"), ("b", "x"), ("c", "x")], "all 3 training rows have the label «x»"),
        ([("a", "x"), ("b", "x"), ("c", "y")], "«y» has a single training row"),
        ([("a", "x"), ("b", "x"), ("c", " "), ("d", "y")], "has no label"),
        ([("a", None)], "reads the columns «text» and «label»"),
    ],
)
def test_rows_that_no_classifier_can_learn_from(
    lines: list[tuple[str, str | None]], says: str, tmp_path: Path, judged: Path
) -> None:
    rows = [{"t": t} | ({} if y is None else {"y": y}) for t, y in lines]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    label = "" if lines[0][1] is None else 'label: "{y}", '
    (tmp_path / "r.yaml").write_text(
        f"name: r\nmodel: {judged / 'tiny' / 'model'}\nstages:\n"
        f'  rows: {{stage: data, source: rows.jsonl, text: "{{t}}", {label}validation: 0, test: 0}}\n'
        "  judge: {stage: classifier, data: rows}\n"
    )
    with pytest.raises(DataError, match=says):
        temper.run(tmp_path / "r.yaml", out=tmp_path / "out", quiet=True)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"classifier": None}, "ask a classifier, and none is named"),
        ({"classifier": "judgge"}, "did you mean «judge»"),
        ({"classifier": "rows"}, "«rows» gives no classifier"),
        ({"classifier": "base"}, "the base model is no classifier"),
        ({"metrics": ["rougeL"]}, "no metric asks it"),
        ({"samples": 4}, "temperature 0"),
        ({"metrics": ["rougeL"], "classifier": None, "samples": 4}, "only the metric «toxicity»"),
        ({"metrics": [{"lexicon": {"words": ["…"]}}], "classifier": None}, "gives no score"),
        ({"models": ["judge"]}, "«judge» gives no model"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_runs(fields: dict[str, Any], says: str, tmp_path: Path) -> None:
    overrides = recipe({"compare": {"models": ["base"], **TOXIC, **fields}})
    with pytest.raises(RecipeError, match=says):
        temper.run("detox-summarization", overrides, profile="smoke", out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_area_under_the_curve_by_hand() -> None:
    assert area_under_curve(np.array([0.9, 0.2, 0.8]), np.array([True, False, True])) == 1
    assert area_under_curve(np.array([0.5, 0.5]), np.array([True, False])) == 0.5
