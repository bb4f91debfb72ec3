"""Logs of one JSON object a line, which a run that goes on takes back to where it goes on from."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from temper.runfolder import write_atomic


def append(file: Path, line: dict[str, Any]) -> None:
    with open(file, "a", encoding="utf-8") as out:
        out.write(json.dumps(line, ensure_ascii=False) + "\n")


def forget_after(file: Path, step: int) -> None:
    """Drop the lines of later steps, and a last line that a kill cut short: those steps will be taken again.

    So will the pass over all validation rows after the last step, whose lines are marked «whole».
    """
    if file.exists():
        kept = []
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):  # U+2028 may stand in an answer
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if found["step"] <= step and not found.get("whole"):
                    kept.append(line)
        write_atomic(file, "".join(f"{line}\n" for line in kept))
