"""The process that follows one run for one tracker: `python -m temper.tracking.follow RUN NAME OPTIONS PIPE`.

It ends when the other end of the pipe is closed, however the process there ended: then it sends the rest, and is gone
when its time is over. Exit codes: 0 all is sent, 3 something is not, 4 another process is sending.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from temper.trackers import Gone, Start, Tracker, trackers
from temper.tracking.contents import Contents
from temper.tracking.memory import Memory, Sent, alone, where

ALL, REST, BUSY = 0, 3, 4
PAUSE, LONGEST_PAUSE = 2.0, 60.0  # seconds between two looks; each failure doubles the pause
MODELS_SPEED = 1e7  # bytes a second that models are given to arrive
LONGEST = 100  # characters of an error


class Sender:
    """Hands a run's news to one tracker, which is met when there is something to hand over and not before."""

    def __init__(self, folder: Path, name: str, options: Mapping[str, Any]) -> None:
        self.name, self.options = name, options
        self.contents, self.memory = Contents(folder), Memory(folder, name)
        self.tracker: Tracker | None = None
        self.sent: Sent | None = None  # with what was handed over and may not have arrived yet
        self.whole = True  # the next look reads files from their beginning

    def send(self, *, final: bool = False) -> bool:
        """Hand over what is new; whether nothing stood in the way. A tracker's failure is noted and never raised."""
        try:
            if (self.contents.folder / "manifest.json").is_file():
                self._send(final)
            self.memory.tell(None)
            return True
        except Gone:
            self._forget()
            return self.send(final=final)
        except (Exception, SystemExit) as error:
            print(f"{time.strftime('%X')} {type(error).__name__}: {error}", flush=True)
            self.tracker, self.sent, self.whole = None, None, True
            with contextlib.suppress(OSError):
                self.memory.tell(said(error))
            return False

    def _send(self, final: bool) -> None:
        self.contents.look(whole=self.whole or final)
        self.whole = False
        sent, took = self._current(), False
        for item in self.contents.news(sent.marks, sent.steps, self.options.get("models", "none"), final=final):
            self.tracker = self.tracker or self._met()
            getattr(self.tracker, item.what)(*item.args)
            sent.note(item)
            took = True
        outcome = self.contents.outcome
        if final and (self.tracker or sent.outcome != outcome) and sent.marks:
            self.tracker = self.tracker or self._met()
            self.tracker.end(outcome)
            self.tracker, sent.outcome = None, outcome
            self._keep()
        elif took and self.tracker and self.tracker.arrived():
            self._keep()

    def _current(self) -> Sent:
        """What is remembered of the run that fits what the folder holds now; one that fits no longer is closed."""
        if self.sent is None or not self.sent.fits(self.contents, where(self.options)):
            if self.tracker:
                self.tracker.end("stopped")
                self.tracker = None
            self.sent = self.memory.of(self.contents, self.options)
            self.contents.look(whole=True)
        return self.sent

    def _forget(self) -> None:
        """The tracker's run was deleted there: all is sent to another one."""
        assert self.sent
        self.memory.forget(self.sent)
        self.tracker, self.sent, self.whole = None, None, True

    def _met(self) -> Tracker:
        """The tracker's run, begun or gone on with; its name is kept at once, so that no second one is begun."""
        assert self.sent
        contents, new = self.contents, self.sent.run is None
        folder = contents.folder.resolve() / "trackers"
        start = Start(contents.name, contents.manifest["recipe"], folder, self.sent.run, self.sent.notes)
        met = trackers.get(self.name)(start, **self.options)
        if self.sent.run not in (None, met.run):  # another one took its place
            raise Gone(self.sent.run)
        self.sent.run, self.sent.url = met.run, met.url
        if new:
            self._keep()
        return met

    def _keep(self) -> None:
        assert self.sent
        self.sent.keys |= self.contents.keys
        self.memory.keep(self.sent)


def said(error: BaseException) -> str:
    """What was at an error's root, and the error itself: «Connection refused» is the end of a long story."""
    root = error
    while root.__cause__ or root.__context__:
        root = root.__cause__ or root.__context__ or root
    texts = dict.fromkeys(" ".join(str(e).split()) or type(e).__name__ for e in (root, error))
    first, *rest = (text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…" for text in texts)
    return f"{first} ({rest[0]})" if rest else first


def patience(folder: Path, options: Mapping[str, Any]) -> float | None:
    """Seconds that the rest may take once a run has ended; None: as long as it takes."""
    if options["wait"] is None:
        return None
    contents = Contents(folder)
    with contextlib.suppress(Exception):  # it is a guess
        contents.look()
        wanted = contents.models(options.get("models", "none"))
        size = sum(p.stat().st_size for _, model in wanted for p in model.rglob("*") if p.is_file())
        return options["wait"] + size / MODELS_SPEED
    return options["wait"]


def _watch(pipe: int, ended: threading.Event, folder: Path, options: Mapping[str, Any]) -> None:
    """Wait for the other end to close the pipe; then the time runs, even while the tracker does not return."""
    while os.read(pipe, 1):
        pass
    ended.set()
    limit = patience(folder, options)
    if limit is not None:
        time.sleep(limit + 1)  # whoever waits at the other end decides first
        os._exit(REST)


def follow(folder: Path, name: str, options: Mapping[str, Any], ended: threading.Event) -> int:
    """Send what comes until `ended`, then the rest. Another process that sends this run, such as that of a run that was
    killed a moment ago, is waited for."""
    while True:
        with alone(folder, name) as mine:
            if mine:
                sender, pause = Sender(folder, name, options), PAUSE
                while not ended.is_set():
                    pause = PAUSE if sender.send() else min(2 * pause, LONGEST_PAUSE)
                    ended.wait(pause)
                return ALL if sender.send(final=True) else REST
        if ended.is_set():
            return BUSY
        ended.wait(1.0)


def main(words: Sequence[str]) -> int:
    """RUN NAME OPTIONS PIPE → the exit code."""
    folder, name, options, pipe = Path(words[0]), words[1], json.loads(words[2]), int(words[3])
    with contextlib.suppress(OSError):
        os.nice(10)
    ended = threading.Event()
    threading.Thread(target=_watch, args=(pipe, ended, folder, options), daemon=True).start()
    return follow(folder, name, options, ended)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # threads that a tracker's package left behind are not waited for
