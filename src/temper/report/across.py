"""Several runs side by side: the same tables with a column a run.

Runs are shown next to each other, not tested against each other; that is for an evaluate stage which names both
models, because only it knows that the rows, the decoding and the metrics are the same.
"""

from __future__ import annotations

from typing import Any

from temper.report import phrases
from temper.report.curves import overlaid
from temper.report.phrases import NONE, arrow, decimals, number
from temper.report.read import Run
from temper.report.tables import Cell, Table, best, cost_cells, flatten, places_of, words


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
    return {
        "title": " · ".join(label for label, _ in named),
        "named": named,
        "findings": findings,
        "notices": notices(named),
        "results": results(named),
        "comparisons": comparisons(named),
        "curves": curves,
        "cost": cost(named),
        "settings": settings(named),
    }


def notices(named: list[tuple[str, Run]]) -> list[str]:
    """What forbids reading the numbers of one row against each other."""
    out = []
    for name in _evaluation_names(named):
        having = {label: run.evaluations[name] for label, run in named if name in run.evaluations}
        hashes = {e.data.get("sha256") for e in having.values()}
        if len(hashes) > 1:
            out.append(f"{name}: the runs were evaluated on different rows; their numbers cannot be compared.")
        if len({str(sorted(e.decoding.items())) for e in having.values()}) > 1:
            out.append(f"{name}: the runs decoded with different settings.")
        for metric in dict.fromkeys(m for e in having.values() for m in e.metrics):
            signatures = {m[metric].signature for e in having.values() for m in e.models.values() if metric in m}
            if len(signatures) > 1:
                out.append(f"{name}: {metric} was not measured alike ({' ≠ '.join(sorted(signatures))}).")
    return out


def results(named: list[tuple[str, Run]]) -> list[Table]:
    """A table an evaluation: metric and model × run."""
    out = []
    for name in _evaluation_names(named):
        having = [run.evaluations.get(name) for _, run in named]
        metrics = dict.fromkeys(metric for e in having if e for metric in e.metrics)
        body = []
        for metric in metrics:
            for model in dict.fromkeys(model for e in having if e for model in e.models):
                line = [words(metric), words(model)]
                for e in having:
                    m = e.models.get(model, {}).get(metric) if e else None
                    if e is None or m is None:
                        line.append(Cell(NONE))
                        continue
                    places = places_of(e)[metric]
                    note = f"{number(m.low, places)} to {number(m.high, places)}" if m.low is not None else ""
                    line.append(Cell(number(m.value, places), note, "best" if best(e).get(metric) == model else ""))
                if any(cell.text != NONE for cell in line[2:]):
                    body.append(line)
        directions = {metric: e.higher_is_better(metric) for e in having if e for metric in e.metrics}
        for line in body:
            line[0] = words(f"{line[0].text} {arrow(directions[line[0].text])}".strip())
        out.append(Table([words("metric"), words("model"), *_heads(named)], body, title=name))
    return out


def comparisons(named: list[tuple[str, Run]]) -> list[Table]:
    """A table an evaluation: comparison × run."""
    out = []
    for name in _evaluation_names(named):
        having = [run.evaluations.get(name) for _, run in named]
        found = [{(c.metric, c.a, c.b): c for c in e.comparisons} if e else {} for e in having]
        body = []
        for key in dict.fromkeys(key for one in found for key in one):
            metric, a, b = key
            higher = next((e.higher_is_better(metric) for e in having if e and metric in e.metrics), None)
            line = [words(f"{metric} {arrow(higher)}".strip()), words(f"{b} − {a}")]
            for e, one in zip(having, found, strict=True):
                c = one.get(key)
                if e is None or c is None:
                    line.append(Cell(NONE))
                    continue
                places = decimals([(c.low, c.high)])
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
    """The settings in which the runs differ."""
    flat = [
        {"seed": str(run.manifest.seed), "temper": run.manifest.temper}
        | {f"package {name}": str(version) for name, version in run.manifest.packages.items()}
        | flatten({stage.name: stage.info.config for stage in run.stages if stage.info})
        for _, run in named
    ]
    body = []
    for key in dict.fromkeys(key for one in flat for key in one):
        values = [one.get(key, NONE) for one in flat]
        if len(set(values)) > 1:
            body.append([words(key), *(words(value) for value in values)])
    return Table([words("setting"), *(words(label) for label, _ in named)], body) if body else None


def _evaluation_names(named: list[tuple[str, Run]]) -> list[str]:
    return list(dict.fromkeys(name for _, run in named for name in run.evaluations))


def _heads(named: list[tuple[str, Run]]) -> list[Cell]:
    return [Cell(label) for label, _ in named]
