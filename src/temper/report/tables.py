"""The tables of a report, once, for HTML and for Markdown."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from temper.report.contract import Card, Evaluation
from temper.report.phrases import (
    ALPHA,
    NONE,
    arrow,
    compact,
    count,
    decimals,
    duration,
    number,
    p_value,
    percent,
    size,
    verdict,
)
from temper.report.read import Run, Stage

SHORT = 24  # characters of a fact that fits a column


@dataclass(frozen=True)
class Cell:
    """One cell, as text."""

    text: str
    note: str = ""  # shown smaller, under or behind the text: an interval, a share
    mark: str = ""  # best | better | worse | different | unclear | failed
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A table before it is HTML or Markdown."""

    head: list[Cell]  # numeric says how the column is aligned
    rows: list[list[Cell]]
    title: str = ""
    notes: list[str] = field(default_factory=list)


def words(text: str, note: str = "", mark: str = "") -> Cell:
    return Cell(text, note, mark, numeric=False)


def places_of(evaluation: Evaluation) -> dict[str, int]:
    """Metric → decimal places, the same for all models."""
    return {
        metric: decimals([(m[metric].low, m[metric].high) for m in evaluation.models.values() if metric in m])
        for metric in evaluation.metrics
    }


def best(evaluation: Evaluation) -> dict[str, str]:
    """Metric → the model that is better than each other one, where every one of these comparisons is significant.

    A metric without such a model is not in it: the highest number alone is no reason to mark anything.
    """
    out = {}
    for metric in evaluation.metrics:
        higher = evaluation.higher_is_better(metric)
        beaten: dict[str, set[str]] = {}
        for c in evaluation.comparisons:
            if c.metric == metric and (kind := verdict(c, higher)) in ("better", "worse"):
                winner, loser = (c.b, c.a) if kind == "better" else (c.a, c.b)
                beaten.setdefault(winner, set()).add(loser)
        having = {name for name, measured in evaluation.models.items() if metric in measured}
        for name in having:
            if len(having) > 1 and beaten.get(name, set()) >= having - {name}:
                out[metric] = name
    return out


def cut_answers(rows: pa.Table | None, model: str) -> tuple[int, int] | None:
    """(answers ended by the length limit, answers) of a model; None where it is not known."""
    if rows is None or f"{model}|ended" not in rows.column_names:
        return None
    ended = [value for value in rows[f"{model}|ended"].to_pylist() if value is not None]
    return ended.count(False), len(ended)


def results_table(evaluation: Evaluation, rows: pa.Table | None, judged: str = "") -> Table:
    """Models × metrics with intervals; the signatures are the notes.

    Args:
        judged: what is known of the classifier that was asked (see `judge`), shown beside the signatures of toxicity.
    """
    places, winners, notes = places_of(evaluation), best(evaluation), _signatures(evaluation, judged)
    marks = {metric: f"[{i}]" for i, metric in enumerate(evaluation.metrics, 1)}
    head = [words("model")]
    head += [Cell(f"{metric} {arrow(evaluation.higher_is_better(metric))}".strip(), marks[metric]) for metric in places]
    cuts = {name: cut_answers(rows, name) for name in evaluation.models}
    head += [Cell("n")] + ([Cell("cut by limit")] if any(cuts.values()) else [])
    body = []
    for name, measured in evaluation.models.items():
        line = [words(name)]
        counts = {m.n for m in measured.values()}
        for metric, digits in places.items():
            m = measured.get(metric)
            if m is None:
                line.append(Cell(NONE))
                continue
            note = f"{number(m.low, digits)} to {number(m.high, digits)}" if m.low is not None else ""
            if len(counts) > 1:
                note += f", n {m.n}"
            line.append(Cell(number(m.value, digits), note, "best" if winners.get(metric) == name else ""))
        line.append(Cell(count(max((n for n in counts if n is not None), default=None))))
        if any(cuts.values()):
            cut = cuts[name]
            line.append(Cell(f"{cut[0]:,}", percent(cut[0] / max(cut[1], 1))) if cut else Cell(NONE))
        body.append(line)
    if winners:
        notes.insert(0, "Marked: better than every other model, each comparison significant after Holm's correction.")
    return Table(head, body, notes=notes)


def judge(run: Run, stage: Stage) -> str:
    """How often the classifier is right that an evaluation asked, where it is a stage of the same run; else ""."""
    name = stage.info.config.get("classifier") if stage.info else None
    asked = next((s for s in run.stages if s.name == name and s.info), None)
    facts = asked.info.facts if asked and asked.info else {}
    for split in ("test", "validation"):
        if isinstance(share := facts.get(f"{split} accuracy"), int | float):
            return f"The classifier is the stage {name}, right on {percent(share)} of its {split} rows."
    return ""


