"""Models that no stage of this run made: what they are called in tables, and what the stage that made them left beside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from temper import hub
from temper.job import Job
from temper.runfolder import Result, read_json


def label(job: Job, name: str) -> str:
    """A readable name: RUN/STAGE of a stage of another run, a folder's own name, anything else as it stands."""
    folder = None if name == "base" else _folder(job, name)
    if folder is None:
        return name
    if folder.name in hub.PARTS and (folder.parent / "stage.json").is_file():
        return f"{folder.parent.parent.name}/{folder.parent.name}"
    return folder.name


def labels(job: Job, names: Sequence[str]) -> dict[str, str]:
    """Names as a recipe has them → those of tables; where two would be called alike, both keep their own."""
    found = {name: label(job, name) for name in names}
    shown = list(found.values())
    return {name: text if shown.count(text) == 1 else name for name, text in found.items()}


def stage_of(job: Job, name: str) -> Result | None:
    """The stage that made a model, of this run or of another; None where none is known."""
    if mine := job.inputs.get((job.recipe.model or "") if name == "base" else name):
        return mine
    folder = _folder(job, name)
    if folder is None or not (folder.parent / "stage.json").is_file():
        return None
    try:
        info = read_json(folder.parent / "stage.json")
    except (OSError, ValueError):
        return None
    return Result(folder.parent.name, folder.parent, {"facts": {}, **info})


def _folder(job: Job, name: str) -> Path | None:
    """The folder that holds a model's weights or its adapter; None of a stage of this run, a hub id, an endpoint."""
    source = job.model(name)
    if (job.recipe.model if name == "base" else name) in job.inputs or not (source.local or source.adapters):
        return None
    return Path(source.adapters[-1] if source.adapters else source.name)
