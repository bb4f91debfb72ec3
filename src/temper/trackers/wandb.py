"""Weights & Biases, with everything off that nobody asked for: no console capture, no git, no code, no machine's figures."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from temper.trackers.base import Mode, Models, Outcome, Point, Start, Tracker, Wait, trackers


@trackers.register("wandb")
def wandb(
    start: Start,
    *,
    project: str | None = None,
    entity: str | None = None,
    mode: Mode = "online",
    models: Models = "best",
    wait: Wait = 60.0,
) -> Tracker:
    """Weights & Biases. The key is read from WANDB_API_KEY or from what `wandb login` wrote, a server of one's own from WANDB_BASE_URL.

    Args:
        project: null: the recipe's name.
        entity: user or team; null: WANDB_ENTITY, or the account's own.
        mode: online | offline; offline writes RUN/trackers/wandb, which `wandb sync` sends.
        models: which of the run's models are artefacts.
        wait: seconds that the end of a run waits for it; a second more for every 10 MB of models.
    """
    return Wandb(start, project or start.recipe, entity, mode)


class Wandb(Tracker):
    """A run of Weights & Biases.

    Its history is one list of rows, numbered from 0; a number that it has is not taken again. So the rows of all stages
    share the numbers, and the axis of a series is a number in the row: `sft/step`.
    """

    def __init__(self, start: Start, project: str, entity: str | None, mode: Mode) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        data = start.folder / "wandb" / "data"  # what waits to be sent lies with the run, not in the home folder
        os.environ.setdefault("WANDB_DATA_DIR", str(data))
        data.mkdir(parents=True, exist_ok=True)
        import wandb

        self.offline, self.notes, self.name, self.axes = mode == "offline", start.notes, start.name, set[str]()
        self.held = wandb.init(
            project=project, entity=entity, name=start.name, id=start.run or uuid.uuid4().hex[:12], mode=mode,
            resume="allow", dir=start.folder, settings=wandb.Settings(
                console="off", disable_git=True, disable_code=True, save_code=False, silent=True, program="temper",
                disable_job_creation=True, x_disable_stats=True, x_disable_meta=True, x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )  # fmt: skip
        self.run = self.held.id
        self.url = str(start.folder / "wandb") if self.offline else str(self.held.url)

    def settings(self, values: Mapping[str, Any]) -> None:
        self.held.config.update(dict(values), allow_val_change=True)

    def about(self, values: Mapping[str, str]) -> None:
        self.held.config.update({"about": dict(values)}, allow_val_change=True)

    def points(self, points: Sequence[Point]) -> None:
        def place(point: Point) -> tuple[str, int]:
            return point.name.rpartition("/")[0], point.step

        for (group, step), some in groupby(points, key=place):
            if group not in self.axes:
                self.held.define_metric(f"{group}/*", step_metric=f"{group}/step")
                self.axes.add(group)
            self._row({f"{group}/step": step, **{p.name: p.value for p in some}})

    def _row(self, values: dict[str, Any]) -> None:
        number = self.notes.get("rows", 0)
        self.held.log(values, step=number)
        self.notes["rows"] = number + 1

    def scores(self, values: Mapping[str, float]) -> None:
        self.held.summary.update(dict(values))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        heads: list[Any] = list(dict.fromkeys(key for row in rows for key in row))
        cells: list[Any] = [[_cell(row.get(head)) for head in heads] for row in rows]
        self._row({name: wandb.Table(columns=heads, data=cells)})

    def file(self, path: Path, name: str) -> None:
        import wandb

        made = wandb.Artifact(_clean(f"{self.name}-{name}"), "file")
        made.add_file(str(path), name=name)
        self.held.log_artifact(made)

    def model(self, folder: Path, name: str) -> None:
        import wandb

        made = wandb.Artifact(_clean(f"{self.name}-model-{name}"), "model")
        made.add_dir(str(folder), policy="immutable")  # no second copy of the weights on this disk
        self.held.log_artifact(made)

    def arrived(self) -> bool:
        return self.offline  # online it is known at the end alone: what was sent before goes through a queue

    def end(self, outcome: Outcome) -> None:
        self.held.finish(exit_code=0 if outcome == "finished" else 1)


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float | str) else str(value)


def _clean(name: str) -> str:
    """A name that an artefact may have.

    >>> _clean("my run-report/index.html")
    'my_run-report-index.html'
    """
    return re.sub(r"[^\w\-.]", "_", name.replace("/", "-"))[:128]
