"""report.md: the headline and the tables in GitHub's Markdown."""

from __future__ import annotations

import re
from typing import Any

from temper.report import fronts, learning, phrases, tables
from temper.report.read import Run
from temper.report.tables import Cell, Table
from temper.report.ways import ways


def escape(text: str) -> str:
    """Text that Markdown and the HTML in it show as it stands, on one line.

    >>> escape("a|b <i>")
    'a\\\\|b &lt;i&gt;'
    """
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|*_`\[\]~#!])", r"\\\1", text)


def of_run(run: Run) -> str:
    """The report of one run."""
    m = run.manifest
    facts = [phrases.profiled(m.profile), phrases.moment(m.created)]
    parts = [f"# {escape(m.recipe or run.name)}", escape(" · ".join(fact for fact in facts if fact))]
    parts.append(_state(run))
    for name, evaluation in run.evaluations.items():
        stage = next(s for s in run.stages if s.name == name)
        parts += [f"## {escape(name)}", _list([f.text for f in phrases.findings(evaluation)])]
        parts.append(table(tables.results_table(evaluation, stage.rows, tables.judge(run, stage))))
        if costs := ways(run, evaluation):
            parts += [f"### {costs.title}", table(costs)]
        if evaluation.comparisons:
            parts.append(table(tables.comparisons_table(evaluation)))
        if evaluation.spread:
            parts += ["### Spread over seeds", table(tables.spread_table(evaluation))]
    if not run.evaluations:
        parts.append("No stage of this run evaluated a model.")
    for front in fronts.fronts(run):
        parts += [f"## {escape(front.title)}", table(front.table)]
    for curve in learning.learning(run):
        parts += [f"## {escape(curve.stage.name)}: {escape(curve.title)}", _list(curve.findings), table(curve.table)]
    for swept in fronts.sweeps(run):
        parts += [f"## Sweep: {escape(swept.stage.name)}", escape(swept.finding), table(swept.table)]
    for stage in run.stages:
        if stage.card:
            parts += [f"## Data: {escape(stage.name)}", table(tables.rows_table(stage.card))]
    parts += ["## Cost", table(tables.cost_table(run))]
    if used := tables.facts_tables(run):
        parts += ["## What was really used", *map(table, used)]
    return "\n\n".join(part for part in parts if part) + "\n"


def of_runs(shown: dict[str, Any]) -> str:
    """The comparison of several runs, of what `across.view` gives."""
    parts = [f"# {escape(shown['title'])}", _list(shown["notices"])]
    for one, found, tested in shown["between"]:
        parts += [f"## {escape(one.name)}", _list([f.text for f in found] if tested.rows else one.notes)]
    for label, run in shown["named"]:
        if state := _state(run):
            parts += [f"## {escape(label)}", state]
    against = [tested for *_, tested in shown["between"] if tested.rows]
    for heading, found in (
        ("Results", shown["results"]),
        ("The runs against each other", against),
        ("Comparisons within each run", shown["comparisons"]),
    ):
        for one in found:
            parts += [f"## {heading}: {escape(one.title)}", table(one)]
    parts += ["## Cost", table(shown["cost"])]
    if shown["settings"]:
        parts += ["## Settings that differ", table(shown["settings"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(shown: Table) -> str:
    """A table in Markdown, its notes below it."""
    head = "| " + " | ".join(_cell(cell) for cell in shown.head) + " |"
    rule = "|" + "|".join(" ---: " if cell.numeric else " --- " for cell in shown.head) + "|"
    body = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in shown.rows]
    lines = "\n".join([head, rule, *body])
    notes = "\n".join(f"<sub>{escape(note)}</sub><br>" for note in shown.notes)
    return f"{lines}\n\n{notes}" if notes else lines


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    text = f"**{text}**" if cell.mark == "best" else text
    return f"{text} ({escape(cell.note)})" if cell.note and cell.text else text


def _state(run: Run) -> str:
    failed = [f"{s.name} failed: {s.error or 'no error was recorded'}" for s in run.stages if s.status == "failed"]
    pending = [f"{s.name} has not run" for s in run.stages if s.status == "pending"]
    warned = [f"{name}: {text}" for name, text in run.warnings]
    titled = (("Not finished", failed + pending), ("Could not be read", run.problems), ("Warnings", warned))
    return "\n\n".join(f"**{title}**\n\n{_list(lines)}" for title, lines in titled if lines)


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)
