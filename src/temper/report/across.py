"""Several runs side by side: the same tables with a column a run.

Where runs were evaluated on the same rows, models of one name are tested against each other (`paired`); else they are
shown next to each other, and the page says why no more can be said.
"""

from __future__ import annotations

import re
from typing import Any

from temper.report import phrases
from temper.report.contract import Evaluation
from temper.report.curves import overlaid
from temper.report.paired import Between, between
from temper.report.phrases import NONE, arrow, decimals, number
from temper.report.read import SCHEMA, Run, results_of
from temper.report.tables import Cell, Table, best, comparisons_table, cost_cells, flatten, words

# What `seeds: N` calls its copies; a report knows stages by their names alone.
REPLICA = re.compile(r"(.+)-seed\d+")


def model_colours(runs: list[Run]) -> dict[str, int]:
    """Model → its colour, the same on the whole page."""
    models = dict.fromkeys(name for run in runs for e in run.evaluations.values() for name in e.models)
    return {name: i for i, name in enumerate(models)}


def labels(runs: list[Run]) -> list[str]:
    """A name for each run; the number disambiguates folders that are called alike."""
    names = [run.name for run in runs]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]


def view(runs: list[Run]) -> dict[str, Any]:
    """What compare.html shows."""
    named = list(zip(labels(runs), runs, strict=True))
    stages = dict.fromkeys(stage.name for run in runs for stage in run.stages if stage.metrics)
    curves = [
        (name, overlaid([(label, s.metrics) for label, run in named for s in run.stages if s.name == name]))
        for name in stages
    ]
    findings = [
        (label, [(name, phrases.findings(e)) for name, e in run.evaluations.items()], run) for label, run in named
    ]
    tested = [between(named, name) for name in _evaluation_names(named)]
    return {
        "title": " · ".join(label for label, _ in named),
        "named": named,
        "findings": findings,
        "notices": notices(named),
        "between": [(one, phrases.findings(one.evaluation), _between_table(one)) for one in tested],
        "results": results(named, tested),
        "comparisons": comparisons(named),
        "curves": curves,
        "cost": cost(named),
        "settings": settings(named),
    }


def results_of_runs(runs: list[Run], shown: dict[str, Any]) -> dict[str, Any]:
    """results.json of several runs: theirs, and between them what evaluation.json says within one; models are RUN/MODEL."""
    comparisons = {one.name: [c.model_dump() for c in one.evaluation.comparisons] for one, *_ in shown["between"]}
    return {"schema": SCHEMA, "runs": [results_of(run) for run in runs], "comparisons": comparisons}


def notices(named: list[tuple[str, Run]]) -> list[str]:
    """What forbids reading the numbers of one row against each other."""
    out = []
    names = _evaluation_names(named)
    if len(named) > 1 and not any(sum(name in run.evaluations for _, run in named) > 1 for name in names):
        having = (f"{label}: {', '.join(run.evaluations) or 'none'}" for label, run in named)
        out.append(f"The runs have no evaluation in common, so nothing compares their models ({'; '.join(having)}).")
    for name in names:
        having = {label: run.evaluations[name] for label, run in named if name in run.evaluations}
        hashes = {e.data.get("sha256") for e in having.values()}
        if len(hashes) > 1:
            out.append(f"{name}: the runs were evaluated on different rows; their numbers cannot be compared.")
        if differing := _differing([flatten(e.decoding) for e in having.values()]):
            out.append(f"{name}: the runs decoded with different settings ({', '.join(differing)}).")
        for metric in dict.fromkeys(m for e in having.values() for m in e.metrics):
            signatures = {m[metric].signature for e in having.values() for m in e.models.values() if metric in m}
            if len(signatures) > 1:
                out.append(f"{name}: {metric} was not measured alike ({' ≠ '.join(sorted(signatures))}).")
    return out


def _differing(decodings: list[dict[str, str]]) -> list[str]:
    """Settings with two values. One that a run does not have at all is of another version of Temper, not of its user."""
    keys = dict.fromkeys(key for one in decodings for key in one)
    values = {key: list(dict.fromkeys(one[key] for one in decodings if key in one)) for key in keys}
    return [f"{key} {' ≠ '.join(found)}" for key, found in values.items() if len(found) > 1]


def results(named: list[tuple[str, Run]], tested: list[Between]) -> list[Table]:
    """A table an evaluation: metric and model × run. Marked is a run that beats every other one with that model."""
    out = []
    for one in tested:
        having = [run.evaluations.get(one.name) for _, run in named]
        body = []
        for metric in dict.fromkeys(metric for e in having if e for metric in e.metrics):
            places = _places(having, metric)
            higher = next((e.higher_is_better(metric) for e in having if e and metric in e.metrics), None)
            for model in dict.fromkeys(model for e in having if e for model in e.models):
                winner = _winner(one.evaluation, metric, [f"{label}/{model}" for label, _ in named])
                line = [words(f"{metric} {arrow(higher)}".strip()), words(model)]
                for (label, _), e in zip(named, having, strict=True):
                    m = e.models.get(model, {}).get(metric) if e else None
                    if m is None:
                        line.append(Cell(NONE))
                        continue
                    note = f"{number(m.low, places)} to {number(m.high, places)}" if m.low is not None else ""
                    line.append(Cell(number(m.value, places), note, "best" if winner == f"{label}/{model}" else ""))
                if any(cell.text != NONE for cell in line[2:]):
                    body.append(line)
        marked = any(cell.mark for line in body for cell in line)
        notes = ["Marked: the run is better than every other one, after Holm's correction."] if marked else []
        out.append(Table([words("metric"), words("model"), *_heads(named)], body, title=one.name, notes=notes))
    return out


