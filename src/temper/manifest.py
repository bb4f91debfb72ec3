"""What ran, where, and with which versions: manifest.json, and the memory a stage took."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from temper.recipe import Recipe

REPORTED_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy", "safetensors")


def manifest(recipe: Recipe, order: list[str], command: Sequence[str]) -> dict[str, Any]:
    """manifest.json of a start, as the run folder documents it: stages in `order` pending, the others skipped."""
    rest = [n for n in recipe.stages if n not in order]
    return {
        "schema": 1,
        "recipe": recipe.name,
        "profile": recipe.profile,
        "model": recipe.model,
        "seed": recipe.seed,
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": list(command),
        "temper": importlib.metadata.version("temper-lm"),
        "python": platform.python_version(),
        "packages": {p: importlib.metadata.version(p) for p in REPORTED_PACKAGES},
        "hardware": hardware(recipe.threads),
        "git": git_state(recipe.folder),
        "seconds": None,
        "stages": [
            {
                "name": n,
                "kind": recipe.stages[n].kind,
                "config": recipe.stages[n].model_dump(mode="json"),
                "key": None,
                "cached": False,
                "status": "pending" if n in order else "skipped",
                "error": None,
            }
            for n in [*order, *rest]
        ],
    }


def hardware(threads: int | None = None) -> dict[str, Any]:
    """Processor, cores usable by this process, memory; GPUs are added by the stages that use them."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().split("model name")[1].split(":", 1)[1].splitlines()[0].strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return {
        "cpu": cpu,
        "cores": cores,
        "threads": threads or _threads(cores),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [],
    }


def _threads(cores: int) -> int:
    """How many torch takes where nobody says: the environment's OMP_NUM_THREADS, else all cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else cores


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the folder that a recipe lies in, and whether files differ from it; None outside of git."""

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def command_line() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


class PeakMemory:
    """The process's peak resident memory during a stage, in bytes: the kernel's own mark where it can be reset, else sampled."""

    def __enter__(self) -> PeakMemory:
        self.kernel = False
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self.kernel = True
        self.peak, self._stop, self._process = 0, threading.Event(), psutil.Process()
        if not self.kernel:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self.kernel:
            status = Path("/proc/self/status").read_text()
            self.peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
