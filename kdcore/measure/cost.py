"""What a job costs, measured while it runs: seconds of a step and of an evaluated image, its memory, and the seconds of
all its attempts by what was done in them. The figures are part of checkpoints, so that a resumed job reports its whole
cost.

Nothing here changes a result: the meter reads clocks, and waits for the device once at the end of an epoch's training.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from base.memory import peak_bytes
from kdcore.spec.cost import JobCost, StageCost

if TYPE_CHECKING:
    from kdcore.spec import Stage
    from kdcore.training import StageTraining

ACTIVITIES = (
    "imports", "data", "preparing", "teacher_check", "caching", "training", "held_out", "evaluating", "exporting",
)  # fmt: skip
"""What the seconds of a job are divided into. `imports` is before the job's own seconds, `preparing` is teacher and
networks, `held_out` the evaluations between epochs, `training` the rest of the trials."""
TRAINING = "training/"
WARM_UP_STEPS = 3
"""The first steps of a stage are not counted: they allocate memory and choose kernels."""


class CostMeter:
    """The cost of a job over all of its attempts. `before`: what `state` returned in an earlier attempt."""

    def __init__(self, before: Mapping[str, Any] | None = None) -> None:
        before = before or {}
        self.device = torch.device("cpu")
        self.stages: dict[str, dict[str, float]] = {name: dict(one) for name, one in before.get("stages", {}).items()}
        self.preparing_s: float | None = None
        self._timings: dict[str, float] = dict(before.get("timings", {}))
        self._activity: str | None = None
        self._activity_began = time.monotonic()
        self.test_image_s: float | None = None
        self.exporting_s: float | None = None
        self._seconds_before = float(before.get("seconds", 0.0))
        self._memory_before = int(before.get("memory_bytes", 0))
        self._memory_fixed = 0
        self._began = time.monotonic()

    def prepared(self, device: torch.device, began: float) -> None:
        """Note that data, teacher and networks are ready. `began` (`time.monotonic`): the start of this attempt."""
        self.device, self._began = device, began
        self.preparing_s = time.monotonic() - began
        self._memory_fixed = peak_memory(device)

    @property
    def seconds(self) -> float:
        """Seconds of this attempt and of those before it, up to the checkpoints from which the job was resumed."""
        return self._seconds_before + time.monotonic() - self._began

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Count the seconds of a `with` block for an activity, one of ACTIVITIES or `training/<trial>`. Those of a
        block inside of it count for that one alone."""
        before = self.turn_to(activity)
        try:
            yield
        finally:
            self.turn_to(before)

    def turn_to(self, activity: str | None) -> str | None:
        """Count the seconds from now on for another activity (None: for none). Returns the one until now."""
        before, now = self._activity, time.monotonic()
        if before is not None:
            self.count({before: now - self._activity_began})
        self._activity, self._activity_began = activity, now
        return before

    def count(self, seconds: Mapping[str, float]) -> None:
        """Add seconds that were measured elsewhere, by activity."""
        for activity, more in seconds.items():
            self._timings[activity] = self._timings.get(activity, 0.0) + more

    def move(self, seconds: float, activity: str) -> None:
        """Count seconds of the present activity, measured elsewhere, for another one."""
        if self._activity is not None:
            self.count({self._activity: -seconds})
            self.count({activity: seconds})

    def timings(self) -> dict[str, Any]:
        """Return the seconds up to now, of all attempts, by activity; of `training` by trial."""
        self.turn_to(self._activity)
        trials = {name.removeprefix(TRAINING): one for name, one in self._timings.items() if name.startswith(TRAINING)}
        named = {name: self._timings.get(name, 0.0) for name in ACTIVITIES}
        return {
            name: {trial: round(one, 3) for trial, one in trials.items()} if name == "training" else round(seconds, 3)
            for name, seconds in named.items()
        }

    @property
    def memory_bytes(self) -> int:
        return max(self._memory_before, peak_memory(self.device))

    def stage(self, stage: Stage) -> StageMeter:
        """Return the meter of a stage. Its figures replace those of an earlier attempt when it has some."""
        return StageMeter(self, stage)

    @contextmanager
    def measuring(self, images: int) -> Iterator[None]:
        """Measure a `with` block in which all models are run on the test images."""
        began = time.monotonic()
        yield
        self.test_image_s = (time.monotonic() - began) / images

    @contextmanager
    def exporting(self) -> Iterator[None]:
        """Measure a `with` block in which all files are written: unlike those of `timings`, the seconds of one whole
        pass, not those of attempts that were stopped in it."""
        began = time.monotonic()
        with self.during("exporting"):
            yield
        self.exporting_s = time.monotonic() - began

    def state(self) -> dict[str, Any]:
        """Return what a later attempt needs to continue."""
        self.turn_to(self._activity)
        return {
            "seconds": self.seconds,
            "memory_bytes": self.memory_bytes,
            "stages": self.stages,
            "timings": dict(self._timings),
        }

    def cost(self, bf16: bool) -> JobCost:
        """Return the cost of a job whose models have been measured."""
        assert self.test_image_s is not None, "the job's models have been measured"
        return JobCost(
            basis="measured",
            device="cuda" if self.device.type == "cuda" else "cpu",
            device_name=device_name(self.device),
            threads=torch.get_num_threads(),
            precision="bf16" if bf16 else "fp32",
            preparing_s=self.preparing_s,
            stages={name: StageCost(**figures) for name, figures in self.stages.items()},
            test_image_s=self.test_image_s,
            memory_bytes=self.memory_bytes,
            memory_fixed_bytes=min(self._memory_fixed, self.memory_bytes),
            exporting_s=self.exporting_s,
        )


