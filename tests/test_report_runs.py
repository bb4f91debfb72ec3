"""Several runs in one report: models of one name tested against each other, and why some cannot be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import permutation_test

from temper.report import build
from temper.report.across import notices, results, settings, view
from temper.report.paired import between
from temper.report.read import read_run

ROWS = 12  # 4,096 swaps: all are tried, so p is a number without chance
RNG = np.random.default_rng(5)
GOOD = RNG.uniform(0.2, 0.4, ROWS)
BETTER = GOOD + RNG.uniform(0.01, 0.09, ROWS)
BETTER[3] -= 0.12
GAPS = np.where(np.arange(ROWS) % 4 == 0, np.nan, GOOD)  # a metric that leaves rows out


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def a_run(
    folder: Path,
    scores: dict[str, dict[str, np.ndarray]],
    *,
    values: dict[str, float] | None = None,
    sha: str = "ab" * 32,
    signatures: dict[str, str] | None = None,
    prompt: str = "{}?",
    stages: dict[str, dict[str, Any]] | None = None,
    decoding: dict[str, Any] | None = None,
) -> Path:
    """A run with one evaluation. `values`: of metrics that are not the mean of their rows."""
    stages = {"compare": {}, **(stages or {})}
    table: dict[str, Any] = {
        "id": list(range(ROWS)), "prompt": [prompt.format(i) for i in range(ROWS)],
        "reference": [f"answer {i}" for i in range(ROWS)],
    }  # fmt: skip
    models: dict[str, Any] = {}
    for model, of_model in scores.items():
        table[f"{model}|prediction"] = ["text"] * ROWS
        for metric, rows in of_model.items():
            table[f"{model}|{metric}"] = rows
            value = (values or {}).get(metric, float(np.nanmean(rows)))
            models.setdefault(model, {})[metric] = {
                "value": value, "low": value - 0.0123, "high": value + 0.0123, "n": ROWS,
                "signature": (signatures or {}).get(metric, f"{metric}|mean"), "higher_is_better": metric != "loss",
            }  # fmt: skip
    write(folder / "compare" / "evaluation.json", {
        "data": {"name": "news.test", "rows": ROWS, "sha256": sha}, "decoding": decoding or {"max_new_tokens": 8},
        "models": models, "comparisons": [], "spread": {},
    })  # fmt: skip
    pq.write_table(pa.table(table), folder / "compare" / "rows.parquet")
    for name, config in stages.items():
        write(folder / name / "stage.json", {"name": name, "kind": "sft", "config": config, "key": name})
    write(folder / "manifest.json", {"recipe": "r", "seed": 7, "stages": [{"name": n} for n in stages]})
    return folder


def compared(*folders: Path) -> Any:
    return between([(f.name, read_run(f)) for f in folders], "compare")


def test_p_of_two_runs_is_scipys(tmp_path: Path) -> None:
    a = a_run(tmp_path / "a", {"sft": {"rougeL": GOOD, "distinct": GAPS}})
    b = a_run(tmp_path / "b", {"sft": {"rougeL": BETTER, "distinct": GAPS + 0.01}})
    made = compared(a, b).evaluation.comparisons
    said = {c.metric: c for c in made}
    assert [(c.a, c.b) for c in made] == [("a/sft", "b/sft")] * 2
    expected = permutation_test(
        (BETTER, GOOD), lambda x, y: np.mean(x) - np.mean(y), permutation_type="samples", n_resamples=np.inf
    )
    rouge, distinct = said["rougeL"], said["distinct"]
    assert rouge.difference == pytest.approx(np.mean(BETTER - GOOD)) and rouge.p == pytest.approx(expected.pvalue)
    assert 0 < rouge.p < 0.05 and rouge.low is not None and rouge.low < rouge.difference < (rouge.high or 0)
    # nine rows count; every one rises by the same, so only no swap and all swaps of the nine are as large
    assert distinct.difference == pytest.approx(0.01) and distinct.p == pytest.approx(2 / 2**9)
    small, large = sorted([rouge, distinct], key=lambda c: c.p or 0)
    assert small.p_adjusted == pytest.approx(2 * (small.p or 0))
    assert large.p_adjusted == pytest.approx(max(2 * (small.p or 0), large.p or 0))
    assert rouge.detectable_level == pytest.approx(0.05 / 2)


def test_what_is_no_mean_of_its_rows_is_not_tested(tmp_path: Path) -> None:
    """A median, which happens to be no mean here; and losses of a run that kept no tokens."""
    runs = []
    for name, rows in (("a", GOOD), ("b", BETTER)):
        scores = {"m": rows, "loss": rows, "rougeL": rows}
        runs.append(a_run(tmp_path / name, {"sft": scores}, values={"m": float(np.median(rows)) + 0.01}))
    found = compared(*runs)
    assert [c.metric for c in found.evaluation.comparisons] == ["rougeL"]
    assert found.notes == [
        "Not tested between runs: m; the value is not the mean of the rows, and rows.parquet keeps no more than these.",
        "Not tested between runs: loss; they count different tokens, or the run kept none.",
    ]


def test_losses_weigh_by_their_tokens(tmp_path: Path) -> None:
    """Rows of 4 and of 40 tokens do not count alike. All 4,096 swaps are tried by hand."""
    tokens = np.where(np.arange(ROWS) % 2, 4, 40)
    runs, sums = [], []
    for name, rows in (("a", GOOD), ("b", BETTER)):
        loss = float((rows * tokens).sum() / tokens.sum())
        scores = {"loss": rows, "perplexity": np.exp(rows), "tokens": tokens.astype(float)}
        sums.append(rows * tokens)
        run = a_run(tmp_path / name, {"sft": scores}, values={"loss": loss, "perplexity": math.exp(loss)})
        entry = json.loads((run / "compare" / "evaluation.json").read_text())
        del entry["models"]["sft"]["tokens"]  # a column, not a metric
        write(run / "compare" / "evaluation.json", entry)
        runs.append(run)
    found = {c.metric: c for c in compared(*runs).evaluation.comparisons}
    swaps = (np.arange(2**ROWS)[:, None] >> np.arange(ROWS)) & 1
    a, b = (np.where(swaps, one, other).sum(1) / tokens.sum() for one, other in (sums[::-1], sums))
    for metric, of in (("loss", lambda v: v), ("perplexity", np.exp)):
        differences = of(b) - of(a)
        assert found[metric].difference == pytest.approx(differences[0])
        assert found[metric].p == pytest.approx(np.mean(np.abs(differences) >= abs(differences[0]) - 1e-12))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sha": "cd" * 32}, "evaluated on different rows"),
        ({"sha": ""}, "no checksum"),
        ({"signatures": {"rougeL": "rougeL|porter"}}, "Not tested between runs: rougeL; not measured alike"),
    ],
)
def test_why_two_runs_cannot_be_tested(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    a = a_run(tmp_path / "a", {"sft": {"rougeL": GOOD}})
    found = compared(a, a_run(tmp_path / "b", {"sft": {"rougeL": BETTER}}, **change))
    assert found.evaluation.comparisons == [] and reason in " ".join(found.notes)
    page = build([a, tmp_path / "b"], tmp_path / "page").read_text("utf-8")
    assert reason in page or "not measured alike" in page


def test_rows_that_are_absent_or_of_other_models(tmp_path: Path) -> None:
    a = a_run(tmp_path / "a", {"sft": {"rougeL": GOOD}})
    b = a_run(tmp_path / "b", {"grpo": {"rougeL": BETTER}})
    [only] = compared(a, b).evaluation.comparisons  # what each run leads to
    assert (only.a, only.b) == ("a/sft", "b/grpo") and only.difference == pytest.approx(np.mean(BETTER - GOOD))
    (b / "compare" / "rows.parquet").unlink()
    assert "kept no rows" in compared(a, b).notes[0]


def test_a_model_that_is_the_same_costs_no_power(tmp_path: Path) -> None:
    """Equal bases are told, not tested: their p of 1 would count in Holm's correction."""
    base = {"rougeL": GOOD, "distinct": GAPS}
    a = a_run(tmp_path / "a", {"base": base, "sft": {"rougeL": GOOD}})
    b = a_run(tmp_path / "b", {"base": base, "sft": {"rougeL": BETTER}}, prompt="Q: {}")
    found = compared(a, b)
    assert [c.p_adjusted == c.p for c in found.evaluation.comparisons] == [True]
    assert found.notes == [
        "a and b wrote the same rows out in different forms; a difference may come from that.",
        "base answered every row alike, with equal scores, in a and b.",
    ]


