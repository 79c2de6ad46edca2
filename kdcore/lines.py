"""The engine's lines: one JSON object each, for whoever started it."""

import json
import time
from collections.abc import Mapping
from typing import Any, TextIO

PROGRESS_EVERY_S = 1.0


class Lines:
    """Writes events to a stream and keeps progress to one line a second."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last_progress = float("-inf")

    def emit(self, event: str, **fields: Any) -> None:
        self._stream.write(json.dumps({"event": event, **fields}, allow_nan=False) + "\n")
        self._stream.flush()

    def phase(self, phase: str) -> None:
        self.emit("phase", phase=phase)

    def progress_is_due(self) -> bool:
        return time.monotonic() - self._last_progress >= PROGRESS_EVERY_S

    def progress(self, **fields: Any) -> None:
        self._last_progress = time.monotonic()
        self.emit("progress", **fields)

    def metric(self, trial: str, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self.emit("metric", trial=trial, step=step, epoch=epoch, values=dict(values))

    def warning(self, code: str, message: str) -> None:
        self.emit("warning", code=code, message=message)
