"""MLflow, through its client: no run is ever «active» in the process, nothing is patched, nothing is logged by itself."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper.trackers.base import Gone, Models, Outcome, Point, Start, Tracker, Wait, batches, trackers

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

# The server's limits on one request.
METRICS, PARAMS, TAGS = 1000, 100, 100
LONGEST_PARAM, LONGEST_TAG = 6000, 5000
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
# A call that cannot be answered ends within seconds, and is made again later; what the user has set stands.
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


@trackers.register("mlflow")
def mlflow(
    start: Start, *, url: str | None = None, experiment: str | None = None, models: Models = "best", wait: Wait = 60.0
) -> Tracker:
    """MLflow: a tracking server, or what MLFLOW_TRACKING_URI names.

    Args:
        url: the server; null: MLFLOW_TRACKING_URI. Users and passwords go into MLFLOW_TRACKING_USERNAME and
            MLFLOW_TRACKING_PASSWORD.
        experiment: null: the recipe's name.
        models: which of the run's models are artefacts.
        wait: seconds that the end of a run waits for it; a second more for every 10 MB of models.
    """
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    uri = url or os.environ["MLFLOW_TRACKING_URI"]
    return Mlflow(MlflowClient(uri), uri, start, experiment or start.recipe)


class Mlflow(Tracker):
    """A run of MLflow. The server is asked which steps it has, so that none is there twice however a process ended."""

    def __init__(self, client: MlflowClient, uri: str, start: Start, experiment: str) -> None:
        self.client = client
        self.known: dict[str, int] = {}
        if start.run is None:
            found = client.get_experiment_by_name(experiment)
            place = found.experiment_id if found else client.create_experiment(experiment)
            self.run = client.create_run(place, run_name=start.name).info.run_id
        else:
            place, self.run = self._go_on(start.run), start.run
        self.url = f"{uri.rstrip('/')}/#/experiments/{place}/runs/{self.run}" if uri.startswith("http") else uri

    def _go_on(self, run: str) -> str:
        """Open the run again; returns its experiment."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_run(run)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise Gone(run) from error
            raise
        if found.info.lifecycle_stage != "active":
            raise Gone(run)
        self.known = {metric.key: metric.step for metric in found.data._metric_objs}
        self.client.update_run(run, status="RUNNING")
        return found.info.experiment_id

    def settings(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        made = [Param(_clean(k), str(v)[:LONGEST_PARAM]) for k, v in values.items()]
        for some in batches(made, PARAMS):
            self.client.log_batch(self.run, params=some)

    def about(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        made = [RunTag(_clean(k), v[:LONGEST_TAG]) for k, v in values.items()]
        for some in batches(made, TAGS):
            self.client.log_batch(self.run, tags=some)

    def points(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        named = [(_clean(p.name), p) for p in points]
        new = [Metric(name, p.value, now, p.step) for name, p in named if p.step > self.known.get(name, -1)]
        for some in batches(new, METRICS):
            self.client.log_batch(self.run, metrics=some)

    def scores(self, values: Mapping[str, float]) -> None:
        self.points([Point(name, 0, value) for name, value in values.items()])

    def file(self, path: Path, name: str) -> None:
        folder = name.rpartition("/")[0]
        self.client.log_artifact(self.run, str(path), folder or None)

    def model(self, folder: Path, name: str) -> None:
        self.client.log_artifacts(self.run, str(folder), f"models/{name}")

    def end(self, outcome: Outcome) -> None:
        self.client.set_terminated(self.run, STATUS[outcome])


def _clean(name: str) -> str:
    """A name that every MLflow takes.

    >>> _clean("compare/sft − base/η")
    'compare/sft _ base/η'
    """
    return re.sub(r"[^\w\-. /]", "_", name)
