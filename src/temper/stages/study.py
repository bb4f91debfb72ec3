"""Which settings a sweep tries next: all of a grid, or what Optuna proposes from a study that several runs may share.

A trial is the dictionary that stands in trials.json: number, settings, values, seconds, state, error, folder.
"""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from temper.errors import RunError
from temper.stages.space import Range, Settings, Space, grid

DONE, FAILED, RUNNING = "done", "failed", "running"
OPENINGS = 5  # of a database
LOST_SECONDS = 600.0  # another's trial that runs for longer, and for three times the longest one, is taken for lost


class Grid:
    """All points in order. What was done is known by the trials' own folders, so nothing is kept here."""

    def __init__(self, space: Space) -> None:
        self._points = grid(space)
        self.trials: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._points)

    def ask(self) -> tuple[int, Settings] | None:
        number = len(self.trials)
        return (number, self._points[number]) if number < len(self._points) else None

    def tell(self, trial: dict[str, Any]) -> None:
        self.trials.append(trial)


class Study:
    """A study of Optuna, asked and told one trial at a time.

    A proposal is a function of (seed, the trial's number, what the study knows): a sweep that was killed goes on with
    the trial it was in, and proposes what it would have proposed.
    """

    def __init__(
        self, space: Space, best: Sequence[str], *, name: str, storage: str | None, folder: Path, search: str, total: int, seed: int,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._search, self._total, self._seed, self._say = space, search, total, seed, say
        self._own = storage is None  # nobody else knows of it
        self._me = f"{socket.gethostname()}:{folder.resolve().with_suffix('')}"
        self._states = optuna.trial.TrialState
        self._study = self._opened(name, storage or f"sqlite:///{folder / 'study.db'}", best)

    def _opened(self, name: str, storage: str, best: Sequence[str]) -> Any:
        """The study, made where it is not there; two processes that make its tables at once are in each other's way."""
        import optuna

        directions: list[Any] = ["maximize" if b == "highest" else "minimize" for b in best]
        for left in reversed(range(OPENINGS)):
            try:
                return optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
            except Exception as error:  # of whatever database the URL names
                if not left:
                    said = (str(error).splitlines() or [""])[0]
                    raise RunError(
                        f"the sweep's study cannot be opened: {said}", where=storage,
                        do="storage is a URL such as sqlite:////shared/study.db, of a database that can be written",
                    ) from None  # fmt: skip
                time.sleep(random.random())
        raise AssertionError  # not reached

    def __len__(self) -> int:
        return self._total

    @property
    def trials(self) -> list[dict[str, Any]]:
        """All trials of the study, those of other processes included."""
        return [
            {"number": t.number, "settings": self._settings(t.params), "values": {}, "seconds": None, "state": RUNNING,
             "error": None, "folder": None, **json.loads(t.user_attrs.get("trial", "{}"))}
            for t in self._known()
        ]  # fmt: skip

    def _known(self) -> list[Any]:
        return [t for t in self._study.get_trials(deepcopy=False) if t.number < self._total]

    def ask(self) -> tuple[int, Settings] | None:
        """The trial that this process was in, else a new one; None where there are enough."""
        import optuna

        known = self._known()
        running = [t for t in known if t.state == self._states.RUNNING]
        mine = next((t for t in running if self._own or t.user_attrs.get("owner") == self._me), None)
        if mine is None and len(known) >= self._total:
            return None
        trial = self._study.ask() if mine is None else optuna.trial.Trial(self._study, mine._trial_id)
        self._trial = trial
        if trial.number >= self._total:  # another process took the last one in between
            self._study.tell(trial.number, state=self._states.FAIL)
            return None
        trial.set_user_attr("owner", self._me)
        kinds = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
        seed = random.Random(f"{self._seed}:{trial.number}").getrandbits(32)
        self._study.sampler = kinds[self._search](seed=seed)
        return trial.number, {field: self._suggested(trial, field, space) for field, space in self._space.items()}

    def _suggested(self, trial: Any, field: str, space: Range | list[Any]) -> Any:
        if isinstance(space, list):
            return space[trial.suggest_categorical(field, list(range(len(space))))]
        suggest = trial.suggest_int if space.whole else trial.suggest_float
        return suggest(field, space.low, space.high, log=space.log)

    def _settings(self, params: dict[str, Any]) -> Settings:
        """Optuna holds the place of a value in a list, for a value may be a mapping."""
        return {f: s[params[f]] if isinstance(s, list) else params[f] for f, s in self._space.items() if f in params}

    def tell(self, trial: dict[str, Any]) -> None:
        study, number = self._study, trial["number"]
        self._trial.set_user_attr("trial", json.dumps(trial))
        if trial["state"] == DONE:
            study.tell(number, [value["value"] for value in trial["values"].values()])
        else:
            study.tell(number, state=self._states.FAIL)

    def wait(self, poll: float = 2.0) -> None:
        """Until other processes have told of their trials; one that seems lost is said and no longer waited for."""
        began, told = time.monotonic(), False
        while others := [t for t in self._known() if t.state == self._states.RUNNING]:
            longest = max((t["seconds"] or 0.0 for t in self.trials), default=0.0)
            if time.monotonic() - began > max(LOST_SECONDS, 3 * longest):
                self._say(f"trials {', '.join(str(t.number) for t in others)} of other processes seem lost: left out")
                return
            if not told:
                self._say(f"waiting for {len(others)} trials of other processes")
                told = True
            time.sleep(poll)
