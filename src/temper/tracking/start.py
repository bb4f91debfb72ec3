"""A run's side of its trackers: it starts the processes that follow it, and at its end waits for them a while."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from temper import overlay
from temper.errors import RecipeError, RunError
from temper.job import Log
from temper.trackers import Asked, asked, check, trackers
from temper.tracking.contents import Contents
from temper.tracking.follow import ALL, BUSY, patience
from temper.tracking.memory import Memory

STOPPED = 5.0  # seconds, where somebody wants the run to stop
# No tracker needs a graphics card or many threads, and the run has use for both.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class Followers:
    """One process a tracker. None of their failures is raised.

    Args:
        asked: the trackers, with their options.

    Raises:
        RecipeError: a tracker's package is not installed, or is not told of its server.
    """

    def __init__(self, asked: Sequence[Asked], folder: Path, log: Log) -> None:
        for one in asked:
            check(one)
        self.asked, self.folder, self.log = asked, folder, log
        self.processes: dict[str, tuple[subprocess.Popen[bytes], int]] = {}  # with the pipe that tells it of the end

    def start(self) -> None:
        """Begin to follow the run; its manifest is there."""
        for one in self.asked:
            try:
                self.processes[one.name] = self._process(one)
            except OSError as error:
                self.log(f"warning: {one.name} does not follow this run: {error}. {self._later(one)}", "yellow")

    def _process(self, one: Asked) -> tuple[subprocess.Popen[bytes], int]:
        (self.folder / "trackers").mkdir(exist_ok=True)
        reading, writing = os.pipe()
        words = [str(self.folder), one.name, json.dumps(one.options), str(reading)]
        try:
            with open(self.folder / "trackers" / f"{one.name}.log", "ab") as told:
                process = subprocess.Popen(
                    [sys.executable, "-m", "temper.tracking.follow", *words],
                    stdin=subprocess.DEVNULL, stdout=told, stderr=told, pass_fds=(reading,),
                    start_new_session=True,  # Ctrl-C is the run's, which tells of its end
                    env={**os.environ, **ENVIRONMENT},
                )  # fmt: skip
        except OSError:
            os.close(writing)
            raise
        finally:
            os.close(reading)
        return process, writing

    def finish(self, *, stopped: bool = False) -> bool:
        """Tell them that the run is over, wait, and say what each tracker has; whether each has everything.

        Args:
            stopped: somebody waits for the run to stop.
        """
        began, whole = time.monotonic(), True
        for _, pipe in self.processes.values():
            os.close(pipe)
        for one in self.asked:
            if one.name not in self.processes:
                continue
            limit = STOPPED if stopped else patience(self.folder, one.options)
            code = _ended(self.processes[one.name][0], None if limit is None else began + limit - time.monotonic())
            whole &= code == ALL
            try:
                self._tell(one, code, limit)
            except Exception as error:  # whatever is wrong with the folder, the run has ended as it has
                self.log(f"warning: nobody can tell what {one.name} has: {error}", "yellow")
        self.processes.clear()
        return whole

    def _tell(self, one: Asked, code: int | None, limit: float | None) -> None:
        memory = Memory(self.folder, one.name)
        if code == ALL:
            if memory.runs:
                sent = memory.runs[-1]
                self.log(f"{one.name} has all of it ({sent.points:,} points): {sent.url}")
            return
        if code == BUSY:
            why = "another process is sending this run to it"
        elif code is None:
            why = f"it did not take them within {limit:.0f} s"
        else:
            why = memory.problem or f"its process ended with code {code}; see trackers/{one.name}.log"
        left = self._left(one, memory)
        self.log(f"warning: {one.name} lacks {left}: {why}. {self._later(one)}", "yellow")

    def _left(self, one: Asked, memory: Memory) -> str:
        """What was not sent, counted."""
        try:
            contents = Contents(self.folder)
            contents.look()
            sent = memory.of(contents, one.options)
            points, files, models = 0, 0, list[str]()
            for item in contents.news(sent.marks, sent.steps, one.options.get("models", "none"), final=True):
                points += len(item.args[0]) if item.what == "points" else 0
                files += item.what == "file"
                models += [item.args[1]] if item.what == "model" else []
        except (OSError, ValueError, KeyError):
            return "a part of this run"
        counted = [f"{n:,} {what}" for n, what in ((points, "points"), (files, "files")) if n]
        counted += [f"the model of {name}" for name in models]
        return " and ".join([", ".join(counted[:-1]), counted[-1]] if counted[1:] else counted) or "how the run ended"

    def _later(self, one: Asked) -> str:
        return (
            f"The run folder has everything; to send it: temper track {shlex.quote(str(self.folder))} --to {one.name}"
        )


def _ended(process: subprocess.Popen[bytes], limit: float | None) -> int | None:
    """The exit code; None where it took longer than the limit, or somebody would not wait, and was killed."""
    try:
        return process.wait(None if limit is None else max(0.0, limit))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it started itself
        process.wait()


def chosen(folder: Path, names: Sequence[str], sets: Sequence[str]) -> tuple[Asked, ...]:
    """The trackers of a run's recipe, or those named, with the recipe's options under `sets`: `mlflow.url=http://…`.

    Raises:
        RecipeError: none is named anywhere; an unknown name or option.
        RunError: there is no such run.
    """
    if not (folder / "recipe.yaml").is_file():
        raise RunError(f"{folder} is no run folder", do="name the folder that `temper run` wrote, such as runs/NAME")
    lines: dict[overlay.KeyPath, str] = {}
    entries = overlay.read(folder / "recipe.yaml", lines, ()).get("trackers") or []
    known = {a.name: a.options for a in asked(entries, lines, str(folder / "recipe.yaml"))}
    for text in sets:
        known = overlay.merge(known, overlay.assignment(text, {}, lines, tuple(trackers)))
    if not names and not known:
        raise RecipeError("the recipe of this run names no tracker", do=f"name one with --to: {', '.join(trackers)}")
    return asked([{name: known.get(name, {})} for name in names or known], lines, "--to")


def send(folder: Path, asked: Sequence[Asked], log: Log) -> None:
    """Send a run that has ended, or what of it was not sent, however long that takes.

    Raises:
        RecipeError: as `Followers`.
        RunError: a tracker has not got everything.
    """
    patient = [Asked(one.name, {**one.options, "wait": None}) for one in asked]
    followers = Followers(patient, folder, log)
    followers.start()
    if not followers.finish():
        raise RunError("not everything was sent", where=str(folder), do="the same command sends the rest")
