"""What the tests of trackers share: a run of seconds, run folders that are written by hand, and readers of what trackers wrote."""

from __future__ import annotations

import json
import struct
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preferred import STAGE, pairs
from temper.runfolder import write_json, write_sealed

Series = dict[str, list[tuple[int, float]]]

STEPS = 12
SFT = {
    **STAGE, "stage": "sft", "epochs": 1, "max_steps": STEPS, "evaluate_every": 4, "checkpoint_every": 3, "samples": 2,
    "max_new_tokens": 4,
}  # fmt: skip


def recipe(folder: Path, model: Path, trackers: list[Any], **sft: Any) -> Path:
    """Rows, two adapters of which one hardly learns, and an evaluation of both."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    data = {
        "stage": "data", "source": "rows.jsonl", "validation": 8, "test": 8, "near_leaks": False,
        "drop": {"duplicates": "off"},
    }  # fmt: skip
    stage = {k: v for k, v in {**SFT, **sft}.items() if k != "max_new_tokens"}
    weak = {**stage, "lr": 1e-9, "max_steps": 2, "evaluate_every": 2}
    compare = {
        "stage": "evaluate", "models": ["base", "sft", "weak"], "data": "rows.test", "metrics": ["loss", "length"],
        "decoding": {"max_new_tokens": 4}, "resamples": 200,
    }  # fmt: skip
    whole = {
        "name": "tracked", "model": str(model), "threads": 1, "trackers": trackers,
        "stages": {"rows": data, "sft": stage, "weak": weak, "compare": compare},
    }  # fmt: skip
    file = folder / "r.yaml"
    file.write_text(json.dumps(whole), encoding="utf-8")  # JSON is YAML
    return file


def logged(run: Path) -> Series:
    """Every number of every metrics.jsonl of a run, worked out apart from Temper's own reader."""
    out: Series = defaultdict(list)
    for file in sorted(run.glob("*/metrics.jsonl")):
        for text in file.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            for key, value in line.items():
                if key != "step" and type(value) in (int, float):
                    out[f"{file.parent.name}/{key}"].append((line["step"], value))
    return dict(out)


# ── a run folder by hand ────────────────────────────────────────────────────────────────────────────────────────────


class ByHand:
    """A run at work on a stage `sft`, as training writes it."""

    def __init__(self, path: Path, key: str = "a" * 64, lr: float = 0.1) -> None:
        self.path, self.key = path, key
        self.partial = path / "sft.partial"
        self.partial.mkdir(parents=True)
        config = {"lr": lr, "adapter": {"r": 8}}
        self.entry = {
            "name": "sft", "kind": "sft", "config": config, "key": key, "cached": False, "status": "pending", "error": None,
        }  # fmt: skip
        self.manifest = {
            "schema": 1, "recipe": "by-hand", "profile": None, "model": "m", "seed": 20, "created": "2026-11-21T09:30:00",
            "command": ["temper", "run"], "temper": "0.1.0", "python": "3.11", "packages": {"torch": "2.13.0"},
            "hardware": {"cpu": "c"}, "git": None, "seconds": None, "stages": [self.entry],
        }  # fmt: skip
        write_json(path / "manifest.json", self.manifest)
        write_sealed(self.partial / "partial.json", {"key": key})
        (path / "recipe.yaml").write_text("name: by-hand\n", encoding="utf-8")

    def log(self, *steps: int) -> None:
        with open(self.partial / "metrics.jsonl", "a", encoding="utf-8") as out:
            out.writelines(json.dumps({"step": n, "loss": n / 8}) + "\n" for n in steps)

    def go_back(self, step: int) -> None:
        """As a resumed run does: lines after its checkpoint are dropped, in another file of that name."""
        file = self.partial / "metrics.jsonl"
        kept = [x for x in file.read_text().splitlines() if x[-1] == "}" and json.loads(x)["step"] <= step]
        file.unlink()
        file.write_text("".join(f"{x}\n" for x in kept), encoding="utf-8")

    def end(self) -> None:
        """The stage is done, and so is the run."""
        info = {
            "name": "sft", "key": self.key, "config": self.entry["config"], "facts": {"dtype": "float32"}, "seconds": 2.5,
            "inputs": {}, "files": {}, "steps": 9,
        }  # fmt: skip
        (self.partial / "model").mkdir()
        (self.partial / "model" / "model.safetensors").write_bytes(b"weights")
        write_sealed(self.partial / "stage.json", info)
        self.partial.rename(self.path / "sft")
        self.entry["status"] = "done"
        write_json(self.path / "manifest.json", {**self.manifest, "seconds": 3.5})
        (self.path / "report").mkdir()
        for name in ("index.html", "report.md", "results.json"):
            (self.path / "report" / name).write_text("{}", encoding="utf-8")


# ── what trackers wrote ─────────────────────────────────────────────────────────────────────────────────────────────


def tensorboard_series(folder: Path) -> Series:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), {"scalars": 0, "tensors": 0})
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def wandb_records(folder: Path) -> Iterator[Any]:
    """Records of all offline runs below a folder, in order: LevelDB's log format, 7 bytes of a header before it."""
    from wandb.proto import wandb_internal_pb2

    for file in sorted(folder.glob("offline-run-*/*.wandb")):
        raw, at, held = file.read_bytes(), 7, b""
        assert raw[:4] == b":W&B"
        while at + 7 <= len(raw):
            if 32768 - at % 32768 < 7:  # the rest of a block that no header fits into
                at += 32768 - at % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", raw, at)
            held += raw[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last part
                yield wandb_internal_pb2.Record.FromString(held)
                held = b""


def items(update: Any) -> dict[str, Any]:
    return {one.key or "/".join(one.nested_key): json.loads(one.value_json) for one in update}


def clearml_session(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """task.json, all reports and the names of the files of the one offline session below a folder."""
    [file] = (folder / "offline").glob("*.zip")
    with zipfile.ZipFile(file) as session:
        task = json.loads(session.read("task.json"))
        lines = session.read("metrics.jsonl").decode().splitlines()
        return task, [report for line in lines for report in json.loads(line)], session.namelist()
