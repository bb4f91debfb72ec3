"""A server of MLflow that is really there, away, silent or dying: the run ends as it would without it, and later all is there once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import temper
from served import Reply, serving
from staged_runs import lines_of, weights
from temper import cli
from temper.job import Log
from temper.trackers import Asked
from temper.tracking.follow import REST
from temper.tracking.memory import Memory
from temper.tracking.start import Followers
from tracked import ByHand, logged, recipe


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


class Server:
    """`mlflow server` with a database and artefacts in a folder; it can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        folder.mkdir()

    def start(self) -> None:
        words = [
            str(Path(sys.executable).with_name("mlflow")), "server", "--backend-store-uri", "sqlite:///store.db",
            "--artifacts-destination", "artifacts", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                words, cwd=self.folder, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        ends = time.monotonic() + 90
        while True:
            assert self.process.poll() is None and time.monotonic() < ends, (self.folder / "log").read_text()
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.1)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ask(self, what: str, **query: str) -> Any:
        text = f"{self.url}/api/2.0/mlflow/{what}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(text, timeout=30) as answer:
            return json.load(answer)

    def history(self, run: str, name: str) -> list[tuple[int, float]]:
        found = self.ask("metrics/get-history", run_id=run, metric_key=name).get("metrics", [])
        return sorted((m["step"], m["value"]) for m in found)

    def files(self, run: str, folder: str = "") -> set[str]:
        out: set[str] = set()
        for entry in self.ask("artifacts/list", run_id=run, path=folder).get("files", []):
            out |= self.files(run, entry["path"]) if entry["is_dir"] else {entry["path"]}
        return out


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("mlflow") / "server")
    made.start()
    yield made
    made.kill()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that gives up at once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


def asked(url: str, wait: float = 60.0, models: str = "best") -> Asked:
    return Asked("mlflow", {"url": url, "experiment": None, "models": models, "wait": wait})


def test_a_server_gets_the_whole_run(server: Server, tmp_path: Path, words_model: Path) -> None:
    entry = {"mlflow": {"url": server.url}}
    run = temper.run(recipe(tmp_path, words_model, [entry]), out=tmp_path / "run", quiet=True)
    [sent] = Memory(run, "mlflow").runs
    found = server.ask("runs/get", run_id=sent.run)["run"]
    assert found["info"]["status"] == "FINISHED" and found["info"]["run_name"] == "run"
    settings = {p["key"]: p["value"] for p in found["data"]["params"]}
    assert (settings["sft.lr"], settings["sft.adapter.r"], settings["sft.schedule"]) == ("0.01", "4", "cosine")
    tags = {t["key"]: t["value"] for t in found["data"]["tags"]}
    assert tags["packages.torch"] and tags["sft.layout"] == "tree"
    for name, points in logged(run).items():
        assert server.history(sent.run or "", name) == [(s, pytest.approx(v)) for s, v in points], name
    scores = {m["key"]: m["value"] for m in found["data"]["metrics"]}
    evaluation = json.loads((run / "compare" / "evaluation.json").read_text())
    assert scores["compare/sft/loss"] == pytest.approx(evaluation["models"]["sft"]["loss"]["value"])
    files = server.files(sent.run or "")
    assert {
        "recipe.yaml", "manifest.json", "report/index.html", "report/report.md", "report/results.json",
        "sft/samples.jsonl", "models/sft/adapter_model.safetensors",
    } <= files  # fmt: skip
    assert not any(name.startswith("models/weak") for name in files)
    with urllib.request.urlopen(
        f"{server.url}/get-artifact?path=report/index.html&run_uuid={sent.run}", timeout=30
    ) as answer:
        assert answer.read() == (run / "report" / "index.html").read_bytes()


