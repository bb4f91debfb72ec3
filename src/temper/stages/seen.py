"""What a model has seen in training, so that an evaluation can tell that it asks for it again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from temper.data.formats import split
from temper.job import Job
from temper.types import Record, Row

TRAINED_ON = "trained_on.npy"


def note_trained_on(job: Job, records: Sequence[Record]) -> None:
    """Hashes of the rows that a model has seen in training, its base's included: evaluation looks for its own there."""
    note_marks(job, np.array([fingerprint(r) for r in records], dtype=np.uint64))


def note_marks(job: Job, own: np.ndarray) -> None:
    """As `note_trained_on`, of rows by their fingerprints, uint64 [N]."""
    before = [np.load(f) for r in job.inputs.values() if (f := r.path / TRAINED_ON).is_file()]
    np.save(job.dir / TRAINED_ON, np.unique(np.concatenate([own, *before])))


def seen_before(records: Sequence[Record], stage: Path) -> list[Record]:
    """Those rows that the model of a finished stage was trained on."""
    file = stage / TRAINED_ON
    trained = set(np.load(file).tolist()) if file.is_file() else set()
    return [r for r in records if fingerprint(r) in trained]


def fingerprint(record: Record) -> int:
    """64 bits of what a row asks, in whichever form it asks it; of a text that asks nothing, of the text."""
    text = " ".join(repr(_asked(record.row)).split())
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _asked(row: Row) -> Any:
    prompt, alone = row.get("prompt"), row.get("text")
    if {"chosen", "rejected"} <= row.keys():
        found = split(row)
        prompt, alone = found[:2] if found else (prompt, row["chosen"])
    elif "messages" in row:
        messages = row["messages"]
        prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if isinstance(prompt, list) and [m["role"] for m in prompt] == ["user"]:
        prompt = prompt[0]["content"]
    return alone if prompt is None else [prompt]
