"""How Temper's costs grow: with the number of examples, with the number of rows a data stage reads, with a group's completions.

    python benchmarks/growth.py [--examples 1000,10000,100000] [--rows 10000,100000,1000000] [--of 1,2,4,8,16] [--threads 1]

Three tables are printed, and written to benchmarks/results/growth.json, of which `pages.py` makes plots; an empty list
leaves a table out and keeps what was measured before. Each number of rows is read in a process of its own, since memory
that was taken is not given back.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
STEPS = 200  # of which the packing is timed
PROMPT, COMPLETION = 600, 64  # tokens of a group


class Table(NamedTuple):
    columns: tuple[str, ...]
    rows: list[tuple[float, ...]]


def by_examples(counts: list[int]) -> Table:
    """Microseconds a token of preparing rows, and of packing a step: the second must not grow with the set."""
    import preparation

    preparation.Prepared(preparation.rows(counts[0])).prepared()  # imports, and the tokenizer
    out = []
    for n in counts:
        side = preparation.Prepared(preparation.rows(n))
        began = time.perf_counter()
        batches = side.prepared()
        prepared = (time.perf_counter() - began) / batches.trees.sizes.sum()
        steps = min(STEPS, batches.per_epoch)
        batches.rows(0)  # the order of an epoch is drawn once
        began = time.perf_counter()
        tokens = sum(row.tokens for k in range(steps) for row in batches.rows(k))
        out.append((n, 1e6 * prepared, 1e6 * (time.perf_counter() - began) / tokens))
    return Table(("examples", "µs/token preparing", "µs/token packing a step"), out)


def by_rows(counts: list[int]) -> Table:
    """A data stage from JSON lines to parquet: seconds, and the most memory above what its imports take."""
    out = []
    for n in counts:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, __file__, "--stage", str(n), folder], check=True, capture_output=True, text=True
            )
            size, seconds, peak = json.loads(done.stdout.splitlines()[-1])
        out.append((n, size / 1e6, seconds, peak / 1e6))
    return Table(("rows", "file MB", "seconds", "peak MB"), out)


def _stage(n: int, folder: Path) -> tuple[int, float, int]:
    """Bytes of the file, seconds and bytes of one data stage of n rows."""
    import worker

    from temper import stages  # noqa: F401  what a run imports is not counted
    from temper.app import run_recipe

    file = folder / "rows.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for k in range(n):
            out.write(
                json.dumps({"prompt": f"What is {k} and {k} more?", "completion": f"It is {2 * k}, of course."}) + "\n"
            )
    recipe = folder / "recipe.yaml"
    stage = {"stage": "data", "source": "rows.jsonl"}
    recipe.write_text(json.dumps({"name": "growth", "stages": {"rows": stage}}), encoding="utf-8")
    worker.reset_peak()
    before, began = worker.status("VmRSS:"), time.perf_counter()
    run_recipe(recipe, out=folder / "run", quiet=True)
    return file.stat().st_size, time.perf_counter() - began, worker.status("VmHWM:") - before


def by_completions(counts: list[int]) -> Table:
    """Forward and backward of a prompt with k completions: as one tree, and as k sequences."""
    import numpy as np
    import shapes
    import torch
    from transformers import AutoModelForCausalLM

    from temper.models.proof import prove
    from temper.models.scores import Policy
    from temper.trees import Row, group, join, rows_of

    with tempfile.TemporaryDirectory() as folder:
        policy = Policy(AutoModelForCausalLM.from_pretrained(shapes.saved(Path(folder) / "base"), dtype=torch.float32))
    assert prove(policy)["layout"] == "tree"
    draw = np.random.default_rng(0)

    def ids(n: int) -> list[int]:
        return draw.integers(shapes.FIRST, shapes.VOCABULARY, n).tolist()

    def timed(rows: list[Row]) -> tuple[float, float]:
        """Seconds, the better of two, and the loss."""
        took = []
        for _ in range(2):
            began, total = time.perf_counter(), 0.0
            policy.zero_grad()
            for row in rows:
                loss = policy(row).sum()
                loss.backward()
                total += float(loss.detach())
            took.append(time.perf_counter() - began)
        return min(took), total

    out = []
    for k in counts:
        prompt, completions = ids(PROMPT), [ids(COMPLETION) for _ in range(k)]
        tree, same = timed([join([group(prompt, completions)])])
        apart, value = timed(rows_of([group(prompt, [c]) for c in completions], 256, 4096))
        assert abs(same - value) < 1e-4 * abs(value), (same, value)
        out.append((k, tree, apart))
    return Table(("completions", "one tree, s", "apart, s"), out)


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def show(title: str, table: Table) -> None:
    lines = [table.columns, *([f"{row[0]:,}", *(f"{x:.2f}" for x in row[1:])] for row in table.rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(table.columns))]
    print(f"\n{title}")
    for line in lines:
        print("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--stage"]:
        print(json.dumps(_stage(int(sys.argv[2]), Path(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=numbers, default=[1000, 10_000, 100_000])
    parser.add_argument("--rows", type=numbers, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--of", type=numbers, default=[1, 2, 4, 8, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "growth.json")
    asked: Any = parser.parse_args()
    import torch

    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TEMPER_BENCH_BASE"] = str(Path(folder) / "base")  # beside it the tokenizer is kept
        for name, title, measured, counts in (
            ("examples", "a token's preparation, and its part of a step", by_examples, asked.examples),
            ("rows", "a data stage", by_rows, asked.rows),
            ("completions", f"a prompt of {PROMPT} tokens with completions of {COMPLETION}", by_completions, asked.of),
        ):
            if counts:
                table = measured(counts)
                show(title, table)
                kept = json.loads(asked.out.read_text()) if asked.out.is_file() else {}
                kept[name] = {"columns": table.columns, "rows": table.rows}
                asked.out.parent.mkdir(exist_ok=True)
                asked.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
