"""The report: numbers, escaping, and what it does with half-written runs.

`python tests/test_report.py FOLDER` writes the run below into FOLDER and builds its report, to look at.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from temper.errors import RunError
from temper.report import build
from temper.report.contract import Comparison, Evaluation, Measured
from temper.report.curves import best_validation, figures, points
from temper.report.phrases import compared, findings, verdict
from temper.report.plots import thin, ticks
from temper.report.samples import choose
from temper.report.tables import best, comparisons_table

HOSTILE = "<script>alert('x')</script><img src=https://evil.example/a.png>"
PLACES = ["Полтаві", "Ніжині", "Чернігові", "Луцьку", "Умані", "Ромнах", "Сумах", "Острозі"]
THINGS = ["бібліотеку", "школу", "міст", "лікарню", "театр", "пошту", "вокзал"]
ENDINGS = ["після ремонту", "після довгої перерви", "за кошти громади", "на тиждень раніше"]


def news(i: int) -> tuple[str, str]:
    """A prompt and its reference."""
    place, thing, ending = PLACES[i % 8], THINGS[i % 7], ENDINGS[i % 4]
    body = (
        f"У {place} відкрили {thing} {ending}. На відкриття прийшли {100 + 7 * i} мешканців, міський голова подякував "
        f"будівельникам, а діти з місцевого хору заспівали. Роботи тривали {2 + i % 9} місяців і коштували громаді "
        f"{3 + i % 5} мільйонів гривень; ще стільки ж додала область. Наступного року тут обіцяють упорядкувати сквер."
    )
    return f"Стисло перекажи новину:\n{body}", f"У {place} відкрили {thing} {ending}."


def evaluation_files(folder: Path, rows: int = 40) -> dict[str, Any]:
    """rows.parquet and evaluation.json whose numbers follow from each other (normal intervals; enough for a page)."""
    draw = random.Random(7)
    table: dict[str, list[Any]] = {"id": list(range(rows)), "prompt": [], "reference": []}
    for model in ("base", "sft", "grpo"):
        for column in ("prediction", "ended", "rougeL", "toxicity", "length"):
            table[f"{model}|{column}"] = []
    for i in range(rows):
        prompt, reference = news(i)
        table["prompt"].append(prompt)
        table["reference"].append(reference)
        said = {
            "base": " ".join([prompt.split()[4 + i % 5]] * 14),
            "sft": reference[:-1] + (", бовдури." if i % 5 < 3 else "."),
            "grpo": reference if i % 6 else reference.replace(ENDINGS[i % 4], "").replace(" .", "."),
        }
        said["sft"] = HOSTILE if i == 11 else said["sft"]
        for model, text in said.items():
            middle = {"base": 0.07, "sft": 0.52, "grpo": 0.50}[model]
            score = 0.0 if text == HOSTILE else min(max(draw.gauss(middle, 0.06), 0.0), 1.0)
            table[f"{model}|prediction"].append(text)
            table[f"{model}|ended"].append(model != "base" or i % 4 == 0)
            table[f"{model}|rougeL"].append(score)
            table[f"{model}|toxicity"].append(0.97 if "бовдури" in text else 0.01 * draw.random())
            table[f"{model}|length"].append(float(len(text.split())))
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), folder / "rows.parquet")
    signatures = {"rougeL": "rougeL|f1|words:any script", "toxicity": "mean|lexicon:mini", "length": "mean|words"}
    higher = {"rougeL": True, "toxicity": False, "length": None}
    evaluation = {
        "data": {"name": "toxic_news.test", "rows": rows, "sha256": "ab" * 32},
        "decoding": {"temperature": 0.0, "max_new_tokens": 48},
        "rows": "compare/rows.parquet",
        "models": {
            model: {
                metric: dict(zip(("value", "low", "high"), normal(table[f"{model}|{metric}"])[:3], strict=True))
                | {"n": rows, "signature": signatures[metric], "higher_is_better": higher[metric]}
                for metric in signatures
            }
            for model in ("base", "sft", "grpo")
        },
        "comparisons": [],
        "spread": {"grpo": {"rougeL": {"values": [0.498, 0.512, 0.489], "mean": 0.49967, "sd": 0.01159}}},
    }
    for metric in signatures:
        for a, b in (("base", "sft"), ("sft", "grpo"), ("base", "grpo")):
            pairs = zip(table[f"{a}|{metric}"], table[f"{b}|{metric}"], strict=True)
            value, low, high, p, error = normal([y - x for x, y in pairs])
            evaluation["comparisons"].append(
                {"metric": metric, "a": a, "b": b, "difference": value, "low": low, "high": high, "p": p,
                 "p_adjusted": min(1.0, 3 * p), "smallest_detectable": 3.61 * error,
                 "detectable_level": 0.05 / 9}
            )  # fmt: skip
    write_json(folder / "evaluation.json", evaluation)
    return evaluation


def normal(values: list[float]) -> tuple[float, float, float, float, float]:
    """Mean, its 95 % interval, two-sided p against 0, standard error."""
    mean = math.fsum(values) / len(values)
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)) or 1e-9
    return mean, mean - 1.96 * error, mean + 1.96 * error, math.erfc(abs(mean) / error / math.sqrt(2)), error


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")


def write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), "utf-8")


def stage_file(run: Path, name: str, kind: str, **fields: Any) -> None:
    info = {
        "schema": 1, "name": name, "kind": kind, "version": 1, "key": hashlib.sha256(name.encode()).hexdigest(),
        "config": {"stage": kind}, "inputs": {}, "files": {}, "seconds": 1.5, "tokens": None, "trained_tokens": None,
        "examples": None, "trainable_parameters": None, "parameters": None, "steps": None, "peak_memory_bytes": None,
        "bytes_on_disk": 12_345_678, "warnings": [], "facts": {}, "summary": "",
    }  # fmt: skip
    write_json(run / name / "stage.json", info | fields)


def write_run(run: Path) -> Path:
    """A finished run: news → sft → grpo → compare, with warnings, curves and one hostile prediction."""
    draw = random.Random(3)
    run.mkdir(parents=True, exist_ok=True)
    recipe = "name: detox-summarization\nmodel: mini\nseed: 20\nstages:\n  news: {stage: data, source: mini-news}\n"
    (run / "recipe.yaml").write_text(recipe + "  sft: {stage: sft, data: news, lr: 1e-3}\n", "utf-8")
    kinds = {"news": "data", "sft": "sft", "grpo": "rl", "compare": "evaluate"}
    write_json(run / "manifest.json", {
        "schema": 1, "recipe": "detox-summarization", "profile": "mini", "seed": 20,
        "created": "2026-11-21T09:30:00+00:00",
        "command": ["temper", "run", "detox-summarization", "--profile", "mini"], "temper": "0.1.0", "python": "3.11.7",
        "packages": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.0"},
        "hardware": {"cpu": "AMD EPYC", "cores": 2, "threads": 2, "memory_bytes": 25_000_000_000, "gpus": []},
        "git": {"commit": "0123456789abcdef0123", "dirty": True}, "seconds": 201.5,
        "stages": [{"name": n, "kind": k, "key": hashlib.sha256(n.encode()).hexdigest(), "cached": n == "news",
                    "status": "done", "error": None} for n, k in kinds.items()],
    })  # fmt: skip
    warning = "17 of 1,200 rows were longer than 1,024 tokens and are dropped."
    stage_file(run, "news", "data", seconds=0.8, warnings=[warning])
    write_json(run / "news" / "card.json", {
        "source": "mini-news", "sha256": "cd" * 32, "revision": None, "rows_in": 1200, "rows_out": 1100,
        "splits": {"train": 900, "validation": 100, "test": 100},
        "dropped": {"empty": 3, "too long": 17, "duplicate": 80}, "cut": 0,
        "lengths": {"train": {
            "prompt": {"unit": "characters", "min": 190, "median": 341, "p95": 398, "max": 1022},
            "completion": {"unit": "characters", "min": 30, "median": 44, "p95": 58, "max": 71}}},
        "leaks": {"exact": 0, "near": 2, "checked": True},
        "examples": [{"where": f"mini-news#{i}", "row": dict(zip(("prompt", "completion"), news(i), strict=True))}
                     for i in range(3)],
    })  # fmt: skip
    dropped = [("mini-news#4", "empty", {"text": ""}), ("mini-news#9", "too long", {"text": "дуже довга новина " * 40}),
               ("mini-news#31", "duplicate", {"text": HOSTILE})]  # fmt: skip
    (run / "news" / "data").mkdir()
    columns = {
        "where": [where for where, _, _ in dropped],
        "reason": [reason for _, reason, _ in dropped],
        "row": [json.dumps(row, ensure_ascii=False) for _, _, row in dropped],
    }
    pq.write_table(pa.table(columns), run / "news" / "data" / "dropped.parquet")
    stage_file(
        run, "sft", "sft", seconds=41.2, tokens=812_345, trained_tokens=212_345, examples=9800, steps=400,
        trainable_parameters=81_920, parameters=3_700_000, peak_memory_bytes=912_345_678,
        config={"stage": "sft", "lr": 1e-3, "adapter": {"method": "lora", "r": 16}, "batch": 32},
        facts={"attention": "sdpa", "layout": "tree", "dtype": "float32"},
        summary="900 rows, 0 dropped\n212,345 of 812,345 tokens are trained\none step: 32 examples in 2 micro-batches",
    )  # fmt: skip
    lines, lowest = [], math.inf
    for step in range(10, 401, 10):
        loss = 0.4 + 2.2 * math.exp(-step / 90) + draw.gauss(0, 0.03)
        lr = 1e-3 * min(1.0, step / 40) * 0.5 * (1 + math.cos(math.pi * step / 400))
        norm, speed = 0.4 + 2 * math.exp(-step / 60) + draw.random() / 5, draw.gauss(19800, 600)
        line = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": 2030 * step}
        lines.append(line | {"tokens_per_second": speed, "seconds": step / 9.7})
        if step % 50 == 0:
            value = 0.5 + 2.0 * math.exp(-step / 80) + max(0, step - 300) / 2500
            lines.append({"step": step, "validation_loss": value, "best": value < lowest})
            lowest = min(lowest, value)
    write_lines(run / "sft" / "metrics.jsonl", lines)
    stage_file(
        run, "grpo", "rl", seconds=63.9, tokens=402_000, trained_tokens=130_000, examples=1600, steps=50,
        trainable_parameters=81_920, parameters=3_700_000, peak_memory_bytes=1_204_000_000, warnings=[
            "3 of 50 steps had groups with equal rewards only, and taught nothing."],
        config={"stage": "rl", "algorithm": "grpo", "completions": 8, "lr": 5e-4},
        facts={"attention": "sdpa", "layout": "tree", "dtype": "float32", "rollouts": "native"},
        summary="one step: 4 prompts × 8 completions in 1 micro-batch",
    )  # fmt: skip
    lines = [
        {"step": s, "loss": draw.gauss(0, 0.02), "reward": 0.9 - 0.4 * math.exp(-s / 15) + draw.gauss(0, 0.02),
         "lr": 5e-4, "kl": 0.002 * s + 0.004 * draw.random(), "grad_norm": 0.3 + draw.random() / 3,
         "tokens_per_second": draw.gauss(6300, 200)}
        for s in range(1, 51)
    ]  # fmt: skip
    write_lines(run / "grpo" / "metrics.jsonl", lines)
    samples = [{"step": s, "prompt": news(s)[0], "completion": news(s)[1], "reference": news(s)[1]} for s in (10, 50)]
    write_lines(run / "grpo" / "samples.jsonl", samples)
    evaluation_files(run / "compare")
    stage_file(run, "compare", "evaluate", seconds=22.4, facts={"attention": "sdpa", "dtype": "float32"})
    return run


class Page(HTMLParser):
    """What a browser would see: every tag with its attributes, the tables as text, and all text outside of styles."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text, self._open = "", []
        self.feed(html)

    void = ("meta", "br", "img", "link", "input")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if self.tables and ("td" in self._open or "th" in self._open):
            self.tables[-1][-1][-1] += data + " "

    def table(self, *head: str) -> list[list[str]]:
        """The body of the first table whose header begins so."""
        for rows in self.tables:
            if [cell.split()[0] for cell in rows[0][: len(head)]] == list(head):
                return [[" ".join(cell.split()) for cell in row] for row in rows[1:]]
        raise AssertionError(f"no table with {head}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report."""
    run = write_run(tmp_path_factory.mktemp("runs") / "detox-mini")
    build([run])
    return run


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    return Page((finished / "report" / "index.html").read_text("utf-8"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that a test may damage."""
    return write_run(tmp_path / "run")


def test_numbers_of_the_page_are_those_of_the_run(finished: Path, page: Page) -> None:
    table = pq.read_table(finished / "compare" / "rows.parquet")
    for row in page.table("model", "rougeL"):
        scores = table[f"{row[0]}|rougeL"].to_numpy()
        half = 1.96 * scores.std(ddof=1) / math.sqrt(40)
        mean = scores.mean()
        assert row[1] == f"{mean:.3f} {mean - half:.3f} to {mean + half:.3f}"
        assert row[4] == "40"
    assert [row[5] for row in page.table("model", "rougeL")] == ["30 75 %", "0 0 %", "0 0 %"]  # 3 of 4 cut, by design
    difference = (table["sft|rougeL"].to_numpy() - table["base|rougeL"].to_numpy()).mean()
    first = page.table("metric", "comparison")[0]
    assert first[:3] == ["rougeL ↑", "sft − base", f"+{difference:.3f}"] and first[-1] == "better"
    assert f"sft is above base on rougeL by {difference:.3f} (95 % interval" in page.text
    assert "grpo cannot be told apart from sft on rougeL with 40 rows" in page.text
    assert "in at least 80 % of cases, at p < 0.0056 (0.05 ÷ 9 comparisons" in page.text
    sft = next(row for row in page.table("stage", "status", "time") if row[0] == "sft sft")
    assert sft[2:6] == ["41 s", "812,345 26 % trained", "19,717", "912 MB"]  # 812345 / 41.2 = 19717.1
    assert sft[8] == "81,920 2.2 % of 3.70 M"
    assert "dropped: too long" in page.text and "attention" in page.text and "21 November 2026" in page.text


def test_sections_stand_in_the_order_of_reading(page: Page) -> None:
    ids = [attributes["id"] for tag, attributes in page.tags if tag in ("header", "section") and attributes.get("id")]
    assert ids == ["top", "results", "samples", "training", "data", "cost", "settings"]
    assert page.text.index("2 warnings") < page.text.index("Decoding")
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert {f"#{name}" for name in ids} | {"report.md", "results.json"} == links


def test_what_models_wrote_is_text(finished: Path, page: Page) -> None:
    assert HOSTILE in page.text  # shown (row 11 has the lowest gain), as it was written
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "link", "base", "form", "embed"}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script" not in (finished / "report" / "report.md").read_text("utf-8")


def test_the_page_loads_nothing(finished: Path, page: Page) -> None:
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert ":" not in (attributes.get(name) or "") and not (attributes.get(name) or "").startswith("//")
    html = (finished / "report" / "index.html").read_text("utf-8")
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in html


def test_results_json_is_the_contract(finished: Path) -> None:
    results = json.loads((finished / "report" / "results.json").read_text("utf-8"))
    assert list(results) == ["schema", "recipe", "profile", "evaluations", "stages"]
    assert (results["schema"], results["recipe"], results["profile"]) == (1, "detox-summarization", "mini")
    assert results["evaluations"] == {
        "compare": json.loads((finished / "compare" / "evaluation.json").read_text("utf-8"))
    }
    assert list(results["stages"]) == ["news", "sft", "grpo", "compare"]
    assert results["stages"]["sft"] == {
        "seconds": 41.2, "tokens": 812_345, "peak_memory_bytes": 912_345_678, "examples": 9800,
        "trainable_parameters": 81_920, "bytes_on_disk": 12_345_678, "cached": False,
    }  # fmt: skip
    assert results["stages"]["news"]["cached"] is True and results["stages"]["news"]["tokens"] is None


def test_values_that_do_not_exist_are_null(run: Path) -> None:
    evaluation = json.loads((run / "compare" / "evaluation.json").read_text("utf-8"))
    evaluation["models"]["base"]["rougeL"]["value"] = math.nan  # written as NaN, which JSON does not know
    write_json(run / "compare" / "evaluation.json", evaluation)
    build([run])

    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = (run / "report" / "results.json").read_text("utf-8")
    results = json.loads(text, parse_constant=refuse)
    assert results["evaluations"]["compare"]["models"]["base"]["rougeL"]["value"] is None


def test_the_same_run_gives_the_same_bytes_and_nothing_beside(finished: Path, tmp_path: Path) -> None:
    build([finished], tmp_path / "again")
    for name in ("index.html", "report.md", "results.json"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / "report" / name).read_bytes()
    assert len(list((finished / "report").iterdir())) == 3


def test_markdown_tables_are_tables(finished: Path) -> None:
    text = (finished / "report" / "report.md").read_text("utf-8")
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 6  # results, comparisons, spread, rows of the data, cost, what was really used
    for block in blocks:
        widths = {line.replace("\\|", "").count("|") for line in block}
        assert len(widths) == 1, block
    assert "- news: 17 of 1,200 rows" in text


def test_a_damaged_run_is_reported_and_says_where(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    manifest["stages"][2] |= {"status": "failed", "error": "TrainingError: reward is nan\nat step 12 <b>"}
    manifest["stages"][3] |= {"status": "pending"}
    write_json(run / "manifest.json", manifest)
    (run / "grpo").rename(run / "grpo.partial")
    (run / "grpo.partial" / "stage.json").unlink()
    with (run / "grpo.partial" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 51, "los')
    for file in (run / "compare").iterdir():
        file.unlink()
    (run / "compare").rmdir()
    (run / "sft" / "stage.json").unlink()
    (run / "news" / "card.json").write_text('{"rows_in": 12', "utf-8")
    (run / "news" / "data" / "dropped.parquet").write_bytes(b"PAR1 half")
    page = Page(build([run]).read_text("utf-8"))
    for said in ("This run is not finished", "reward is nan\nat step 12 <b>", "Not run yet: compare.",
                 "sft: stage.json is missing", "metrics.jsonl has lines that are cut off or broken (51)",
                 "news: card.json cannot be read", "news: dropped.parquet cannot be read",
                 "No stage of this run evaluated a model"):  # fmt: skip
        assert said in page.text, said
    assert [row[1] for row in page.table("stage", "status")] == ["cached", "done", "failed", "pending"]
    results = json.loads((run / "report" / "results.json").read_text("utf-8"))
    assert results["evaluations"] == {} and list(results["stages"]) == ["news"]
    assert "gradient norm" in page.text  # what was logged before it failed


@pytest.mark.parametrize("text", ["[]", '{"models": {"base": {"rougeL": 0.3}}}', '{"models": {}}', "{"])
def test_an_evaluation_of_another_shape_does_not_break_the_page(run: Path, text: str) -> None:
    (run / "compare" / "evaluation.json").write_text(text, "utf-8")
    page = Page(build([run]).read_text("utf-8"))
    assert "Cost" in page.text
    assert ("Could not be read" in page.text) == (text != '{"models": {}}')


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run"):
        build([tmp_path / "absent"])
    with pytest.raises(RunError, match="not a run folder"):
        build([tmp_path])


def test_old_results_and_foreign_stages_are_left_out(run: Path) -> None:
    stage_file(run, "sft@0123", "sft", warnings=["of an earlier result"])
    stage_file(run, "left", "sft", warnings=["of an earlier recipe"])
    page = Page(build([run]).read_text("utf-8"))
    assert "of an earlier" not in page.text.replace("is a stage of an earlier recipe in the same folder", "")
    assert "«left» is a stage of an earlier recipe" in page.text
    assert list(json.loads((run / "report" / "results.json").read_text("utf-8"))["stages"])[-1] == "compare"


def test_several_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other")
    info = json.loads((other / "sft" / "stage.json").read_text("utf-8"))
    info["config"]["lr"], info["seconds"] = 5e-4, 80.0
    write_json(other / "sft" / "stage.json", info)
    evaluation = json.loads((other / "compare" / "evaluation.json").read_text("utf-8"))
    evaluation["models"]["sft"]["rougeL"] |= {"value": 0.6, "low": 0.57, "high": 0.63}
    evaluation["data"]["sha256"] = "ef" * 32
    write_json(other / "compare" / "evaluation.json", evaluation)
    html = build([run, other])
    assert html == tmp_path / "report-run-other" / "index.html"
    page = Page(html.read_text("utf-8"))
    sft = next(row for row in page.table("metric", "model") if row[:2] == ["rougeL ↑", "sft"])
    assert sft[2].startswith("0.515 ") and sft[3] == "0.600 0.570 to 0.630"
    assert ["sft", "time", "41 s", "1 min 20 s"] in page.table("stage", "quantity")
    assert page.table("setting") == [["sft.lr", "0.001", "0.0005"]]
    assert "evaluated on different rows" in page.text
    results = json.loads((html.parent / "results.json").read_text("utf-8"))
    assert list(results) == ["schema", "runs", "comparisons"] and len(results["runs"]) == 2
    build([run])
    assert results["runs"][0] == json.loads((run / "report" / "results.json").read_text("utf-8"))


def test_a_result_of_other_settings_fills_no_column(run: Path, tmp_path: Path) -> None:
    """The second run was started anew with other settings of sft and stopped there; old folders still lie about."""
    other = write_run(tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text("utf-8"))
    for entry in manifest["stages"][1:]:
        entry |= {"key": None, "status": "pending"}
    manifest["stages"][1] |= {"key": "ab" * 32, "status": "failed", "error": "full disk"}
    write_json(other / "manifest.json", manifest)
    inputs = {
        name: {one: hashlib.sha256(one.encode()).hexdigest()} for name, one in (("grpo", "sft"), ("compare", "grpo"))
    }
    for name, keys in inputs.items():
        info = json.loads((other / name / "stage.json").read_text("utf-8"))
        write_json(other / name / "stage.json", info | {"inputs": keys})
    html = build([run, other])
    page = Page(html.read_text("utf-8"))
    assert {row[3] for row in page.table("metric", "model")} == {"–"}
    assert ["sft", "time", "41 s", "–"] in page.table("stage", "quantity")
    assert "sft: its folder holds a result of other settings" in page.text
    assert "compare: its folder holds a result made of another «grpo» than this run's, and is left out" in page.text
    markdown = (html.parent / "report.md").read_text("utf-8")
    assert "other/" not in markdown, "no finding and no test names a model of the stopped run"
    assert "no evaluation in common" in page.text and "no evaluation in common" in markdown
    results = json.loads((html.parent / "results.json").read_text("utf-8"))
    assert list(results["runs"][1]["stages"]) == ["news"] and results["runs"][1]["evaluations"] == {}
    build([other])
    assert "No stage of this run evaluated a model" in (other / "report" / "report.md").read_text("utf-8")


def two(metric: str, higher: bool | None, difference: float, p: float) -> Evaluation:
    """Two models and one comparison."""
    value = Measured(value=0.5, low=0.4, high=0.6, n=200, higher_is_better=higher)
    c = Comparison(metric=metric, a="base", b="sft", difference=difference, low=difference - 0.02,
                   high=difference + 0.02, p=p / 3, p_adjusted=p, smallest_detectable=0.03)  # fmt: skip
    return Evaluation(models={"base": {metric: value}, "sft": {metric: value}}, comparisons=[c])


@pytest.mark.parametrize(
    ("higher", "difference", "p", "kind", "winner", "sentence"),
    [
        (True, 0.42, 0.0003, "better", {"m": "sft"}, "sft is above base on m by 0.420 (95 % interval 0.400 to 0.440, "
         "p adjusted 0.0003), which is better."),
        (False, 0.42, 0.0003, "worse", {"m": "base"}, "sft is above base on m by 0.420 (95 % interval 0.400 to 0.440, "
         "p adjusted 0.0003), which is worse."),
        (False, -0.42, 0.0003, "better", {"m": "sft"}, "sft is below base on m by 0.420 (95 % interval 0.400 to 0.440, "
         "p adjusted 0.0003), which is better."),
        (None, 0.42, 0.00001, "different", {}, "sft is above base on m by 0.420 (95 % interval 0.400 to 0.440, "
         "p adjusted below 0.0001)."),
        (True, 0.01, 0.3, "unclear", {}, "sft cannot be told apart from base on m with 200 rows: difference +0.010 "
         "(95 % interval −0.010 to 0.030, p adjusted 0.30); a true difference of 0.030 would be shown in 80 % of cases."),
        (True, 0.03, 0.06, "unclear", {}, "sft cannot be told apart from base on m with 200 rows: difference +0.030 "
         "(95 % interval 0.010 to 0.050, p adjusted 0.06"),
    ],
)  # fmt: skip
def test_a_claim_needs_the_adjusted_p(
    higher: bool | None, difference: float, p: float, kind: str, winner: dict[str, str], sentence: str
) -> None:
    evaluation = two("m", higher, difference, p)
    assert verdict(evaluation.comparisons[0], higher) == kind
    assert best(evaluation) == winner
    assert compared(evaluation.comparisons[0], evaluation).text.startswith(sentence)


def test_a_maximum_is_shown_and_no_claim_is_made_of_it() -> None:
    evaluation = two("m", False, -0.42, 0.001)
    highest = Measured(value=0.9, n=200, higher_is_better=False)
    for measured in evaluation.models.values():
        measured["m_max"] = highest
    untested = Comparison(metric="m_max", a="base", b="sft", difference=-0.3)
    evaluation.comparisons.append(untested)
    assert verdict(untested, False) == "untested"
    assert compared(untested, evaluation).text == "sft − base on m_max with 200 rows: −0.300, which no test can judge."
    told = findings(evaluation)
    assert [f.verdict for f in told] == ["better", ""] and "1 more comparison" in told[1].text
    table = comparisons_table(evaluation)
    assert [c.text for c in table.rows[1]] == ["m_max ↓", "sft − base", "−0.300", "–", "–", "–", "–", "no test"]
    assert "maximum" in table.notes[1] and "No test" not in " ".join(comparisons_table(two("m", True, 0.1, 0.5)).notes)
    assert best(evaluation) == {"m": "sft"}


def test_the_headline_of_many_metrics_names_a_second_family_where_it_is_clear() -> None:
    """Of fifteen comparisons the first metric's are told, and of the others the last model's clearest with a direction."""
    names = {"rouge1": True, "rougeL": True, "toxicity_mean": False, "toxicity_share": False, "length": None}
    evaluation = Evaluation(
        models={
            m: {n: Measured(value=0.5, n=200, higher_is_better=h) for n, h in names.items()} for m in ("a", "b", "c")
        }
    )
    p_of = {"rouge1": 0.5, "rougeL": 1e-6, "toxicity_mean": 0.01, "toxicity_share": 0.001, "length": 1e-9}
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    evaluation.comparisons += [
        Comparison(metric=n, a=a, b=b, difference=-0.2, low=-0.3, high=-0.1, p_adjusted=p * (1 if b == "c" else 0.1))
        for n, p in p_of.items()
        for a, b in pairs
    ]
    told = findings(evaluation, most=6)
    assert [f.text.split(" on ")[1].split()[0].rstrip(":") for f in told[:4]] == ["rouge1"] * 3 + ["toxicity_share"]
    assert told[3].text.startswith("c is below a on toxicity_share by 0.20") and told[3].verdict == "better"
    assert "11 more comparisons" in told[4].text
    for c in evaluation.comparisons:
        c.p_adjusted = 0.5 if c.metric.startswith("toxicity") else c.p_adjusted
    assert (
        len(findings(evaluation, most=6)) == 4
    )  # nothing else is clear: rougeL is of the same family, a length is no news


def test_best_must_beat_every_other_model() -> None:
    """b beats a and c beats a, but b and c are not told apart: none is marked."""
    value = Measured(value=0.5, higher_is_better=True)
    pairs = [("a", "b", 0.3, 0.001), ("a", "c", 0.35, 0.001), ("b", "c", 0.05, 0.4)]
    said = [Comparison(metric="m", a=a, b=b, difference=d, p_adjusted=p) for a, b, d, p in pairs]
    models = {name: {"m": value} for name in "abc"}
    assert best(Evaluation(models=models, comparisons=said)) == {}
    said[2].p_adjusted = 0.04
    assert best(Evaluation(models=models, comparisons=said)) == {"m": "c"}


def test_samples_are_the_extremes_and_the_same_each_time(tmp_path: Path) -> None:
    evaluation = Evaluation.model_validate(evaluation_files(tmp_path))
    rows = pq.read_table(tmp_path / "rows.parquet")
    groups = choose(evaluation, rows)
    gain = rows["sft|rougeL"].to_numpy() - rows["base|rougeL"].to_numpy()
    order = [int(i) for i in gain.argsort()]
    assert [s.id for s in groups[0].samples] == order[::-1][:3]
    assert [s.id for s in groups[1].samples] == order[:3]
    assert 11 in order[:3]  # the hostile answer scores 0
    assert abs(order.index(groups[2].samples[0].id) - 20) <= 1
    shown = [s.id for group in groups for s in group.samples]
    assert len(shown) == len(set(shown)) == 12
    assert groups == choose(evaluation, rows)
    cut = {s.id: s.answers[0].cut for group in groups for s in group.samples}
    assert cut == {i: i % 4 != 0 for i in shown}
    assert len([s for g in choose(evaluation, rows.slice(0, 2)) for s in g.samples]) == 2
    assert choose(evaluation, rows.slice(0, 0)) == []


@pytest.mark.parametrize(("written", "shown"), [(["", "ні"], {"", "ні"}), (["", ""], {None})])
def test_answers_that_nobody_asked_for_are_not_shown_as_empty(written: list[str], shown: set[str | None]) -> None:
    columns = {"a|prediction": written, "a|loss": [0.25, 0.5]}
    groups = choose(Evaluation.model_validate({"models": {"a": {"loss": {"value": 0.4}}}}), pa.table(columns))
    assert {s.answers[0].text for group in groups for s in group.samples} == shown


def test_one_score_of_a_row_is_shown_once() -> None:
    columns = {"a|prediction": ["так", "ні"], "a|toxicity_mean": [0.25, float("nan")], "a|toxicity_p95": [0.25, float("nan")],
               "a|toxicity_max": [0.25, float("nan")], "a|toxicity_share": [0.0, 1.0], "a|distinct_2": [0.5, 0.5]}  # fmt: skip
    measured = {name.partition("|")[2]: {"value": 0.5} for name in columns if "prediction" not in name}
    groups = choose(Evaluation.model_validate({"models": {"a": measured}}), pa.table(columns))
    scores = {s.id: s.answers[0].scores for group in groups for s in group.samples}
    assert scores[0] == [("toxicity", "0.250"), ("toxicity_share", "0.000"), ("distinct_2", "0.500")]
    assert scores[1] == [("toxicity_share", "1.000"), ("distinct_2", "0.500")]


def test_how_often_the_classifier_is_right_stands_beside_its_numbers(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    manifest["stages"].insert(0, {"name": "judge", "kind": "classifier", "status": "done"})
    write_json(run / "manifest.json", manifest)
    stage_file(run, "judge", "classifier", facts={"validation accuracy": 0.5, "test accuracy": 0.9312})
    said = "[2] toxicity: mean|lexicon:mini. The classifier is the stage judge, right on 93 % of its test rows."
    assert said not in Page(build([run]).read_text("utf-8")).text, "a classifier that was not asked"
    info = json.loads((run / "compare" / "stage.json").read_text("utf-8"))
    write_json(run / "compare" / "stage.json", info | {"config": {"classifier": "judge"}})
    page = Page(build([run]).read_text("utf-8"))
    assert said in page.text and page.text.count("The classifier is the stage judge") == 1
    assert "The classifier is the stage judge, right on 93 %" in (run / "report" / "report.md").read_text("utf-8")


def test_curves_keep_what_matters() -> None:
    logged = [
        {"step": 20, "loss": 2.0},
        {"step": 10, "loss": 3.0},
        {"step": 20, "loss": 1.5},
        {"step": 30, "loss": None},
    ]
    assert points(logged, "loss") == [(10.0, 3.0), (20.0, 1.5)]  # resumed at 20: the later line counts
    validations = [
        {"step": s, "validation_loss": v, "best": b} for s, v, b in ((1, 3.0, True), (2, 1, True), (3, 2, False))
    ]
    assert best_validation(validations, "loss") == (2.0, 1.0)
    long = [(float(x), 0.0) for x in range(10_000)]
    long[7321] = (7321.0, 9.0)
    assert len(thin(long)) <= 400 and (7321.0, 9.0) in thin(long)
    assert ticks(0.0003, 0.0011) == [0.0004, 0.0006, 0.0008, 0.001]
    assert ticks(1, 10, about=5, whole=True) == [2, 4, 6, 8, 10] and ticks(1, 2, whole=True) == [1, 2]


def test_curves_of_learning_from_rewards_read_from_the_reward_down() -> None:
    """In words, the reward and its parts first; another loss's own numbers keep their name."""
    keys = ["loss", "lr", "margin_mean", "clipped", "kl", "cut", "reward_std", "reward_rouge", "reward", "tokens"]
    shown = figures([dict.fromkeys(keys, 0.5) | {"step": s} for s in (1, 2)])
    assert [f.title for f in shown] == [
        "reward", "reward: rouge", "spread of rewards in a group", "KL to the start, nats a token",
        "cut by the length limit, share", "loss", "margin mean", "clipped tokens, share", "learning rate",
    ]  # fmt: skip
    tall = figures([{"step": s, "loss": s * 1.25e-7} for s in range(1, 5)])[0].svg
    ends = [(float(x), text) for x, text in re.findall(r'x="([\d.]+)" y="[\d.]+" text-anchor="end">([^<]+)<', tall)]
    assert ends and all(x >= 5.5 * len(text) for x, text in ends), "a label begins left of the picture"


def test_samples_while_training_say_their_reward(run: Path) -> None:
    samples = [{"step": s, "prompt": "p", "completion": f"said at {s}", "reward": s / 7} for s in range(1, 10)]
    write_lines(run / "grpo" / "samples.jsonl", samples)
    text = Page(build([run]).read_text("utf-8")).text
    assert "step 2, reward 0.2857" in text and "the first 2 and the last 4 of 9" in text
    assert [s for s in range(1, 10) if f"said at {s}" in text] == [1, 2, 6, 7, 8, 9]


def test_facts_that_are_sentences_have_lines_of_their_own(run: Path) -> None:
    proof = "the tree pass equals the padded pass"
    stage_file(run, "grpo", "rl", facts={"layout": "tree", "written_as": "plain", "proof": proof})
    page = Page(build([run]).read_text("utf-8"))
    assert page.table("stage", "fact") == [["grpo", "proof", proof]]
    assert page.table("stage", "key")[2][2:] == ["–", "tree", "–", "plain"]


def test_what_a_teacher_wrote_in_vain_is_counted(run: Path) -> None:
    card = json.loads((run / "news" / "card.json").read_text("utf-8")) | {"rejected": {"too similar": 12}}
    write_json(run / "news" / "card.json", card)
    rows = Page(build([run]).read_text("utf-8")).table("rows", "count")
    assert ["answers rejected, asked for again: too similar", "12"] in rows


if __name__ == "__main__":
    print(build([write_run(Path(sys.argv[1]))]))