class StageMeter:
    """Divides the time of a stage into steps and evaluations; what happens between two steps counts as neither. Epochs
    that train for int8 have figures of their own, under the name `<stage>/int8`."""

    def __init__(self, meter: CostMeter, stage: Stage) -> None:
        self._meter, self._stage = meter, stage
        self._first_int8 = stage.epochs - stage.aware_epochs
        self._begin()
        self._evaluation_began = 0.0
        self._activity: str | None = None

    def _begin(self) -> None:
        """Begin with the first step of this kind."""
        self._step_s: list[float] = []
        self._image_s: list[float] = []
        self._cold_step_s = 0.0
        """Of a first epoch that has no steps after the first: it counts until there is a second epoch."""
        self._is_warm = False
        self._steps = 0
        self._began = time.monotonic()

    def before_evaluation(self, training: StageTraining) -> None:
        """Note the end of an epoch's last step."""
        self._wait()
        self._activity = self._meter.turn_to("held_out")
        now = self._evaluation_began = time.monotonic()
        step_s = (now - self._began) / (self._steps + 1)
        if self._is_warm:
            self._step_s.append(step_s)
        else:
            self._cold_step_s = step_s

    def around(self, after_step: Callable[[StageTraining], None]) -> Callable[[StageTraining], None]:
        """Return `after_step` with the time taken before it, and its own time left out."""

        def measured(training: StageTraining) -> None:
            if training.position.step == 0:
                self._epoch_ended(training)
            else:
                self._steps += 1
            entered = time.monotonic()
            try:
                after_step(training)
            finally:
                self._began += time.monotonic() - entered
            if training.position.step == 0 and training.position.epoch == self._first_int8:
                self._begin()
            elif training.position.step == 0 or (not self._is_warm and self._steps == WARM_UP_STEPS):
                self._restart()

        return measured

    def _epoch_ended(self, training: StageTraining) -> None:
        self._meter.turn_to(self._activity)
        seconds = time.monotonic() - self._evaluation_began
        self._image_s.append(seconds / len(training.training_set.held_out))
        is_int8 = training.position.epoch > self._first_int8
        self._meter.stages[self._stage.aware_name if is_int8 else self._stage.name] = {
            "step_s": median(self._step_s or [self._cold_step_s]),
            "held_out_image_s": median(self._image_s),
        }

    def _restart(self) -> None:
        self._wait()
        self._is_warm, self._steps, self._began = True, 0, time.monotonic()

    def _wait(self) -> None:
        """Wait for the device: a GPU works on after the host has given it a step."""
        if self._meter.device.type == "cuda":
            torch.cuda.synchronize(self._meter.device)


def peak_memory(device: torch.device) -> int:
    """Return the largest memory so far in bytes: what was allocated on a GPU, or this process's resident memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