def test_a_divergence_is_measured_from_a_model(tmp_path: Path) -> None:
    """Of two bases with one name it is two quantities."""
    signatures = {"kl": "kl|nats/answer|exact|from:base"}
    a = a_run(tmp_path / "a", {"base": {"rougeL": GOOD}, "sft": {"kl": GOOD}}, signatures=signatures)
    b = a_run(tmp_path / "b", {"base": {"rougeL": GOOD}, "sft": {"kl": BETTER}}, signatures=signatures)
    assert [c.metric for c in compared(a, b).evaluation.comparisons] == ["kl"]
    b = a_run(tmp_path / "b", {"base": {"rougeL": BETTER}, "sft": {"kl": BETTER}}, signatures=signatures)
    found = compared(a, b)
    assert [c.metric for c in found.evaluation.comparisons] == ["rougeL"] and "kl; measured from" in found.notes[0]


def test_wins_are_over_a_model(tmp_path: Path) -> None:
    """Over two bases of one name they are two quantities."""
    signatures = {"win_rate": "win_rate|against:base|by:rm|ties:half"}
    wins = [np.arange(ROWS) % 2.0, np.ones(ROWS)]
    a = a_run(tmp_path / "a", {"base": {"rougeL": GOOD}, "sft": {"win_rate": wins[0]}}, signatures=signatures)
    b = a_run(tmp_path / "b", {"base": {"rougeL": GOOD}, "sft": {"win_rate": wins[1]}}, signatures=signatures)
    [only] = compared(a, b).evaluation.comparisons
    assert only.metric == "win_rate" and only.difference == 0.5 and only.p == pytest.approx(2 / 2**6)
    b = a_run(tmp_path / "b", {"base": {"rougeL": BETTER}, "sft": {"win_rate": wins[1]}}, signatures=signatures)
    assert [c.metric for c in compared(a, b).evaluation.comparisons] == ["rougeL"]


