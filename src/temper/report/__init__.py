"""Reads run folders and writes pages: never a model, never a stage's folder, and nothing of temper but its errors and
statistics."""

from temper.report.page import build

__all__ = ["build"]
