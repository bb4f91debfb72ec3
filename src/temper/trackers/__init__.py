"""Trackers: each takes what it is handed and passes it on to its own tool. None of them reads a run folder, and none is
imported by a process that trains: their packages are met in the process that follows the run (`temper.tracking`)."""

from temper.trackers import clearml, mlflow, tensorboard, wandb  # noqa: F401  fills the registry
from temper.trackers.base import Asked, Entry, Gone, Outcome, Point, Start, Tracker, asked, check, trackers

__all__ = ["Asked", "Entry", "Gone", "Outcome", "Point", "Start", "Tracker", "asked", "check", "trackers"]
