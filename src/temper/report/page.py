"""Run folders → index.html, report.md and results.json."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from temper.report import across, fronts, learning, phrases, tables
from temper.report.contract import Card, Evaluation
from temper.report.curves import figures
from temper.report.markdown import of_run, of_runs
from temper.report.plots import Dot, dots
from temper.report.read import Run, Stage, read_run, results_of
from temper.report.samples import Group, choose
from temper.report.ways import ways
from temper.report.worst import hardest, legend

HERE = Path(__file__).parent


def build(runs: list[Path], out: Path | None = None) -> Path:
    """Writes the report of one run, or one that compares several, and returns the path of its index.html.

    Args:
        runs: run folders.
        out: the folder to write into; by default RUN/report, for several runs `report-A-B` beside the first.

    Raises:
        RunError: one of them is not a run folder. Files in it that are broken are reported in the page instead.
    """
    read = [read_run(path) for path in runs]
    if len(read) == 1:
        out = out or read[0].path / "report"
        html, text, results = _page("page.html", _of_run(read[0])), of_run(read[0]), results_of(read[0])
    else:
        out = out or read[0].path.parent / ("report-" + "-".join(run.name for run in read))
        shown = across.view(read)
        html, text, results = _page("compare.html", shown), of_runs(shown), across.results_of_runs(read, shown)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "report.md", text)
    _write(out / "results.json", json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    _write(out / "index.html", html)
    return out / "index.html"


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a reader never meets half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, "utf-8", errors="backslashreplace")
    os.replace(beside, path)


def _page(template: str, context: dict[str, Any]) -> str:
    # Models write hostile text: everything is escaped but what this package marks as its own SVG and CSS.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": phrases.size, "duration": phrases.duration, "moment": phrases.moment}
    environment.filters |= {
        "plain": tables.plain,
        "count": phrases.count,
        "compact": phrases.compact,
        "profiled": phrases.profiled,
    }
    style = Markup((HERE / "page.css").read_text("utf-8"))
    return environment.get_template(template).render(style=style, **context)


@dataclass(frozen=True)
class Panel:
    """One metric of an evaluation as two plots: the values, and the differences."""

    title: str
    values: Markup
    differences: Markup | None


@dataclass(frozen=True)
class EvaluationView:
    """What the page shows of one evaluation."""

    stage: Stage
    evaluation: Evaluation
    findings: list[phrases.Finding]
    results: tables.Table
    ways: tables.Table | None
    comparisons: tables.Table | None
    spread: tables.Table | None
    panels: list[Panel]
    groups: list[Group]
    colours: dict[str, int]


@dataclass(frozen=True)
class DataView:
    """What the page shows of one data stage."""

    stage: Stage
    card: Card
    rows: tables.Table
    lengths: tables.Table | None
    dropped: list[tuple[str, list[dict[str, Any]]]]  # reason, some of its rows


def _of_run(run: Run) -> dict[str, Any]:
    colours = across.model_colours([run])
    return {
        "title": f"{run.manifest.recipe or run.name} · {run.manifest.profile or 'no profile'}",
        "run": run,
        "manifest": run.manifest,
        "command": shlex.join(run.manifest.command),
        "evaluations": [_evaluation(run, stage, colours) for stage in run.stages if stage.evaluation],
        "curves": [
            (stage, figures(stage.metrics), hardest(stage.worst))
            for stage in run.stages
            if stage.metrics or stage.samples
        ],
        "shades": legend(),
        "sweeps": fronts.sweeps(run),
        "learning": learning.learning(run),
        "fronts": fronts.fronts(run),
        "data": [_data(stage) for stage in run.stages if stage.card],
        "cost": tables.cost_table(run),
        "facts": tables.facts_tables(run),
        "settings": [(stage, tables.settings_table(stage)) for stage in run.stages if stage.info],
        "failed": [stage for stage in run.stages if stage.status == "failed"],
        "pending": [stage.name for stage in run.stages if stage.status == "pending"],
    }


def _evaluation(run: Run, stage: Stage, colours: dict[str, int]) -> EvaluationView:
    evaluation = stage.evaluation
    assert evaluation
    return EvaluationView(
        stage,
        evaluation,
        phrases.findings(evaluation),
        tables.results_table(evaluation, stage.rows, tables.judge(run, stage)),
        ways(run, evaluation),
        tables.comparisons_table(evaluation) if evaluation.comparisons else None,
        tables.spread_table(evaluation) if evaluation.spread else None,
        [panel for metric in evaluation.metrics if (panel := _panel(evaluation, metric, colours))],
        choose(evaluation, stage.rows) if stage.rows is not None else [],
        colours,
    )


def _panel(evaluation: Evaluation, metric: str, colours: dict[str, int]) -> Panel | None:
    places = tables.places_of(evaluation)[metric]
    values = []
    for name, measured in evaluation.models.items():
        m = measured.get(metric)
        if m is None or m.value is None:
            continue
        spread = evaluation.spread.get(name, {}).get(metric)
        seeds = [v for v in spread.values if v is not None] if spread else []
        values.append(Dot(name, m.value, m.low, m.high, colours[name], phrases.number(m.value, places), seeds))
    differences = []
    for c in evaluation.comparisons:
        if c.metric == metric and c.difference is not None:
            text = phrases.number(c.difference, phrases.decimals([(c.low, c.high)]), sign=True)
            differences.append(Dot(f"{c.b} − {c.a}", c.difference, c.low, c.high, colours.get(c.b, 0), text))
    if not values:
        return None
    return Panel(
        f"{metric} {phrases.arrow(evaluation.higher_is_better(metric))}".strip(),
        dots(values, f"{metric} of each model with 95 % intervals"),
        dots(differences, f"differences in {metric} with 95 % intervals", zero=True) if differences else None,
    )


def _data(stage: Stage) -> DataView:
    assert stage.card
    seen: Counter[str] = Counter()
    shown: dict[str, list[dict[str, Any]]] = {}
    for row in stage.dropped:
        reason = str(row.get("reason"))
        seen[reason] += 1
        if seen[reason] <= 2:
            shown.setdefault(reason, []).append(row)
    card = stage.card
    return DataView(stage, card, tables.rows_table(card), tables.lengths_table(card), list(shown.items()))
