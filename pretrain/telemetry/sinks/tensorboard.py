"""Write TensorBoard's event files with the package `tensorboard` and without a thread, so that every record written before a
kill is on disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.runtime.files import own_folder
from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.record import Record, scalars
from pretrain.telemetry.sinks.base import Sink, require
from pretrain.telemetry.sinks.retrying_file import RetryingAppendFile

if TYPE_CHECKING:
    from tensorboard.summary.writer.record_writer import RecordWriter


class TensorBoard(Sink):
    """A sink that writes a new file in ``tensorboard/`` of the run folder at each start. The first event of a file declares
    the step from which on the file replaces the events of earlier files."""

    def __init__(self) -> None:
        self._file: RecordWriter | None = None

    def check(self) -> None:
        """Raise ``UserError`` if the package is missing."""
        require("tensorboard", sink="tensorboard")

    def open(self, run: Path, start: RunStarted) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = own_folder(run / "tensorboard")
        number = len(
            list(folder.glob("*.tfevents.*"))
        )  # files are read in the order of their names; a clock may jump, a counter does not
        self._file = RecordWriter(RetryingAppendFile(folder / f"events.out.tfevents.{number:08d}"))
        self._event(0, time.time(), file_version="brain.Event:2")
        again_from = start.step + 1 if start.step else 0
        self._event(again_from, time.time(), session_log=SessionLog(status=SessionLog.START))

    def write(self, record: Record) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=number) for tag, number in scalars(record).items()]
        if record["event"] == "sample":
            values = [_text(f"sample/{record['domain']}", f"**{record['prompt']}**{record['text']}")]
        if values:
            self._event(record["step"], record["time"], summary=Summary(value=values))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _event(self, step: int, wall_time: float, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        assert self._file is not None
        self._file.write(Event(step=step, wall_time=wall_time, **content).SerializeToString())


def _text(tag: str, text: str) -> Any:
    """Return a value for TensorBoard's text page, which renders Markdown."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.text.metadata import create_summary_metadata

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    content = TensorProto(dtype="DT_STRING", tensor_shape=shape, string_val=[text.encode()])
    return Summary.Value(tag=tag, tensor=content, metadata=create_summary_metadata("", ""))
