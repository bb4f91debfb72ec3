"""A run folder → what of it a tracker has not been given yet. Reads files alone, those of a run at work too."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from temper.runfolder import file_sha256, read_json, read_sealed
from temper.trackers import Outcome, Point
from temper.trackers.base import finite

COSTS = (
    "seconds", "tokens", "trained_tokens", "examples", "steps", "parameters", "trainable_parameters",
    "peak_memory_bytes", "bytes_on_disk",
)  # fmt: skip
MANY = 5000  # points handed over at once
CHANGING = {"created", "command"}  # of every start


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing to send. `what` is the method of `Tracker` that takes it; `mark` and `state` are what is remembered of it
    once it has arrived."""

    what: str
    args: tuple[Any, ...]
    mark: str
    state: str


@dataclasses.dataclass(frozen=True)
class Found:
    """A stage that this run has reached. `info` is its stage.json, None while it works."""

    name: str
    key: str
    config: dict[str, Any] | None
    path: Path
    info: dict[str, Any] | None


class Contents:
    """One run folder, read again with `look`. Files that only grow are read from where the last look ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = {}
        self.stages: list[Found] = []
        self._finished: dict[tuple[str, str], Found] = {}
        self._ends: dict[Path, tuple[int, int]] = {}  # metrics.jsonl → its inode, and bytes that were read

    def look(self, *, whole: bool = False) -> None:
        """Read what there is now; `whole`: files from their beginning.

        Raises:
            OSError, ValueError: there is no manifest.
        """
        self.manifest = read_json(self.folder / "manifest.json")
        self.stages = [found for entry in self.manifest["stages"] if (found := self._stage(entry))]
        if whole:
            self._ends.clear()

    def _stage(self, entry: Mapping[str, Any]) -> Found | None:
        """The stage under the key that this start has given it: finished, or at work."""
        name, key, config = entry["name"], entry.get("key"), entry.get("config")
        if key is None:
            return None
        if (name, key) in self._finished:
            return self._finished[name, key]
        info = read_sealed(self.folder / name / "stage.json")
        if info and info["key"] == key:
            self._finished[name, key] = Found(name, key, config or info["config"], self.folder / name, info)
            return self._finished[name, key]
        partial = self.folder / f"{name}.partial"
        mark = read_sealed(partial / "partial.json")
        return Found(name, key, config, partial, None) if mark and mark["key"] == key else None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def keys(self) -> dict[str, str]:
        return {stage.name: stage.key for stage in self.stages}

    @property
    def outcome(self) -> Outcome:
        """How the run ended, if it has."""
        states = {entry["status"] for entry in self.manifest["stages"]}
        if "failed" in states:
            return "failed"
        return "stopped" if "pending" in states or self.manifest["seconds"] is None else "finished"

    def settings(self) -> dict[str, Any]:
        """All hyperparameters with their defaults, flat: `sft.adapter.r`."""
        out: dict[str, Any] = {k: self.manifest.get(k) for k in ("recipe", "profile", "model", "seed")}
        kinds = {entry["name"]: entry["kind"] for entry in self.manifest["stages"]}
        configs = {e["name"]: e["config"] for e in self.manifest["stages"] if e.get("config") is not None}
        configs |= {s.name: s.config for s in self.stages if s.config is not None and s.name not in configs}
        for name, config in configs.items():
            out |= {f"{name}.stage": kinds[name], **flat(config, f"{name}.")}
        return {k: v for k, v in out.items() if v is not None}

    def about(self) -> dict[str, str]:
        """Versions, hardware, what was really used."""
        m = self.manifest
        top = {k: m.get(k) for k in ("temper", "python", "created", "packages", "hardware", "git")}
        facts = {stage.name: stage.info["facts"] for stage in self.stages if stage.info}
        words = {"command": " ".join(m.get("command", []))}
        return {k: str(v) for k, v in {**flat(top), **flat(facts), **words}.items() if v is not None}

    def news(self, sent: Mapping[str, str], steps: Mapping[str, int], models: str, *, final: bool) -> Iterator[Item]:
        """What has not been sent, in order.

        Args:
            sent: mark → state of what was.
            steps: series → the last step of it that was.
            models: which models are wanted: best, all or none.
            final: the run has ended; its report and models are there.
        """
        for item in self._all(sent, models, final):
            if sent.get(item.mark) != item.state:
                yield item
        for stage in self.stages:
            held: list[Point] = []
            for point in self._points(stage):
                if point.step > steps.get(point.name, -1):
                    held.append(point)
                if len(held) == MANY:
                    yield Item("points", (held,), "", "")
                    held = []
            if held:
                yield Item("points", (held,), "", "")

    def _all(self, sent: Mapping[str, str], models: str, final: bool) -> Iterator[Item]:
        settings, about = self.settings(), self.about()
        yield Item("settings", (settings,), "settings", digest(settings))
        yield Item("about", (about,), "about", digest({k: v for k, v in about.items() if k not in CHANGING}))
        yield from self._files("recipe.yaml")
        for stage in self.stages:
            if stage.info:
                yield from self._finished_stage(stage, sent)
        if final:
            state = digest([self.keys, self.outcome])
            for name in ("report/index.html", "report/report.md", "report/results.json", "manifest.json"):
                if (self.folder / name).is_file():
                    yield Item("file", (self.folder / name, name), name, state)
        if final and self.outcome == "finished":
            for name, folder in self.models(models):
                yield Item("model", (folder, name), f"model:{name}", self.keys[name])

    def _files(self, *names: str) -> Iterator[Item]:
        for name in names:
            if (self.folder / name).is_file():
                yield Item("file", (self.folder / name, name), name, file_sha256(self.folder / name))

    def _finished_stage(self, stage: Found, sent: Mapping[str, str]) -> Iterator[Item]:
        """What a stage ended with; files of what was sent are not read again at every look."""
        assert stage.info
        if sent.get(f"{stage.name}/scores") != stage.key:
            costs = {f"cost/{stage.name}/{k}": stage.info.get(k) for k in COSTS}
            scores = costs | _scores(stage.name, _json(stage.path / "evaluation.json"))
            yield Item("scores", ({k: v for k, v in scores.items() if finite(v)},), f"{stage.name}/scores", stage.key)
        samples = _lines(stage.path / "samples.jsonl") if sent.get(f"{stage.name}/samples") != stage.key else []
        if samples:
            last = [line for line in samples if line.get("step") == samples[-1].get("step")]
            yield Item("table", (f"{stage.name}/samples", last), f"{stage.name}/samples", stage.key)
        for name in ("samples.jsonl", "trials.json", "front.json", "curve.json"):
            if (stage.path / name).is_file():
                path = f"{stage.name}/{name}"
                yield Item("file", (stage.path / name, path), path, stage.key)

    def _points(self, stage: Found) -> Iterator[Point]:
        """Numbers over steps: what was logged, and of a sweep scores and settings over its trials."""
        for line in self._grown(stage.path / "metrics.jsonl"):
            group = f"{stage.name}/{line['policy']}" if "policy" in line else stage.name
            for key, value in line.items():
                if key not in ("step", "policy") and finite(value):
                    yield Point(f"{group}/{key}", line["step"], value)
        trials = _json(stage.path / "trials.json").get("trials", [])
        for trial in sorted(trials, key=lambda t: t["number"]):
            if trial["state"] == "running":  # those after it wait, so that steps rise
                return
            scores = {measure: found["value"] for measure, found in trial["values"].items()}
            for key, value in {**scores, **trial["settings"]}.items():
                if trial["state"] == "done" and finite(value):
                    yield Point(f"{stage.name}/{key}", trial["number"], value)

    def _grown(self, path: Path) -> Iterator[dict[str, Any]]:
        """Whole lines that came since the last look; all of them where the file is another one, as after a resume."""
        try:
            with open(path, "rb") as file:
                inode = path.stat().st_ino
                known, start = self._ends.get(path, (inode, 0))
                size = file.seek(0, 2)
                if known != inode or size < start:
                    start = 0
                file.seek(start)
                raw = file.read(size - start)
        except OSError:
            return
        whole = raw[: raw.rfind(b"\n") + 1]
        self._ends[path] = (inode, start + len(whole))
        for line in whole.splitlines():
            if (found := _parsed(line)) is not None and isinstance(found.get("step"), int):
                yield found

    def models(self, which: str) -> list[tuple[str, Path]]:
        """(stage, folder) of the models that are wanted. A merged model stands for its adapter."""
        made: dict[str, Path] = {}
        for stage in self.stages:
            if folder := next((stage.path / f for f in ("model", "adapter") if (stage.path / f).is_dir()), None):
                made[stage.name] = folder
        if which == "none" or not made:
            return []
        if which == "all":
            return list(made.items())
        best = self.best(made)
        return [(best, made[best])]

    def best(self, made: Mapping[str, Path]) -> str:
        """Of the models that the run made, the one that wins the first metric of the last evaluation of any of them, or,
        where nothing was evaluated, the last one made."""
        for stage in reversed(self.stages):
            measured = _json(stage.path / "evaluation.json").get("models", {}) if stage.info else {}
            own = {name: scores for name, scores in measured.items() if name in made}
            for metric in dict.fromkeys(metric for scores in own.values() for metric in scores):
                found = {name: scores[metric] for name, scores in own.items() if metric in scores}
                values = {name: one["value"] for name, one in found.items() if finite(one.get("value"))}
                higher = next((one.get("higher_is_better") for one in found.values()), None)
                if values and higher is not None:
                    return (max if higher else min)(values, key=values.__getitem__)
        return list(made)[-1]


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested mappings as one, lists as JSON.

    >>> flat({"lr": 0.1, "adapter": {"r": 8, "targets": ["q", "v"]}}, "sft.")
    {'sft.lr': 0.1, 'sft.adapter.r': 8, 'sft.adapter.targets': '["q", "v"]'}
    """
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flat(value, f"{before}{key}.")
        else:
            out[f"{before}{key}"] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
    return out


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _scores(stage: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    """Every score with its interval, every comparison with its interval and p-values."""
    out: dict[str, Any] = {}
    for model, measured in evaluation.get("models", {}).items():
        for metric, found in measured.items():
            name = f"{stage}/{model}/{metric}"
            out |= {name: found.get("value"), **{f"{name}/{k}": found.get(k) for k in ("low", "high")}}
    for c in evaluation.get("comparisons", []):
        name = f"{stage}/{c['b']} - {c['a']}/{c['metric']}"
        out |= {f"{name}/{k}": c.get(k) for k in ("difference", "low", "high", "p", "p_adjusted")}
    return out


def _parsed(text: str | bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _read(path: Path) -> bytes:
    """A file's content; nothing where there is none, or where its stage has just been given its name."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is none."""
    return _parsed(_read(path)) or {}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [found for line in _read(path).split(b"\n") if (found := _parsed(line)) is not None]
