"""Learning curves: what a line of trials says, held against a paired test by scipy; a real sweep over shares and steps; the page."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import permutation_test
from transformers import LlamaConfig, LlamaForCausalLM

from temper.app import run_recipe
from temper.errors import RecipeError
from temper.pipeline import Choice
from temper.report import build
from temper.runfolder import read_json, write_json
from temper.stages import learning
from temper.stages.pretrain import Shape, train_tokenizer
from temper.stages.space import Measure
from temper.stages.training import shared
from temper.types import Record

ROWS = 10  # 1,024 swaps: all are tried
RNG = np.random.default_rng(3)
START = RNG.uniform(2.0, 3.0, ROWS)
TOKENS = RNG.integers(3, 30, ROWS)


def evaluated(folder: Path, rows: np.ndarray, *, sha: str = "a", metric: str = "loss") -> Path:
    """The folder of an evaluation of one model, `sft`."""
    value = float((rows * TOKENS).sum() / TOKENS.sum()) if metric == "loss" else float(rows.mean())
    entry = {
        "value": value, "low": value - 0.1, "high": value + 0.1, "n": ROWS, "signature": f"{metric}|x",
        "higher_is_better": metric != "loss",
    }  # fmt: skip
    folder.mkdir(parents=True)
    write_json(folder / "evaluation.json", {"data": {"sha256": sha}, "models": {"sft": {metric: entry}}})
    pq.write_table(pa.table({f"sft|{metric}": rows, "sft|tokens": TOKENS}), folder / "rows.parquet")
    return folder


def drawn(folder: Path, points: dict[float, np.ndarray], *, metric: str = "loss", **more: Any) -> dict[str, Any]:
    """curve.json of trials with these scores of rows."""
    folders = {k: evaluated(folder / str(k), rows, metric=metric, **more) for k, rows in enumerate(points.values())}
    trials = [{"number": k, "settings": {"sft.share": x}} for k, x in enumerate(points)]
    return learning.curves(["sft.share"], Measure("compare", "sft", metric), trials, folders, seed=5)


def line(found: dict[str, Any]) -> dict[str, Any]:
    [curve] = found["curves"]
    [only] = curve["lines"]
    return only


def test_more_helps_up_to_a_half(tmp_path: Path) -> None:
    """0.125 and 0.25 are clearly worse than all of it, 0.5 is not."""
    noise = [RNG.normal(0, 0.02, ROWS) for _ in range(4)]
    scores = {
        1.0: START - 1.0 + noise[0],
        0.125: START + noise[1],
        0.25: START - 0.4 + noise[2],
        0.5: START - 1.0 + noise[3],
    }
    found = line(drawn(tmp_path, scores))
    assert [p["x"] for p in found["points"]] == [0.125, 0.25, 0.5, 1.0] and found["stops"] == 0.5
    assert "More than sft.share 0.5 shows no further change in loss" in found["finding"]
    last = scores[1.0] * TOKENS / TOKENS.sum()
    for point, p_adjusted in zip(found["points"][:-1], [3, 3, 1], strict=True):
        this = scores[point["x"]] * TOKENS / TOKENS.sum()
        expected = permutation_test(
            (last, this), lambda a, b: a.sum() - b.sum(), permutation_type="samples", n_resamples=np.inf
        )
        assert point["difference"] == pytest.approx(expected.statistic) and point["p"] == pytest.approx(expected.pvalue)
        assert point["p_adjusted"] == pytest.approx(p_adjusted * point["p"]) or p_adjusted == 3
    assert found["points"][-1].get("p") is None


def test_more_still_helps_and_more_harms(tmp_path: Path) -> None:
    found = line(drawn(tmp_path / "a", {0.5: START, 1.0: START - 0.5 + RNG.normal(0, 0.01, ROWS)}))
    assert found["stops"] is None and "loss still gets better from sft.share 0.5 to 1" in found["finding"]
    found = line(drawn(tmp_path / "b", {0.5: START, 1.0: START - 0.5 + RNG.normal(0, 0.01, ROWS)}, metric="margin"))
    assert found["stops"] is None and "margin gets worse from sft.share 0.5 to 1" in found["finding"]
    found = line(drawn(tmp_path / "c", {0.5: START, 1.0: RNG.permutation(START)}))
    assert found["stops"] == 0.5 and "shows no effect on loss" in found["finding"]


def test_what_cannot_be_tested_says_why(tmp_path: Path) -> None:
    found = line(drawn(tmp_path / "one", {1.0: START}))
    assert found["stops"] is None and "one point alone" in found["finding"]
    folders = {0: evaluated(tmp_path / "0", START, sha="a"), 1: evaluated(tmp_path / "1", START, sha="b")}
    trials = [{"number": k, "settings": {"sft.share": x}} for k, x in enumerate((0.5, 1.0))]
    found = line(learning.curves(["sft.share"], Measure("compare", "sft", "loss"), trials, folders, seed=5))
    assert "different rows" in found["finding"] and [p.get("p") for p in found["points"]] == [None, None]


def test_other_settings_make_lines_of_their_own(tmp_path: Path) -> None:
    trials = [
        {"number": 2 * k + j, "settings": {"sft.share": x, "sft.lr": lr}}
        for k, x in enumerate((0.5, 1.0))
        for j, lr in enumerate((1, 2))
    ]
    folders = {t["number"]: evaluated(tmp_path / str(t["number"]), START - t["number"]) for t in trials}
    found = learning.curves(["sft.share"], Measure("compare", "sft", "loss"), trials, folders, seed=5)
    assert [entry["others"] for entry in found["curves"][0]["lines"]] == ["sft.lr 1", "sft.lr 2"]
    tested = [p for entry in found["curves"][0]["lines"] for p in entry["points"] if p.get("p") is not None]
    assert [p["p_adjusted"] for p in tested] == [pytest.approx(2 * p["p"]) for p in tested]  # together, by Holm


@pytest.mark.parametrize(
    ("fields", "space", "search", "said"),
    [
        (["sft.lr"], {"sft.share": [0.5, 1.0]}, "grid", "is not varied"),
        (["sft.share"], {"sft.share": [1.0]}, "grid", "needs numbers"),
        (["sft.share"], {"sft.share": [0.5, None]}, "grid", "needs numbers"),
        (["sft.share"], {"sft.share": [0.5, 1.0]}, "tpe", "needs a grid"),
    ],
)
def test_what_cannot_be_drawn_is_told(fields: list[str], space: dict[str, Any], search: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        learning.check(fields, space, search)


def test_a_smaller_share_is_part_of_a_larger_one() -> None:
    records = [Record({"text": str(n)}, f"f:{n}") for n in range(40)]
    parts = [shared(records, share, 7) for share in (0.01, 0.25, 0.5, 1.0)]
    assert [len(part) for part in parts] == [1, 10, 20, 40] and parts[-1] == records
    texts = [[int(r.row["text"]) for r in part] for part in parts]
    assert all(set(a) <= set(b) and b == sorted(b) for a, b in itertools.pairwise(texts))
    assert texts[1] != [int(r.row["text"]) for r in shared(records, 0.25, 8)] and max(texts[1]) > 20


def test_the_curve_is_on_the_page_in_markdown_and_in_json(tmp_path: Path) -> None:
    scores = {0.125: START, 0.5: START - 0.5 + RNG.normal(0, 0.01, ROWS), 1.0: START - 0.5 + RNG.normal(0, 0.01, ROWS)}
    found = drawn(tmp_path / "trials", scores)
    run = tmp_path / "run"
    (run / "grow").mkdir(parents=True)
    write_json(run / "grow" / "curve.json", found)
    write_json(run / "grow" / "stage.json", {"name": "grow", "kind": "sweep", "key": "k"})
    write_json(run / "manifest.json", {"recipe": "r", "stages": [{"name": "grow"}]})
    page = build([run]).read_text("utf-8")
    assert "Learning curves" in page and line(found)["finding"].split(":")[0] in page
    plot = page.partition('aria-label="loss over sft.share"')[2].partition("</svg>")[0]
    assert plot.count("<circle") == 4 and plot.count('class="bar') == 3  # three points and a ring
    assert "More than sft.share 0.5" in (run / "report" / "report.md").read_text("utf-8")
    assert json.loads((run / "report" / "results.json").read_text())["curves"] == {"grow": found}


RECIPE = {
    "qa": {"stage": "data", "source": "qa.jsonl", "prompt": "{q}", "completion": "{a}", "test": 10, "validation": 0,
           "near_leaks": False, "drop": {"duplicates": "off"}},
    "sft": {"stage": "sft", "data": "qa", "lr": 3e-3, "batch_size": 4, "max_steps": 8},
    "compare": {"stage": "evaluate", "models": ["base", "sft"], "data": "qa", "metrics": ["loss"], "resamples": 100},
    "grow": {"stage": "sweep", "vary": {"sft.share": [0.25, 1.0], "sft.max_steps": [1, 8]},
             "curve": ["sft.share", "sft.max_steps"], "measure": "compare.sft.loss", "best": "lowest"},
}  # fmt: skip


def test_a_sweep_over_shares_and_steps(tmp_path: Path) -> None:
    """The points are the trials' values, a share trains on so many rows, and more steps help on a model that knows nothing."""
    texts = [{"q": f"What is {n} and {n}?", "a": f"It is {2 * n}."} for n in range(30)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    tokenizer = train_tokenizer([" ".join(row.values()) for row in texts], Shape(vocabulary=300))
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            **ends,
        )
    )
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    recipe = {"name": "r", "model": str(tmp_path / "tiny"), "threads": 1, "stages": RECIPE}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    run_recipe(str(tmp_path / "r.yaml"), out=tmp_path / "run", choice=Choice(only=["grow"]), quiet=True)
    grow = tmp_path / "run" / "grow"
    trials, found = read_json(grow / "trials.json")["trials"], read_json(grow / "curve.json")
    values = {
        (t["settings"]["sft.share"], t["settings"]["sft.max_steps"]): t["values"]["compare.sft.loss"]["value"]
        for t in trials
    }
    shares, steps = found["curves"]
    assert (shares["field"], steps["field"]) == ("sft.share", "sft.max_steps")
    assert {
        (p["x"], int(entry["others"].split()[-1])): p["value"] for entry in shares["lines"] for p in entry["points"]
    } == values
    assert {
        (float(entry["others"].split()[-1]), p["x"]): p["value"] for entry in steps["lines"] for p in entry["points"]
    } == values
    assert all("still gets better from sft.max_steps 1 to 8" in entry["finding"] for entry in steps["lines"])
    whole = read_json(tmp_path / "run" / "qa" / "card.json")["splits"]["train"]
    for trial in trials:
        info = (
            read_json(grow / trial["folder"] / "sft" / "stage.json")
            if (grow / trial["folder"] / "sft").is_dir()
            else None
        )
        assert info is None or info["examples"] == round(trial["settings"]["sft.share"] * whole)
    assert any((grow / t["folder"] / "sft").is_dir() for t in trials)
    page = (tmp_path / "run" / "report" / "index.html").read_text("utf-8")
    assert page.count("loss over sft.share") >= 1 and page.count("loss over sft.max_steps") >= 1
