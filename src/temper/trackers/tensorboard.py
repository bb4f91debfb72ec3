"""TensorBoard: event files below the run folder, written by TensorBoard's own writer. No torch is needed for that, and a
process that follows a run stays small."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from temper.trackers.base import Outcome, Point, Start, Tracker, Wait, trackers

SHOWN = 20  # rows of a table


@trackers.register("tensorboard")
def tensorboard(start: Start, *, wait: Wait = 60.0) -> Tracker:
    """TensorBoard: files in RUN/trackers/tensorboard; look at them with `tensorboard --logdir runs`.

    Args:
        wait: seconds that the end of a run waits for it.
    """
    return TensorBoard(start)


class TensorBoard(Tracker):
    """One folder of event files a run. It has no artefacts: texts are shown, other files stay where they are."""

    def __init__(self, start: Start) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        root = start.folder / "tensorboard"
        self.run = start.run or str(1 + max((int(p.name) for p in root.glob("*") if p.name.isdecimal()), default=0))
        self.url = f"tensorboard --logdir {root}"
        self.writer = EventFileWriter(str(root / self.run))

    def _add(self, summary: Any, step: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[attr-defined]

        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def settings(self, values: Mapping[str, Any]) -> None:
        from tensorboard.plugins.hparams import metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo  # type: ignore[attr-defined]

        info = SessionStartInfo(group_name=self.run, start_time_secs=time.time())
        for name, value in values.items():
            if isinstance(value, bool):
                info.hparams[name].bool_value = value
            elif isinstance(value, int | float):
                info.hparams[name].number_value = value
            else:
                info.hparams[name].string_value = str(value)
        about = metadata.create_summary_metadata(HParamsPluginData(session_start_info=info))
        self._add(_summary(metadata.SESSION_START_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR))

    def about(self, values: Mapping[str, str]) -> None:
        self._text("about", _rows([{"what": k, "found": v} for k, v in values.items()]))

    def points(self, points: Sequence[Point]) -> None:
        for name, step, value in points:
            self._add(_summary(name, simple_value=value), step)

    def scores(self, values: Mapping[str, float]) -> None:
        self.points([Point(name, 0, value) for name, value in values.items()])

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self._text(name, _rows(rows[:SHOWN]))

    def file(self, path: Path, name: str) -> None:
        if path.suffix in {".md", ".yaml"}:
            text = path.read_text(encoding="utf-8")
            self._text(name, text if path.suffix == ".md" else f"```yaml\n{text}\n```")

    def model(self, folder: Path, name: str) -> None:
        """It lies in the run folder, where TensorBoard's files lie too."""

    def _text(self, tag: str, markdown: str) -> None:
        from tensorboard.compat.proto.tensor_pb2 import TensorProto  # type: ignore[attr-defined]
        from tensorboard.plugins.text.metadata import create_summary_metadata

        about = create_summary_metadata(display_name=None, description=None)
        self._add(_summary(tag, metadata=about, tensor=TensorProto(dtype="DT_STRING", string_val=[markdown.encode()])))

    def arrived(self) -> bool:
        self.writer.flush()
        return True

    def end(self, outcome: Outcome) -> None:
        self.writer.close()


def _summary(tag: str, **value: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

    return Summary(value=[Summary.Value(tag=tag, **value)])


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table in Markdown.

    >>> _rows([{"a": "x|y", "b": 1}])
    '| a | b |\\n|---|---|\\n| x\\\\|y | 1 |'
    """
    heads = list(dict.fromkeys(key for row in rows for key in row))

    def line(cells: Sequence[Any]) -> str:
        shown = (" ".join(str(c).split()).replace("|", "\\|") for c in cells)
        return f"| {' | '.join(shown)} |"

    return "\n".join([line(heads), "|---" * len(heads) + "|", *(line([r.get(h, "") for h in heads]) for r in rows)])
