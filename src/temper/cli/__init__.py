"""The command line. Heavy modules are imported inside the commands: `temper --help` must not wait for torch."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from temper import terminal
from temper.cli import planning, runs, trained  # noqa: F401  (each adds its commands)
from temper.cli.base import SEVERAL, WORDS, app
from temper.errors import TemperError

__all__ = ["app", "main", "spread"]


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 1 for an error, 2 for a wrong flag, 130 and 143 when it was stopped."""
    words = list(sys.argv[1:] if words is None else words)
    WORDS[:] = words
    debug = "--debug" in words
    if not debug:  # what matters in what libraries log is checked and said by Temper
        for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
            os.environ.setdefault(name, "error")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning)  # what libraries tell one another
    try:
        app(args=spread(words), prog_name="temper")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except TemperError as error:
        if debug:
            traceback.print_exc()
        terminal.tell(error.what, error.where, error.do)
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            terminal.tell(*_unforeseen(error))
        return 1
    return 0


def _unforeseen(error: Exception) -> tuple[str, str, str]:
    """(what, where, do) of an error that is not Temper's own."""
    line = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's is not imported here
        advice = (
            "lower micro_tokens, and the run goes on from its last checkpoint (in evaluate: batch_size); or set "
            "activation_checkpointing: true; finished stages stay"
        )
        return "there is not enough memory", line, advice
    if isinstance(error, OSError) and error.strerror:
        return error.strerror, str(error.filename or ""), "check the path and who may write there; finished stages stay"
    do = "run the same command with --debug to see where; finished stages stay"
    return f"this is a defect of Temper, not of your recipe: {line}", "", do


def spread(words: Sequence[str]) -> list[str]:
    """`--stages a b` → `--stages a --stages b`, for options that take several values, where the recipe stands first.

    >>> spread(["run", "my.yaml", "--stages", "a", "b", "--quiet"])
    ['run', 'my.yaml', '--stages', 'a', '--stages', 'b', '--quiet']
    >>> spread(["run", "--stages", "a", "my.yaml"])
    ['run', '--stages', 'a', 'my.yaml']
    """
    command = next((k for k, w in enumerate(words) if not w.startswith("-")), len(words))
    if words[command + 1 : command + 2] == [] or words[command + 1].startswith("-"):
        return list(words)
    out: list[str] = list(words[: command + 2])
    option, first = "", False
    for word in words[command + 2 :]:
        if word.startswith("-"):
            option, first = (word, True) if word in SEVERAL else ("", False)
            out.append(word)
        elif option and not first:
            out += [option, word]
        else:
            out.append(word)
            first = False
    return out
