"""A run folder → `Run`. Whatever cannot be read becomes a sentence in `problems`, not an exception."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from temper.errors import RunError
from temper.report.contract import Card, Evaluation, Front, Learning, Manifest, ManifestStage, StageInfo, Trials

M = TypeVar("M", bound=pydantic.BaseModel)
SCHEMA = 1


@dataclass
class Stage:
    """One stage; `info`, `card` and `evaluation` are None where the file is absent or broken."""

    name: str
    kind: str
    status: str  # done | skipped | failed | pending | unknown (no manifest names it)
    error: str | None
    cached: bool
    folder: Path | None  # STAGE, or STAGE.partial where only that exists
    info: StageInfo | None = None
    card: Card | None = None
    evaluation: Evaluation | None = None
    evaluation_json: dict[str, Any] | None = None  # as it stands, for results.json
    trials: Trials | None = None
    front: Front | None = None
    trials_json: dict[str, Any] | None = None
    front_json: dict[str, Any] | None = None
    learning: Learning | None = None
    learning_json: dict[str, Any] | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    worst: list[dict[str, Any]] = field(default_factory=list)  # validation examples with the highest loss
    rows: pa.Table | None = None
    dropped: list[dict[str, Any]] = field(default_factory=list)

    @property
    def partial(self) -> bool:
        return self.folder is not None and self.folder.name.endswith(".partial")


@dataclass
class Run:
    """A run folder, read; `problems` are sentences on what of it could not be."""

    path: Path
    manifest: Manifest
    recipe: str  # the text of recipe.yaml
    stages: list[Stage]
    problems: list[str]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        return {stage.name: stage.evaluation for stage in self.stages if stage.evaluation}

    @property
    def warnings(self) -> list[tuple[str, str]]:
        """(stage, sentence) of all stages."""
        return [(stage.name, text) for stage in self.stages if stage.info for text in stage.info.warnings]


def read_run(path: Path) -> Run:
    """Reads everything a report shows.

    Raises:
        RunError: there is no such folder, or nothing in it was written by a run.
    """
    path = path.resolve()
    if not path.is_dir():
        raise RunError("there is no such run", where=str(path), do="give the folder that `temper run` made")
    problems: list[str] = []
    found = sorted(child.parent.name for child in path.glob("*/stage.json") if _is_current(child.parent.name))
    if not found and not (path / "manifest.json").exists():
        raise RunError(
            "this is not a run folder: no manifest.json and no finished stage in it",
            where=str(path),
            do="give the folder that `temper run` made",
        )
    raw = _json(path / "manifest.json", problems, "manifest.json")
    manifest = _typed(Manifest, raw, problems, "manifest.json") or Manifest()
    listed = manifest.stages or [ManifestStage(name=name, status="unknown") for name in found]
    for name in sorted(set(found) - {entry.name for entry in listed}):
        problems.append(f"«{name}» is a stage of an earlier recipe in the same folder and is left out.")
    recipe = path / "recipe.yaml"
    if not recipe.exists():
        problems.append("recipe.yaml is missing.")
    text = recipe.read_text("utf-8", errors="replace") if recipe.exists() else ""
    return Run(path, manifest, text, _stages(path, listed, problems), problems)


def results_of(run: Run) -> dict[str, Any]:
    """results.json of one run."""
    swept = {
        "sweeps": {stage.name: stage.trials_json for stage in run.stages if stage.trials},
        "fronts": {stage.name: stage.front_json for stage in run.stages if stage.front},
        "curves": {stage.name: stage.learning_json for stage in run.stages if stage.learning},
    }
    kept = ["seconds", "tokens", "peak_memory_bytes", "examples", "trainable_parameters", "bytes_on_disk"]
    return {
        "schema": SCHEMA,
        "recipe": run.manifest.recipe,
        "profile": run.manifest.profile,
        "evaluations": {stage.name: stage.evaluation_json for stage in run.stages if stage.evaluation},
        "stages": {
            stage.name: {key: getattr(stage.info, key) for key in kept} | {"cached": stage.cached}
            for stage in run.stages
            if stage.info
        },
        **{name: entry for name, entry in swept.items() if entry},
    }


def _is_current(name: str) -> bool:
    """Not an earlier result (STAGE@KEY) and not unfinished work (STAGE.partial)."""
    return "@" not in name and not name.endswith(".partial")


def _stages(run: Path, listed: list[ManifestStage], problems: list[str]) -> list[Stage]:
    """All stages. A result of other settings is none of this run's, nor is what was made of such a one: both are left out."""
    out: list[Stage] = []
    keys = {entry.name: entry.key for entry in listed}
    stale: set[str] = set()
    for entry in listed:  # each after what it reads
        before = len(problems)
        stage = _stage(run, entry, problems)
        if (why := _stale(entry, stage.info, keys, stale)) is not None:
            stale.add(entry.name)
            problems[before:] = [f"{entry.name}: {why}, and is left out."]
            stage = Stage(entry.name, stage.kind, entry.status, entry.error, entry.cached, None)
        out.append(stage)
    return out


