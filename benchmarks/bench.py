"""Temper beside what people would take instead: the same weights, rows, precision and batch, in turns, in one process tree.

    make bench                 all contests; ONLY=dpo those whose names begin so
    python benchmarks/bench.py [--only NAME] [--against tuned] [--rounds 3] [--threads 2] [--out FILE]

Each side works in a process of its own and waits while the other works, so that whatever else the machine does falls on
both. One pass over the work warms up; then at least three in turns are timed. Printed and written to
benchmarks/results/<machine>.json: the ratio of times, the ratio of peak memory above imports and weights (above 1:
Temper is faster, or smaller), useful tokens a second, the share of the machine's peak in products of matrices that they
come to, and the difference of both sides' losses from the same weights in this very run.
«tuned» is the fastest of the grid that stands in the contest, tried anew each time.
Run it on an idle machine: with two threads, any third busy one slows both manyfold, and not alike.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peak
import psutil
import torch
from contest import Contest, Settings

HERE = Path(__file__).parent
SAME = {"float32": 1e-4, "bf16": 1e-2}  # how far apart the losses of the same work may be
MODULES = ["tree_pass", "sft", "dpo", "reward", "grpo", "rollouts", "scoring", "preparation", "t5"]


class Worker:
    """A side's process."""

    def __init__(self, module: str, contest: Contest, side: str, threads: int, base: Path) -> None:
        order = {"module": module, "name": contest.name, "against": contest.against, "side": side, "threads": threads}
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true", "TEMPER_BENCH_BASE": str(base),
            "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TQDM_DISABLE": "1", "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent / "src"))),
        }  # fmt: skip
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  open as long as the process
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), json.dumps(order)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, text=True, env=environment,
        )  # fmt: skip
        self.weights = (base / "model.safetensors").stat().st_size

    def __call__(self, do: str, **more: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps({"do": do, "weights": self.weights, **more}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.errors.seek(0)
            raise SystemExit(f"a side died at «{do}»:\n{self.errors.read()[-3000:]}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def fastest(module: str, contest: Contest, threads: int, base: Path) -> Settings:
    """The settings of the grid that take the least time, each warmed up once."""
    if not contest.grid:
        return contest.theirs
    found: list[tuple[float, Settings]] = []
    with Worker(module, contest, "other", threads, base) as other:
        for settings in contest.grid:
            other("make", settings={**contest.theirs, **contest.some, **settings})
            other("epoch")
            found.append((other("epoch"), settings))
            print(f"    {found[-1][0]:7.2f} s  {settings}", flush=True)
    return {**contest.theirs, **min(found, key=lambda one: one[0])[1]}


def held(
    module: str, contest: Contest, threads: int, rounds: int, base: Path, peaks: dict[str, float]
) -> dict[str, Any]:
    """One contest."""
    print(f"{contest.name} against {contest.against}", flush=True)
    theirs = fastest(module, contest, threads, base)
    with (
        Worker(module, contest, "temper", threads, base) as ours,
        Worker(module, contest, "other", threads, base) as other,
    ):
        facts = ours("make", settings=contest.ours)
        other("make", settings=theirs)
        losses = ours("loss"), other("loss")
        if not abs(losses[0] - losses[1]) <= SAME[_precision(contest)]:
            raise SystemExit(f"the two sides do not do the same: their losses are {losses[0]:g} and {losses[1]:g}")
        ours("epoch"), other("epoch")  # what is done once is not timed
        taken = [(ours("epoch"), other("epoch")) for _ in range(rounds)]
        memory = ours("memory"), other("memory")
    ratios = sorted(b / a for a, b in taken)
    a, b = (statistics.median(column) for column in zip(*taken, strict=True))
    best = peaks[_precision(contest)]
    out = {
        "name": contest.name,
        "against": contest.against,
        "time_ratio": {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]},
        "asked": contest.asked,
        "share_asked": contest.share,
        "seconds": {"temper": a, "other": b},
        "memory_ratio": memory[1] / memory[0],
        "memory_bytes": {"temper": memory[0], "other": memory[1]},
        "useful_tokens_per_second": {"temper": facts["tokens"] / a, "other": facts["tokens"] / b},
        "peak_share": facts["flops"] / a / best if facts["flops"] else None,
        "losses": {"temper": losses[0], "other": losses[1]},
        "loss_difference": abs(losses[0] - losses[1]),
        "settings": {"temper": contest.ours, "other": theirs},
        "rounds": rounds,
    }
    share = f", {out['peak_share']:.0%} of the peak" if facts["flops"] else ""
    share += f", asked {contest.share:.0%}" if contest.share else ""
    print(
        f"    temper {a:.2f} s, other {b:.2f} s: {statistics.median(ratios):.2f} times as fast ({ratios[0]:.2f} to "
        f"{ratios[-1]:.2f}){f', asked {contest.asked:g}' if contest.asked else ''}; memory {memory[0] / 1e6:.0f} and "
        f"{memory[1] / 1e6:.0f} MB: {out['memory_ratio']:.2f}{share}; loss difference {out['loss_difference']:.1e}",
        flush=True,
    )
    return out


def _precision(contest: Contest) -> str:
    return "bf16" if contest.name.endswith("bf16") else "float32"


def machine(threads: int, peaks: dict[str, float]) -> dict[str, Any]:
    names = ("torch", "transformers", "peft", "trl")
    return {
        "processor": _processor("model name") or platform.processor(),
        "model": "-".join(filter(None, (_processor("cpu family"), _processor("model")))), "threads": threads, "cores": psutil.cpu_count(logical=False),
        "memory_gb": round(psutil.virtual_memory().total / 2**30), "python": platform.python_version(),
        "versions": {n: version(n) for n in names}, "peak_gflops": {k: round(v / 1e9) for k, v in peaks.items()},
    }  # fmt: skip


def _processor(field: str) -> str:
    """What Linux says of the first core. A name alone may stand for several generations, one twice as fast as the other."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.split(":")[0].strip() == field), "")


def main() -> None:
    import shapes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="contests whose names begin so")
    parser.add_argument("--against", default="", help="contests whose other side's name holds this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="default: results/<machine>.json beside this file")
    asked = parser.parse_args()
    if asked.rounds < 3:
        parser.error("three rounds at least: a range of fewer says little")
    torch.set_num_threads(asked.threads)
    every = [(m, c) for m in MODULES for c in importlib.import_module(m).CONTESTS]
    chosen = [(m, c) for m, c in every if c.name.startswith(asked.only) and asked.against in c.against]
    if not chosen:
        parser.error(f"no contest is called so; there are {', '.join(dict.fromkeys(c.name for _, c in every))}")
    peaks = {kind: peak.measured(kind) for kind in ("float32", "bf16")}
    facts = machine(asked.threads, peaks)
    print(f"{facts['processor']}, {asked.threads} threads, peak {facts['peak_gflops']} GFLOP/s, {facts['versions']}")
    file = asked.out or HERE / "results" / f"{name_of(facts)}.json"
    with tempfile.TemporaryDirectory() as folder:
        base = shapes.saved(Path(folder) / "base")
        for module, contest in chosen:
            found = held(module, contest, asked.threads, asked.rounds, base, peaks)
            write(file, facts, found, [(c.name, c.against) for _, c in every])
    print(f"written: {file}")


def name_of(facts: dict[str, Any]) -> str:
    kind = "".join(c if c.isalnum() else "-" for c in facts["processor"].lower()).strip("-")
    return "-".join(filter(None, (kind, facts["model"], f"{facts['threads']}-threads")))


def write(file: Path, facts: dict[str, Any], found: dict[str, Any], order: list[tuple[str, str]]) -> None:
    """What was measured before on this machine stays, but for the same contest."""
    kept = json.loads(file.read_text()) if file.is_file() else {"workloads": []}
    every = {(w["name"], w["against"]): w for w in [*kept["workloads"], found]}
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        json.dumps({"machine": facts, "workloads": [every[k] for k in order if k in every]}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