def test_a_server_that_dies_in_the_middle(server: Server, tmp_path: Path) -> None:
    """It had some steps; the rest is warned of, and sent by the command of the warning, each step once."""
    run = ByHand(tmp_path / "run")
    run.log(1, 2, 3)
    log = Log(tmp_path / "log", quiet=True)
    followers = Followers([asked(server.url, wait=30)], run.path, log)
    followers.start()
    until(lambda: any(s.steps.get("sft/loss") == 3 for s in Memory(run.path, "mlflow").runs))
    server.kill()
    run.log(4, 5)
    run.end()
    assert not followers.finish()
    told = (tmp_path / "log").read_text()
    # the settings, the recipe and three steps are there
    assert "warning: mlflow lacks 2 points, 4 files and the model of sft: " in told, told
    assert f"to send it: temper track {run.path} --to mlflow" in told and "Traceback" not in told
    server.start()
    words = ["track", str(run.path), "--to", "mlflow", "--set", f"mlflow.url={server.url}"]
    assert cli.main(words) == 0
    [sent] = Memory(run.path, "mlflow").runs
    assert server.history(sent.run or "", "sft/loss") == [(n, n / 8) for n in range(1, 6)]
    assert server.ask("runs/get", run_id=sent.run)["run"]["info"]["status"] == "FINISHED"
    assert "models/sft/model.safetensors" in server.files(sent.run or "")
    before = (run.path / "trackers" / "mlflow.json").read_bytes()
    assert cli.main(words) == 0 and (run.path / "trackers" / "mlflow.json").read_bytes() == before
    # what the server took and this machine forgot, as after a power cut, is not there twice either
    memory = json.loads(before)
    memory["runs"][0] |= {"steps": {}, "marks": {}, "outcome": None}
    (run.path / "trackers" / "mlflow.json").write_text(json.dumps(memory))
    assert cli.main(words) == 0
    assert server.history(sent.run or "", "sft/loss") == [(n, n / 8) for n in range(1, 6)]


def test_a_run_that_was_deleted_there_is_sent_anew(server: Server, tmp_path: Path) -> None:
    run = ByHand(tmp_path / "run")
    run.log(1, 2)
    words = ["track", str(run.path), "--to", "mlflow", "--set", f"mlflow.url={server.url}"]
    assert cli.main(words) == 0
    [first] = Memory(run.path, "mlflow").runs
    body = json.dumps({"run_id": first.run}).encode()
    header = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/api/2.0/mlflow/runs/delete", body, header)
    urllib.request.urlopen(request, timeout=30).close()
    run.log(3)
    assert cli.main(words) == 0
    [second] = Memory(run.path, "mlflow").runs
    assert second.run != first.run and server.history(second.run or "", "sft/loss")[-1] == (3, 3 / 8)


def until(holds: Callable[[], bool], patience: float = 90.0) -> None:
    ends = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["away", "refuses", "silent"])
def test_a_tracker_that_fails_changes_nothing(
    how: str, tmp_path: Path, words_model: Path, plain_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody at the port; an error as the answer to everything; a server that takes a connection and says nothing."""
    with socket.socket() as mute, serving(lambda asked: Reply(501, "no")) as refusing:
        mute.bind(("127.0.0.1", 0))
        mute.listen(50)
        port = {"away": free_port(), "silent": mute.getsockname()[1]}.get(how) or refusing.server.server_address[1]
        entry = {"mlflow": {"url": f"http://127.0.0.1:{port}", "wait": 6 if how == "silent" else 60}}
        file = recipe(tmp_path, words_model, [entry])
        began = time.monotonic()
        assert cli.main(["run", str(file), "--out", str(tmp_path / "run")]) == 0
        assert time.monotonic() - began < 60
    out = capsys.readouterr().out
    assert weights(tmp_path / "run") == weights(plain_run) != {}
    assert lines_of(tmp_path / "run" / "sft" / "metrics.jsonl") == lines_of(plain_run / "sft" / "metrics.jsonl")
    [told] = [line for line in out.splitlines() if line.startswith("warning: mlflow lacks ")]
    assert {"away": "Connection refused", "refuses": "error code 501", "silent": "within 6 s"}[how] in told, told
    assert "Traceback" not in out and out.splitlines()[-1].startswith("report: ")
    points = sum(map(len, logged(tmp_path / "run").values()))
    assert f"mlflow lacks {points:,} points, " in told


def test_a_silent_server_holds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped waits a moment; a process whose run was killed ends by itself when its time is over."""
    monkeypatch.setattr("temper.tracking.start.STOPPED", 1.0)
    run = ByHand(tmp_path / "run")
    run.log(1)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(50)
        one = asked(f"http://127.0.0.1:{mute.getsockname()[1]}", wait=1)
        followers = Followers([one], run.path, Log(None, quiet=True))
        followers.start()
        process = followers.processes["mlflow"][0]
        began = time.monotonic()
        assert not followers.finish(stopped=True)
        assert time.monotonic() - began < 5 and process.returncode == -signal.SIGKILL
        followers.start()
        process, pipe = followers.processes["mlflow"]
        os.close(pipe)  # as the system does for a process that is killed
        assert process.wait(timeout=30) == REST
