"""The files of a run folder as types: the reading side of docs/run-folder.md.

Everything that may be absent has a default, so that a report can be made of a run that failed half-way; a value of
the wrong type is a ValidationError, which the reader turns into a sentence.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ManifestStage(BaseModel):
    """A stage of manifest.json."""

    name: str
    kind: str = ""
    key: str | None = None  # null where it was not asked for
    cached: bool = False
    status: str = "done"  # done | skipped | failed | pending
    error: str | None = None


class Manifest(BaseModel):
    """manifest.json: what was started, on what, and how each stage ended."""

    recipe: str = ""
    profile: str | None = None
    seed: int | None = None
    created: str = ""
    command: list[str] = []
    temper: str = ""
    python: str = ""
    packages: dict[str, str | None] = {}
    hardware: dict[str, Any] = {}
    git: dict[str, Any] | None = None
    seconds: float | None = None
    stages: list[ManifestStage] = []


class StageInfo(BaseModel):
    """stage.json, without the list of files."""

    name: str = ""
    kind: str = ""
    version: int | None = None
    key: str = ""
    config: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    seconds: float | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    examples: int | None = None
    trainable_parameters: int | None = None
    parameters: int | None = None
    steps: int | None = None
    peak_memory_bytes: int | None = None
    bytes_on_disk: int | None = None
    warnings: list[str] = []
    facts: dict[str, Any] = {}
    summary: str | None = None


class Card(BaseModel):
    """card.json of a stage that makes data."""

    source: str = ""
    sha256: str | None = None
    revision: str | None = None
    rows_in: int | None = None
    rows_out: int | None = None
    splits: dict[str, int] = {}
    dropped: dict[str, int] = {}
    cut: int | None = None
    lengths: dict[str, dict[str, dict[str, Any]]] = {}  # split → column → unit, min, median, p95, max
    leaks: dict[str, Any] = {}
    examples: list[dict[str, Any]] = []
    rejected: dict[str, int] = {}  # of a teacher's answers, every try counted


class Measured(BaseModel):
    """One metric of one model."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    signature: str = ""
    higher_is_better: bool | None = None


class Comparison(BaseModel):
    """difference = b − a."""

    metric: str
    a: str
    b: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_adjusted: float | None = None
    smallest_detectable: float | None = None
    detectable_level: float | None = None  # the p below which that difference counts as shown


class Spread(BaseModel):
    """One metric of one model over seeds."""

    values: list[float | None] = []
    mean: float | None = None
    sd: float | None = None


class Evaluation(BaseModel):
    """evaluation.json."""

    data: dict[str, Any] = {}
    decoding: dict[str, Any] = {}
    rows: str | None = None
    models: dict[str, dict[str, Measured]] = {}
    comparisons: list[Comparison] = []
    spread: dict[str, dict[str, Spread]] = {}

    @property
    def metrics(self) -> list[str]:
        """All metrics in the order in which they first appear; the first one is the main one."""
        return list(dict.fromkeys(metric for measured in self.models.values() for metric in measured))

    def higher_is_better(self, metric: str) -> bool | None:
        for measured in self.models.values():
            if metric in measured:
                return measured[metric].higher_is_better
        return None

    def row_count(self, comparison: Comparison) -> int | None:
        measured = self.models.get(comparison.b, {}).get(comparison.metric)
        return measured.n if measured and measured.n is not None else self.data.get("rows")


class Point(BaseModel):
    """A point of front.json: two scores of one setting."""

    label: str = ""
    setting: dict[str, Any] = {}
    x: Measured
    y: Measured


class Front(BaseModel):
    """front.json of a stage that gives several models: what of one score costs how much of another."""

    x: str
    y: str
    points: list[Point] = []


class Objective(BaseModel):
    """What a sweep measures, and which end is the better one."""

    measure: str
    metric: str
    best: Literal["highest", "lowest"] = "highest"


class Trial(BaseModel):
    """A trial of trials.json."""

    number: int
    settings: dict[str, Any] = {}
    values: dict[str, Measured] = {}
    seconds: float | None = None
    state: str = "done"  # done | failed | running
    error: str | None = None
    folder: str | None = None


class Trials(BaseModel):
    """trials.json of a sweep."""

    search: str = ""
    fields: list[str] = []
    measures: list[Objective] = []
    best: int | None = None
    front: list[int] = []
    trials: list[Trial] = []


class CurvePoint(BaseModel):
    """A trial on a line of curve.json, compared with the last point of the line: difference = last − this."""

    x: float
    trial: int = 0
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None
    p_adjusted: float | None = None


class CurveLine(BaseModel):
    """The points for one combination of the other settings, and what they say."""

    others: str = ""
    higher_is_better: bool | None = None
    points: list[CurvePoint] = []
    stops: float | None = None
    finding: str = ""


class LearningCurve(BaseModel):
    """A score over one varied field."""

    field: str
    lines: list[CurveLine] = []


class Learning(BaseModel):
    """curve.json of a sweep."""

    measure: str = ""
    metric: str = ""
    curves: list[LearningCurve] = []