def test_a_maximum_between_runs_has_no_p(tmp_path: Path) -> None:
    runs = [
        a_run(tmp_path / n, {"sft": {"m": rows}}, values={"m": rows.max()}) for n, rows in (("a", GOOD), ("b", BETTER))
    ]
    for run in runs:
        evaluation = json.loads((run / "compare" / "evaluation.json").read_text("utf-8"))
        evaluation["models"]["sft"]["m"] |= {"low": None, "high": None}
        write(run / "compare" / "evaluation.json", evaluation)
    (c,) = compared(*runs).evaluation.comparisons
    assert c.p is None and c.difference == pytest.approx(BETTER.max() - GOOD.max())


def test_three_runs_against_the_first_and_the_one_before(tmp_path: Path) -> None:
    """One mark a line at most, only where a run beats both others; one precision a line."""
    runs = [a_run(tmp_path / n, {"sft": {"rougeL": GOOD + s}}) for n, s in (("a", 0.0), ("b", 0.1), ("c", 0.3))]
    named = [(f.name, read_run(f)) for f in runs]
    one = between(named, "compare")
    assert [(c.a, c.b) for c in one.evaluation.comparisons] == [
        ("a/sft", "b/sft"), ("a/sft", "c/sft"), ("b/sft", "c/sft"),
    ]  # fmt: skip
    (table,) = results(named, [one])
    (line,) = table.rows
    assert [cell.mark for cell in line[2:]] == ["", "", "best"]
    assert len({len(cell.text) for cell in line[2:]}) == 1 and line[0].text == "rougeL ↑"
    assert view([run for _, run in named])["between"][0][0] == one


def test_both_runs_are_not_marked_for_beating_their_own_base(tmp_path: Path) -> None:
    runs = []
    for name in "ab":
        runs.append(a_run(tmp_path / name, {"base": {"rougeL": GOOD}, "sft": {"rougeL": BETTER}}))
        evaluation = json.loads((runs[-1] / "compare" / "evaluation.json").read_text("utf-8"))
        evaluation["comparisons"] = [
            {"metric": "rougeL", "a": "base", "b": "sft", "difference": 0.1, "p_adjusted": 0.01}
        ]
        write(runs[-1] / "compare" / "evaluation.json", evaluation)
    named = [(f.name, read_run(f)) for f in runs]
    (table,) = results(named, [between(named, "compare")])
    assert not any(cell.mark for line in table.rows for cell in line) and table.notes == []


def test_settings_of_copies_and_of_stages_that_one_run_lacks(tmp_path: Path) -> None:
    sft = {"lr": 1e-3, "seeds": 1, "adapter": {"r": 8}}
    a = a_run(tmp_path / "a", {"sft": {"rougeL": GOOD}}, stages={"sft": sft, "grpo": {"lr": 1e-5, "kl": 0.04}})
    copies = {"sft": sft | {"seeds": 3}, "sft-seed2": sft | {"seeds": 3}, "sft-seed3": sft | {"seeds": 3}}
    b = a_run(tmp_path / "b", {"sft": {"rougeL": BETTER}}, stages=copies)
    table = settings([(f.name, read_run(f)) for f in (a, b)])
    assert table is not None
    assert [[cell.text for cell in row] for row in table.rows] == [["sft.seeds", "1", "3"], ["stage grpo", "sft", "–"]]


def test_decoding_that_an_older_run_did_not_know_is_no_difference(tmp_path: Path) -> None:
    a = a_run(tmp_path / "a", {"sft": {"rougeL": GOOD}})
    b = a_run(tmp_path / "b", {"sft": {"rougeL": BETTER}}, decoding={"max_new_tokens": 8, "min_p": 0.0})
    assert notices([(f.name, read_run(f)) for f in (a, b)]) == []
    b = a_run(tmp_path / "b", {"sft": {"rougeL": BETTER}}, decoding={"max_new_tokens": 9})
    assert notices([(f.name, read_run(f)) for f in (a, b)]) == [
        "compare: the runs decoded with different settings (max_new_tokens 8 ≠ 9)."
    ]


def test_what_is_found_is_on_the_page_in_markdown_and_in_json(tmp_path: Path) -> None:
    a = a_run(tmp_path / "a", {"sft": {"rougeL": GOOD}})
    b = a_run(tmp_path / "b", {"sft": {"rougeL": BETTER}})
    page = build([a, b], tmp_path / "page")
    results_json = json.loads((tmp_path / "page" / "results.json").read_text("utf-8"))
    (c,) = results_json["comparisons"]["compare"]
    assert c["a"] == "a/sft" and c["b"] == "b/sft" and math.isclose(c["difference"], np.mean(BETTER - GOOD))
    sentence = f"b/sft is above a/sft on rougeL by {c['difference']:.3f}"
    assert sentence in page.read_text("utf-8") and sentence in (tmp_path / "page" / "report.md").read_text("utf-8")