def _signatures(evaluation: Evaluation, judged: str) -> list[str]:
    notes = []
    for i, metric in enumerate(evaluation.metrics, 1):
        seen = dict.fromkeys(m[metric].signature for m in evaluation.models.values() if metric in m)
        text = " ≠ ".join(s or "no signature" for s in seen)
        warn = " The models were not measured alike: do not compare these numbers." if len(seen) > 1 else ""
        told = f" {judged}" if judged and metric.startswith("toxicity") else ""
        notes.append(f"[{i}] {metric}: {text}.{told}{warn}")
    return notes


def comparisons_table(evaluation: Evaluation) -> Table:
    """Every pair that was compared, its difference with its interval, and what follows from it."""
    head = [words("metric"), words("comparison"), Cell("difference"), Cell("95 % interval"), Cell("p")]
    head += [Cell("p adjusted"), Cell("smallest detectable"), words("finding")]
    said = {
        "better": "better",
        "worse": "worse",
        "different": "different",
        "unclear": "not told apart",
        "untested": "no test",
    }
    body = []
    for c in evaluation.comparisons:
        digits = decimals([(c.low, c.high)])
        higher = evaluation.higher_is_better(c.metric)
        kind = verdict(c, higher)
        body.append(
            [
                words(f"{c.metric} {arrow(higher)}".strip()),
                words(f"{c.b} − {c.a}"),
                Cell(number(c.difference, digits, sign=True)),
                Cell(
                    f"{number(c.low, digits, sign=True)} to {number(c.high, digits, sign=True)}"
                    if c.low is not None
                    else NONE
                ),
                Cell(p_value(c.p)),
                Cell(p_value(c.p_adjusted)),
                Cell(number(c.smallest_detectable, digits)),
                words(said[kind], mark=kind),
            ]
        )
    notes = ["Paired over the same rows. p adjusted: Holm's correction over the comparisons of this evaluation."]
    if any(verdict(c, None) == "untested" for c in evaluation.comparisons):
        notes.append("No test: how far a maximum varies cannot be told from the rows that gave it.")
    return Table(head, body, notes=[*notes, *_of_detectable(evaluation)])


def _of_detectable(evaluation: Evaluation) -> list[str]:
    """What the smallest detectable difference stands for here."""
    level = next((c.detectable_level for c in evaluation.comparisons if c.smallest_detectable is not None), None)
    if level is None:
        return []
    text = "Smallest detectable: the true difference that so many rows would show in at least 80 % of cases"
    together = round(ALPHA / level)
    divided = f" ({ALPHA} ÷ {together} comparisons, where Holm's correction begins)" if together > 1 else ""
    return [f"{text}, at p < {level:.2g}{divided}."]


def spread_table(evaluation: Evaluation) -> Table:
    """How far the same training falls apart under other seeds."""
    body = []
    for model, metrics in evaluation.spread.items():
        for metric, s in metrics.items():
            values = [v for v in s.values if v is not None]
            digits = decimals([(min(values), max(values))] if values else [])
            shown = ", ".join(number(v, digits) for v in s.values)
            mean, sd = number(s.mean, digits), number(s.sd, digits)
            body.append([words(model), words(metric), Cell(mean), Cell(sd), Cell(shown)])
    return Table([words("model"), words("metric"), Cell("mean"), Cell("sd"), Cell("seeds")], body)


def cost_table(run: Run) -> Table:
    """What each stage took: time, tokens, memory, disk."""
    head = [words("stage"), words("status"), Cell("time"), Cell("tokens"), Cell("tokens/s"), Cell("peak memory")]
    head += [Cell("examples"), Cell("steps"), Cell("trainable parameters"), Cell("on disk")]
    body = [[words(stage.name, stage.kind), status(stage), *cost_cells(stage)] for stage in run.stages]
    infos = [stage.info for stage in run.stages if stage.info]
    peak = max((i.peak_memory_bytes or 0 for i in infos), default=0)
    total = [words("all"), words(""), Cell(duration(sum(i.seconds or 0 for i in infos)))]
    total += [Cell(count(sum(i.tokens or 0 for i in infos) or None)), Cell(""), Cell(size(peak or None))]
    total += [Cell(""), Cell(""), Cell(""), Cell(size(sum(i.bytes_on_disk or 0 for i in infos)))]
    notes = ["Time: all starts of the stage, loading included. tokens/s: tokens ÷ that time."]
    if run.manifest.seconds is not None:
        notes.append(f"The last start took {duration(run.manifest.seconds)}; cached stages were not run again in it.")
    return Table(head, body + ([total] if len(infos) > 1 else []), notes=notes)


