"""The tables and plots of docs/performance.md, made of what was measured: benchmarks/results/.

    python benchmarks/pages.py

What stands between the two marks of the page is replaced; the plots are docs/picture/growth.svg.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
PICTURE = HERE.parent / "docs" / "picture" / "growth.svg"
BEGIN, END = "<!-- measured: made by benchmarks/pages.py -->", "<!-- end of what was measured -->"
COLOURS = ("#0072b2", "#d55e00")


def contests(results: dict[str, Any]) -> list[str]:
    """One machine's results as Markdown."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    peak = machine["peak_gflops"]
    out = [
        f"**{machine['processor']}{f' ({m})' if (m := machine.get('model')) else ''}, {machine['threads']} threads**, {versions}; peak in products of matrices {peak['float32']} "
        f"GFLOP/s in float32, {peak['bf16']} in bf16.",
        "",
        "| workload | against | times as fast (range) | asked | memory | share of peak | useful tokens/s | losses differ by |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for w in results["workloads"]:
        ratio, share, wanted = w["time_ratio"], w["peak_share"], w.get("share_asked")
        out.append(
            f"| {w['name']} | {w['against']} | {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) | "
            f"{_or_dash(w['asked'], 'g')} | {w['memory_ratio']:.2f} | {_or_dash(share, '.0%')}"
            f"{f' (asked {wanted:.0%})' if wanted else ''} | {w['useful_tokens_per_second']['temper']:,.0f} | "
            f"{w['loss_difference']:.1e} |"
        )
    return out


def tables(growth: dict[str, Any]) -> list[str]:
    out: list[str] = []
    for table in growth.values():
        out += ["", f"| {' | '.join(table['columns'])} |", "|---" * len(table["columns"]) + "|"]
        out += [f"| {row[0]:,} | {' | '.join(f'{x:,.2f}' for x in row[1:])} |" for row in table["rows"]]
    return out


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def plots(growth: dict[str, Any]) -> str:
    """Three plots beside one another; numbers of examples and rows, and memory, by powers of ten."""
    wanted = [
        ("examples", "µs a token, over examples", (1, 2), True, False),
        ("rows", "peak MB of a data stage, over rows", (3,), True, True),
        ("completions", "seconds a group, over completions", (1, 2), False, False),
    ]
    out = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1080 300" font-family="sans-serif" font-size="12">',
        '<rect width="1080" height="300" fill="white"/>',
    ]
    for k, (name, title, columns, log_x, log_y) in enumerate(w for w in wanted if w[0] in growth):
        table = growth[name]
        out += _plot(360 * k, title, table["columns"], table["rows"], columns, log_x, log_y)
    return "\n".join([*out, "</svg>", ""])


def _plot(
    at: int, title: str, names: Sequence[str], rows: Sequence[Sequence[float]], columns: Sequence[int], log_x: bool,
    log_y: bool,
) -> list[str]:  # fmt: skip
    left, right, top, bottom = at + 60, at + 340, 40, 230

    def scaled(value: float, log: bool) -> float:
        return math.log10(value) if log else value

    xs = [scaled(row[0], log_x) for row in rows]
    ys = [scaled(row[c], log_y) for row in rows for c in columns]
    low, high = (math.floor(min(ys)), math.ceil(max(ys))) if log_y else (0.0, 1.1 * max(ys))

    def x_of(value: float) -> float:
        return left + (scaled(value, log_x) - min(xs)) / ((max(xs) - min(xs)) or 1) * (right - left)

    def y_of(value: float) -> float:
        return bottom - (scaled(value, log_y) - low) / ((high - low) or 1) * (bottom - top)

    out = [
        f'<text x="{left}" y="24" font-weight="bold">{title}</text>',
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#555"/>',
    ]
    marks = [10.0**k for k in range(int(low), int(high) + 1)] if log_y else [high * k / 4 for k in range(5)]
    out += [f'<text x="{left - 6}" y="{y_of(m) + 4:.0f}" text-anchor="end">{_number(m)}</text>' for m in marks]
    out += [f'<text x="{x_of(row[0]):.0f}" y="{bottom + 18}" text-anchor="middle">{row[0]:,.0f}</text>' for row in rows]
    for n, (c, colour) in enumerate(zip(columns, COLOURS, strict=False)):
        points = " ".join(f"{x_of(row[0]):.1f},{y_of(row[c]):.1f}" for row in rows)
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x_of(row[0]):.1f}" cy="{y_of(row[c]):.1f}" r="3" fill="{colour}"/>' for row in rows]
        out.append(f'<text x="{left}" y="{bottom + 38 + 16 * n}" fill="{colour}">{names[c]}</text>')
    return out


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    results = HERE / "results"
    growth = json.loads((results / "growth.json").read_text()) if (results / "growth.json").is_file() else {}
    made = [
        line
        for file in sorted(results.glob("*.json"))
        if "workloads" in json.loads(file.read_text())
        for line in [*contests(json.loads(file.read_text())), ""]
    ]
    if growth:
        PICTURE.write_text(plots(growth))
        made += ["![How costs grow](picture/growth.svg)", *tables(growth), ""]
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text("\n".join([before + BEGIN, "", *made, END]) + after)


if __name__ == "__main__":
    main()