def _stale(entry: ManifestStage, info: StageInfo | None, keys: dict[str, str | None], stale: set[str]) -> str | None:
    """Why a stage's folder is not this run's; None where it is, as far as keys tell."""
    if info is None:
        return None
    if entry.key and info.key and entry.key != info.key:
        return "its folder holds a result of other settings than this run's (the keys differ)"
    for name, key in info.inputs.items():
        if name in stale or (keys.get(name) and keys[name] != key):
            return f"its folder holds a result made of another «{name}» than this run's"
    return None


def _stage(run: Path, entry: ManifestStage, problems: list[str]) -> Stage:
    folder = next((f for f in (run / entry.name, run / f"{entry.name}.partial") if f.is_dir()), None)
    stage = Stage(entry.name, entry.kind, entry.status, entry.error, entry.cached, folder)
    if folder is None:
        if entry.status == "done":
            problems.append(f"{entry.name}: the manifest calls this stage done, but its folder is missing.")
        return stage
    known = len(problems)
    stage.info = _typed(StageInfo, _json(folder / "stage.json", problems, entry.name), problems, entry.name)
    if stage.info is None and len(problems) == known and not stage.partial:
        problems.append(f"{entry.name}: stage.json is missing, so its cost, settings and warnings are not known.")
    stage.kind = stage.kind or (stage.info.kind if stage.info else "")
    stage.card = _typed(Card, _json(folder / "card.json", problems, entry.name), problems, f"{entry.name}/card.json")
    raw = _json(folder / "evaluation.json", problems, entry.name)
    stage.evaluation = _typed(Evaluation, raw, problems, f"{entry.name}/evaluation.json")
    stage.evaluation_json = raw
    stage.trials_json, stage.front_json, stage.learning_json = (
        _json(folder / f, problems, entry.name) for f in ("trials.json", "front.json", "curve.json")
    )
    stage.trials = _typed(Trials, stage.trials_json, problems, f"{entry.name}/trials.json")
    stage.front = _typed(Front, stage.front_json, problems, f"{entry.name}/front.json")
    stage.learning = _typed(Learning, stage.learning_json, problems, f"{entry.name}/curve.json")
    stage.metrics = _json_lines(folder / "metrics.jsonl", problems, entry.name)
    stage.samples = _json_lines(folder / "samples.jsonl", problems, entry.name)
    stage.worst = _json_lines(folder / "worst.jsonl", problems, entry.name)
    stage.rows = _parquet(folder / "rows.parquet", problems, entry.name)
    dropped = _parquet(folder / "data" / "dropped.parquet", problems, entry.name)
    stage.dropped = dropped.to_pylist() if dropped is not None else []
    return stage


def _loads(text: str) -> Any:
    """JSON in which NaN and Infinity, which Python writes and JSON does not know, are null."""
    return json.loads(text, parse_constant=lambda _: None)


def _json(path: Path, problems: list[str], of: str) -> dict[str, Any] | None:
    """The object in a file; None where it is absent or (with a problem noted) broken."""
    if not path.exists():
        return None
    try:
        value = _loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        problems.append(f"{of}: {path.name} cannot be read ({error}).")
        return None
    if not isinstance(value, dict):
        problems.append(f"{of}: {path.name} is not a JSON object.")
        return None
    if value.get("schema", SCHEMA) != SCHEMA:
        problems.append(f"{of}: {path.name} is of schema {value['schema']}; this report knows {SCHEMA}.")
    return value


def _typed(model: type[M], raw: dict[str, Any] | None, problems: list[str], of: str) -> M | None:
    if raw is None:
        return None
    try:
        return model.model_validate(raw)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        problems.append(f"{of}: «{at}» is not what the run folder's description says ({first['msg']}).")
        return None


def _json_lines(path: Path, problems: list[str], of: str) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    out, broken = [], []
    for number, line in enumerate(path.read_text("utf-8", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = _loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            out.append(value)
        else:
            broken.append(str(number))
    if broken:
        problems.append(f"{of}: {path.name} has lines that are cut off or broken ({', '.join(broken[:5])}); left out.")
    return out


def _parquet(path: Path, problems: list[str], of: str) -> pa.Table | None:
    if not path.exists():
        return None
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        problems.append(f"{of}: {path.name} cannot be read ({str(error).splitlines()[0]}).")
        return None
