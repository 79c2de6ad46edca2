"""The curves of a job as TensorBoard's event files: a run for each trial."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from kdcore.measure.curves import Curve, Curves

NAME = "events.out.tfevents.0.distillery"
"""TensorBoard finds its files by the part `tfevents`; its own names have a time and the host's name."""
VERSION = "brain.Event:2"


class _Kept(io.BytesIO):
    """A buffer whose bytes are still there after the record writer has closed it."""

    content = b""

    def close(self) -> None:
        self.content = self.getvalue()
        super().close()


def of(curves: Curves) -> dict[str, bytes | Path]:
    """Return the event files by their path: `student/events…`, `alone/events…`."""
    return {f"{trial}/{NAME}": _events(of_trial) for trial, of_trial in curves.trials.items()}


def _events(curves: Mapping[str, Curve]) -> bytes:
    """Return the records of a trial. Their times are the steps, so that the same curves are the same bytes."""
    by_step: dict[int, list[tuple[str, float]]] = {}
    for key, curve in curves.items():
        for step, value in zip(curve.steps, curve.values, strict=True):
            by_step.setdefault(step, []).append((key, value))
    buffer = _Kept()
    writer = RecordWriter(buffer)
    writer.write(Event(wall_time=0.0, file_version=VERSION).SerializeToString())
    for step, values in sorted(by_step.items()):
        summary = Summary(value=[Summary.Value(tag=key, simple_value=value) for key, value in values])
        writer.write(Event(wall_time=float(step), step=step, summary=summary).SerializeToString())
    writer.close()
    return buffer.content
