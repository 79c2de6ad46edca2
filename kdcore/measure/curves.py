"""The curves of a job, kept for its documents: a bounded number of points of each, which checkpoints contain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

POINTS = 1000
"""The most points of a curve. Beyond it every second one is left out, evenly over the whole training."""


@dataclass
class Curve:
    """Values by step. Kept are the points whose number is a multiple of `stride`, and the last one."""

    seen: int = 0
    stride: int = 1
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        if self.steps and (self.seen - 1) % self.stride:
            del self.steps[-1], self.values[-1]
        self.steps.append(step)
        self.values.append(value)
        if len(self.steps) > POINTS:
            # The last point's place in the list is even, as POINTS is.
            self.steps, self.values = self.steps[::2], self.values[::2]
            self.stride *= 2
        self.seen += 1


class Curves:
    """The curves of all trials by key (`train/loss`, `validation/accuracy`). `state`: what `state()` returned in an
    earlier attempt."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self.trials: dict[str, dict[str, Curve]] = {}
        self.complete: bool = state is None or state["complete"]
        """False if the job was begun by a version that kept no curves: they begin where it was resumed."""
        for trial, curves in (state or {"trials": {}})["trials"].items():
            self.trials[trial] = {
                key: Curve(one["seen"], one["stride"], one["steps"].tolist(), one["values"].tolist())
                for key, one in curves.items()
            }

    def add(self, trial: str, step: int, values: Mapping[str, float]) -> None:
        """Add a point of each curve that `values` are of. `step`: counted from the start of the trial's stage."""
        curves = self.trials.setdefault(trial, {})
        for key, value in values.items():
            curves.setdefault(key, Curve()).add(step, float(value))

    def of(self, key: str) -> Iterator[tuple[str, Curve]]:
        """Yield the curve of a key in each trial that has it."""
        for trial, curves in self.trials.items():
            if key in curves:
                yield trial, curves[key]

    def state(self) -> dict[str, Any]:
        """Return what a later attempt needs, for a checkpoint."""
        trials = {
            trial: {
                key: {
                    "seen": one.seen,
                    "stride": one.stride,
                    "steps": torch.tensor(one.steps, dtype=torch.int64),
                    "values": torch.tensor(one.values, dtype=torch.float64),
                }
                for key, one in curves.items()
            }
            for trial, curves in self.trials.items()
        }
        return {"complete": self.complete, "trials": trials}


NOT_KEPT: Mapping[str, Any] = {"complete": False, "trials": {}}
"""The state in a checkpoint of a version that kept no curves."""