def _places(having: list[Evaluation | None], metric: str) -> int:
    """Decimal places of a metric, the same in every column."""
    found = [m[metric] for e in having if e for m in e.models.values() if metric in m]
    return decimals([(m.low, m.high) for m in found])


def _winner(evaluation: Evaluation, metric: str, names: list[str]) -> str | None:
    """Of the same model in several runs the one that is better than in each other run."""
    among = Evaluation(
        models={name: evaluation.models[name] for name in names if name in evaluation.models},
        comparisons=[c for c in evaluation.comparisons if c.a in names and c.metric == metric],
    )
    return best(among).get(metric)


def _between_table(one: Between) -> Table:
    """The comparisons between runs, and below them what could not be compared."""
    shown = comparisons_table(one.evaluation)
    notes = [*one.notes, *shown.notes] if shown.rows else one.notes
    return Table(shown.head, shown.rows, title=one.name, notes=notes)


def comparisons(named: list[tuple[str, Run]]) -> list[Table]:
    """A table an evaluation: comparison within a run × run."""
    out = []
    for name in _evaluation_names(named):
        having = [run.evaluations.get(name) for _, run in named]
        found = [{(c.metric, c.a, c.b): c for c in e.comparisons} if e else {} for e in having]
        body = []
        for key in dict.fromkeys(key for one in found for key in one):
            metric, a, b = key
            higher = next((e.higher_is_better(metric) for e in having if e and metric in e.metrics), None)
            places = decimals([(one[key].low, one[key].high) for one in found if key in one])
            line = [words(f"{metric} {arrow(higher)}".strip()), words(f"{b} − {a}")]
            for one in found:
                c = one.get(key)
                if c is None:
                    line.append(Cell(NONE))
                    continue
                note = f"{number(c.low, places, sign=True)} to {number(c.high, places, sign=True)}"
                note = note if c.low is not None else ""
                line.append(Cell(number(c.difference, places, sign=True), note, phrases.verdict(c, higher)))
            body.append(line)
        if body:
            out.append(Table([words("metric"), words("comparison"), *_heads(named)], body, title=name))
    return out


def cost(named: list[tuple[str, Run]]) -> Table:
    """Stage and quantity × run."""
    quantities = ["time", "tokens", "tokens/s", "peak memory", "examples", "steps", "trainable parameters", "on disk"]
    body = []
    for name in dict.fromkeys(stage.name for _, run in named for stage in run.stages):
        found = [next((s for s in run.stages if s.name == name), None) for _, run in named]
        columns = [cost_cells(stage) if stage else [Cell(NONE)] * len(quantities) for stage in found]
        for i, quantity in enumerate(quantities):
            line = [column[i] for column in columns]
            if any(cell.text != NONE for cell in line):
                body.append([words(name), words(quantity), *line])
    return Table([words("stage"), words("quantity"), *_heads(named)], body)


def settings(named: list[tuple[str, Run]]) -> Table | None:
    """The settings in which the runs differ; of a stage that only some have, that they have it."""
    flat = []
    for _, run in named:
        manifest, stages = run.manifest, [s for s in run.stages if s.info and not _is_copy(s.name, run)]
        one = {"seed": str(manifest.seed), "temper": manifest.temper}
        one |= {f"package {name}": str(version) for name, version in manifest.packages.items()}
        flat.append((one, {s.name: s for s in stages}))
    rows = [one for one, _ in flat]
    for name in dict.fromkeys(name for _, stages in flat for name in stages):
        having = [stages.get(name) for _, stages in flat]
        for one, stage in zip(rows, having, strict=True):
            if None in having:
                one[f"stage {name}"] = f"{stage.kind}" if stage else NONE
            elif stage and stage.info:
                one |= flatten({name: stage.info.config})
    body = []
    for key in dict.fromkeys(key for one in rows for key in one):
        values = [one.get(key, NONE) for one in rows]
        if len(set(values)) > 1:
            body.append([words(key), *(words(value) for value in values)])
    return Table([words("setting"), *(words(label) for label, _ in named)], body) if body else None


def _is_copy(name: str, run: Run) -> bool:
    """A copy that `seeds: N` made: its settings are its stage's."""
    found = REPLICA.fullmatch(name)
    return found is not None and any(stage.name == found[1] for stage in run.stages)


def _evaluation_names(named: list[tuple[str, Run]]) -> list[str]:
    return list(dict.fromkeys(name for _, run in named for name in run.evaluations))


def _heads(named: list[tuple[str, Run]]) -> list[Cell]:
    return [Cell(label) for label, _ in named]
