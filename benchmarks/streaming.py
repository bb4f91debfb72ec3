"""A parquet set that is larger than memory is meant to be: streamed through training, killed in the middle, and gone on with.

    python benchmarks/streaming.py
    python benchmarks/streaming.py --gigabytes 0.5

Rows have 10 kB of text, of which a few words are trained on, so that reading is what is measured: half of the set lies in one
row group, as pandas writes it, the rest in groups of 1,000 rows, as the hub does. A small model is trained on one epoch of it by
`temper run`, once undisturbed, and once killed after half of its steps and started again. Told: the process's memory as the
kernel counts it (VmRSS), in the first and the last third of the run and at most, and whether the two runs' weights are the
same bits. Written to results/streaming.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
from safetensors.torch import load_file

OUT = Path(__file__).parent / "results" / "streaming.json"
CHARACTERS, GROUP, WORDS, BATCH = 10_000, 1000, 4000, 256
RECIPE = """
name: streaming
stages:
  corpus: {{stage: data, source: mini:en-advice, text: "{{prompt}} {{chosen}}", take: 300, validation: 0, test: 0}}
  tiny: {{stage: pretrain, data: corpus, shape: {{vocabulary: 600, hidden: 32, layers: 1, heads: 1, context: 128}}, batch_size: 8, max_steps: 2}}
  set: {{stage: data, source: {folder}, prompt: "{{text|first 2 words}}", completion: "= {{number}}", stream: {{window: 5000}}, validation: 100, test: 100}}
  sft: {{stage: sft, model: tiny, data: set, batch_size: {batch}, epochs: 1, checkpoint_every: {every}, samples: 0, lr: 1.0e-3}}
"""  # fmt: skip


def written(folder: Path, gigabytes: float) -> tuple[int, int]:
    """Rows and bytes of a set."""
    draw = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in draw.integers(0, 26, draw.integers(3, 10))) for _ in range(WORDS)]
    schema = pyarrow.schema([("number", pyarrow.int64()), ("text", pyarrow.string())])
    each, rows = int(gigabytes * 5e8), 0
    for name, one in (("a.parquet", True), ("b.parquet", False)):
        with pyarrow.parquet.ParquetWriter(folder / name, schema, compression="none") as out:
            size, tables = 0, []
            while size < each:
                texts = [" ".join(words[i] for i in draw.integers(0, WORDS, CHARACTERS // 7))[:CHARACTERS] for _ in range(GROUP)]
                # words are drawn slowly: each text is taken eight times, its beginning new each time
                texts = [f"{words[int(draw.integers(WORDS))]} {words[int(draw.integers(WORDS))]} {t}" for t in texts for _ in range(8)]
                numbers = np.arange(rows, rows + len(texts))
                table = pyarrow.table({"number": numbers, "text": texts}, schema=schema)
                rows, size = rows + len(texts), size + sum(map(len, texts))
                if one:
                    tables.append(table)
                else:
                    out.write_table(table, row_group_size=GROUP)
            if one:
                out.write_table(pyarrow.concat_tables(tables), row_group_size=2**24)
    return rows, sum(p.stat().st_size for p in folder.iterdir())


def trained(words: list[str], out: Path, *, kill_at: int | None = None) -> tuple[float, list[float]]:
    """Seconds of a run, and its memory while it trains, MB, once a second."""
    began, memory = time.perf_counter(), []
    with (out.parent / f"{out.name}.log").open("a") as log:
        process = subprocess.Popen([*words, "--out", str(out)], stdout=log, stderr=log)
        seen = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(1)
            steps = [int(p.name[5:]) for p in (out / "sft.partial" / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
            if (out / "sft.partial").is_dir():
                try:
                    memory.append(seen.memory_info().rss / 1e6)
                except psutil.Error:
                    break
            if kill_at is not None and steps and max(steps) >= kill_at:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
    if kill_at is None and process.returncode:
        sys.exit((out.parent / f"{out.name}.log").read_text()[-2000:])
    return time.perf_counter() - began, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        home, data = Path(place), Path(place) / "data"
        data.mkdir()
        rows, size = written(data, asked.gigabytes)
        steps = rows // BATCH
        (home / "r.yaml").write_text(RECIPE.format(folder=data, batch=BATCH, every=max(1, steps // 20)), encoding="utf-8")
        print(f"{rows:,} rows, {size / 1e9:.2f} GB, {steps:,} steps", flush=True)
        words = [sys.executable, "-m", "temper", "run", str(home / "r.yaml"), "-q"]
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        seconds, memory = trained(words, home / "one")
        third = len(memory) // 3
        first, last = statistics.median(memory[third // 2 : third]), statistics.median(memory[-third:])
        print(f"undisturbed: {seconds:.0f} s; {first:.0f} MB in the first third, {last:.0f} in the last, {max(memory):.0f} at most", flush=True)
        trained(words, home / "two", kill_at=steps // 2)
        began, after = trained(words, home / "two")
        one, two = (load_file(home / out / "sft" / "model" / "model.safetensors") for out in ("one", "two"))
        same = one.keys() == two.keys() and all(bool((two[n] == x).all()) for n, x in one.items())
        print(f"killed after half and gone on with: {began:.0f} s more, {max(after):.0f} MB at most; the same bits: {same}")
        found: dict[str, Any] = {
            "rows": rows, "bytes": size, "steps": steps, "seconds": round(seconds), "seconds_after_half": round(began),
            "mb_first_third": round(first), "mb_last_third": round(last), "mb_at_most": round(max([*memory, *after])), "same_bits": same,
        }  # fmt: skip
        OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not same:
        sys.exit("the run that was killed ended otherwise")


if __name__ == "__main__":
    main()
