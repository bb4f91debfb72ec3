"""ClearML, with its bindings to other packages off: nothing is patched, no repository is read, no console is kept."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from temper.trackers.base import Mode, Models, Outcome, Point, Start, Tracker, Wait, trackers

# All that `auto_connect_frameworks` knows: False alone would leave the search for a repository on.
BINDINGS = (
    "catboost", "detect_repository", "fastai", "gradio", "hydra", "joblib", "lightgbm", "matplotlib", "megengine",
    "pytorch", "scikit", "tensorboard", "tensorflow", "tfdefines", "xgboost",
)  # fmt: skip


@trackers.register("clearml")
def clearml(
    start: Start, *, project: str | None = None, mode: Mode = "online", models: Models = "best", wait: Wait = 60.0
) -> Tracker:
    """ClearML. Server and keys are read from clearml.conf or from CLEARML_API_HOST, CLEARML_API_ACCESS_KEY and CLEARML_API_SECRET_KEY.

    Args:
        project: null: the recipe's name.
        mode: online | offline; offline writes RUN/trackers/clearml, which `Task.import_offline_session` sends.
        models: which of the run's models are artefacts.
        wait: seconds that the end of a run waits for it; a second more for every 10 MB of models.
    """
    return ClearML(start, project or start.recipe, mode)


class ClearML(Tracker):
    """A task of ClearML. A number that is reported twice for one iteration replaces the first."""

    def __init__(self, start: Start, project: str, mode: Mode) -> None:
        if mode == "offline":
            os.environ["CLEARML_CACHE_DIR"] = str(start.folder / "clearml")
        from clearml import Task

        Task._report_subprocess_enabled = False  # type: ignore[assignment]  # this process does nothing else; closing waits 10 s for it
        Task.set_offline(mode == "offline")
        self.task = Task.init(
            project_name=project, task_name=start.name, reuse_last_task_id=start.run or False,
            continue_last_task=0 if start.run else False,  # 0: iterations go on as they are numbered
            auto_connect_frameworks=dict.fromkeys(BINDINGS, False), auto_connect_arg_parser=False,
            auto_resource_monitoring=False, auto_connect_streams=False,
        )  # fmt: skip
        self.logger = self.task.get_logger()
        self.run = self.task.id
        self.url = self.task.get_output_log_web_page() if mode == "online" else str(start.folder / "clearml")

    def settings(self, values: Mapping[str, Any]) -> None:
        self.task.set_parameters({f"General/{name}": value for name, value in values.items()})

    def about(self, values: Mapping[str, str]) -> None:
        self.task.set_configuration_object("about", config_dict=dict(values))

    def points(self, points: Sequence[Point]) -> None:
        for name, step, value in points:
            self.logger.report_scalar(name, name.rpartition("/")[2], value, step)

    def scores(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.logger.report_single_value(name, value)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        heads = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[str(row.get(head, "")) for head in heads] for row in rows]
        self.logger.report_table(name, "rows", 0, table_plot=[heads, *cells])

    def file(self, path: Path, name: str) -> None:
        self._upload(name, path)

    def model(self, folder: Path, name: str) -> None:
        self._upload(f"models/{name}", folder)

    def _upload(self, name: str, path: Path) -> None:
        if not self.task.upload_artifact(name, str(path), wait_on_upload=True):
            raise OSError(f"ClearML did not take {name}")

    def arrived(self) -> bool:
        self.task.flush()
        return True

    def end(self, outcome: Outcome) -> None:
        self.task.flush(wait_for_uploads=True)
        if outcome == "failed":
            self.task.mark_failed(status_reason="the run failed")
        self.task.close()
