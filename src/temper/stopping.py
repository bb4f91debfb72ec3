"""A wish to stop that comes in the middle of work: whoever can end well is given the time to."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_wanted, _patient = threading.Event(), threading.Event()


class Stopped(Exception):
    """Work ended early and well, as it was asked to: what was done is kept."""


def ask() -> bool:
    """Ask for an end; whether somebody will see to it. Else the one who asks has to."""
    if _patient.is_set():
        _wanted.set()
    return _patient.is_set()


def asked() -> bool:
    return _wanted.is_set()


@contextlib.contextmanager
def minded() -> Iterator[None]:
    """Within, `asked` is looked at between two steps, and what was done is saved before the end."""
    _patient.set()
    try:
        yield
    finally:
        _patient.clear()
        _wanted.clear()