def cost_cells(stage: Stage) -> list[Cell]:
    """One stage's figures in `cost_table`, from time to disk."""
    i = stage.info
    if i is None:
        return [Cell(NONE)] * 8
    speed = i.tokens / i.seconds if i.tokens and i.seconds else None
    trained = f"{percent(i.trained_tokens / i.tokens)} trained" if i.tokens and i.trained_tokens is not None else ""
    share = ""
    if i.trainable_parameters is not None and i.parameters:
        share = f"{percent(i.trainable_parameters / i.parameters)} of {count(i.parameters)}"
    return [
        Cell(duration(i.seconds)),
        Cell(count(i.tokens), trained),
        Cell(count(round(speed)) if speed is not None else NONE),
        Cell(size(i.peak_memory_bytes)),
        Cell(count(i.examples)),
        Cell(count(i.steps)),
        Cell(count(i.trainable_parameters), share),
        Cell(size(i.bytes_on_disk)),
    ]


def status(stage: Stage) -> Cell:
    """How a stage ended, in a word."""
    if stage.status == "failed":
        return words("failed", mark="failed")
    if stage.partial:
        return words("unfinished", mark="failed")
    if stage.cached:
        return words("cached")
    return words(stage.status)


def rows_table(card: Card) -> Table:
    """Rows in → dropped by reason → rows out, and the splits."""
    body = [[words("rows in"), Cell(count(card.rows_in))]]
    for reason, n in sorted(card.dropped.items(), key=lambda item: -item[1]):
        share = percent(n / card.rows_in) if card.rows_in else ""
        body.append([words(f"dropped: {reason}"), Cell(f"−{n:,}" if n else "0", share)])
    body.append([words("rows out"), Cell(count(card.rows_out))])
    body += [[words(f"in {split}"), Cell(count(n))] for split, n in card.splits.items()]
    if card.cut is not None:
        body.append([words("cut short, not dropped"), Cell(count(card.cut))])
    for reason, n in card.rejected.items():
        body.append([words(f"answers rejected, asked for again: {reason}"), Cell(count(n))])
    leaks = card.leaks
    if leaks.get("checked"):
        for kind in ("exact", "near"):
            n = leaks.get(kind)
            body.append([words(f"rows in more than one split ({kind})"), Cell(count(n), mark="worse" if n else "")])
    else:
        body.append([words("rows in more than one split"), words("not checked")])
    return Table([words("rows"), Cell("count")], body)


def lengths_table(card: Card) -> Table | None:
    """How long the columns of each split are; None where the card has no lengths."""
    keys = ("min", "median", "p95", "max")
    body = [
        [words(split), words(column, str(values.get("unit", ""))), *(Cell(compact(values.get(k, NONE))) for k in keys)]
        for split, columns in card.lengths.items()
        for column, values in columns.items()
    ]
    return Table([words("split"), words("length of"), *(Cell(k) for k in keys)], body) if body else None


def settings_table(stage: Stage) -> Table:
    """The stage's configuration as it was used, defaults filled in."""
    assert stage.info
    flat = flatten(stage.info.config)
    return Table([words("setting"), words("value")], [[words(k), words(v)] for k, v in flat.items()])


def facts_tables(run: Run) -> list[Table]:
    """What was really used: a column a short fact, with each stage's key; and facts that are sentences, a line each."""
    stages = [stage for stage in run.stages if stage.info]
    said = [(s.name, name, plain(fact)) for s in stages if s.info for name, fact in s.info.facts.items()]
    long = {name for _, name, text in said if len(text) > SHORT}
    names = list(dict.fromkeys(name for _, name, _ in said if name not in long))
    head = [words("stage"), words("key"), *(words(name.replace("_", " ")) for name in names)]
    body = []
    for stage in stages:
        facts = stage.info.facts if stage.info else {}
        key = stage.info.key[:12] if stage.info else ""
        body.append([words(stage.name), words(key), *(words(plain(facts[n]) if n in facts else NONE) for n in names)])
    sentences = [[words(at), words(name.replace("_", " ")), words(text)] for at, name, text in said if name in long]
    tables = [Table(head, body), Table([words("stage"), words("fact"), words("value")], sentences)]
    return [table for table in tables if table.rows]


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """
    >>> flatten({"adapter": {"r": 16}, "lr": 1e-4})
    {'adapter.r': '16', 'lr': '0.0001'}
    """
    out: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = plain(value)
    return out


def plain(value: Any) -> str:
    """A setting as text: JSON, but strings and numbers as they are."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
