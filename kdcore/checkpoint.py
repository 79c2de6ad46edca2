"""The progress of a job: reported during training, and saved in checkpoints, from which it continues bit for bit."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from base.errors import Internal, StorageFull
from base.files import Written, write_whole
from base.warning import WarningItem
from kdcore.catalog.facts import DATASET_READING
from kdcore.device import Computing
from kdcore.measure import batch_norm, curves, findings
from kdcore.measure.cost import CostMeter
from kdcore.measure.curves import Curves
from kdcore.measure.grading import Outcome
from kdcore.measure.levers import Lever
from kdcore.prepare import PreparedJob, Workspace
from kdcore.protocol import CHECKPOINTS_KEPT, EXIT_STOPPED, Lines
from kdcore.spec import GIVEN, Stage, Trial
from kdcore.spec.fitting import images_held_out
from kdcore.training import StageTraining
from kdcore.weights.starting import Start

log = logging.getLogger("kdcore")

FORMAT = 2
"""The number of a checkpoint's format. Before it was counted, a checkpoint had no number: 1."""


class Stopped(SystemExit):
    """The engine was stopped on request, and a checkpoint is saved; the process ends with `EXIT_STOPPED`."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


def stop_on_sigterm(workspace: Workspace) -> None:
    """Make SIGTERM stop the training: `Watch.after_step` then saves a checkpoint and raises Stopped."""
    signal.signal(signal.SIGTERM, lambda *_: setattr(workspace, "stop_requested", True))


@dataclass
class Progress:
    """The state of a job: outcomes of trials that have ended, by trial and model; what the ended stages of the current
    trial have learned, by stage; the state of the stage in training; and what the job has cost so far."""

    finished: dict[str, dict[str, Outcome]] = field(default_factory=dict)
    prepared: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None
    batch_norm: str = "measured"
    """`training.batch_norm` of the job that began: one job keeps to one kind of statistics."""
    reading: int = DATASET_READING
    """The rules by which the job that began read its data: before the second, no validation split was used."""
    has_sizes: bool = True
    """False if the job was begun by a version in which all networks got images of the data's size, cut from these."""
    computing: Computing | None = None
    """How the job computes; None if the version that began it did not record it."""
    warnings: Sequence[WarningItem] = ()
    """The warnings of the job up to here."""
    format: int = FORMAT
    """The format of the file from which this was read."""
    cost: CostMeter = field(default_factory=CostMeter, compare=False)
    starts: dict[str, Start] = field(default_factory=dict)
    """What students start from, by pointer. Weights that a trial may still begin with are kept here, so that the job
    does not need their file again."""
    curves: Curves = field(default_factory=Curves, compare=False)
    """Those of an earlier version begin where the job was resumed."""
    used: dict[str, dict[str, Lever]] = field(default_factory=dict)
    """The levers of each stage that has begun (`measure/levers.py`); those of an earlier version have none."""


def save(folder: Path, step: int, progress: Progress) -> Written:
    """Write `<folder>/<step>.pt` whole and durable, and delete all but the last `CHECKPOINTS_KEPT`."""
    finished = {
        trial: {model: vars(outcome) for model, outcome in outcomes.items()}
        for trial, outcomes in progress.finished.items()
    }
    state = {
        "format": FORMAT,
        "finished": finished,
        "prepared": progress.prepared,
        "training": progress.training,
        "batch_norm": progress.batch_norm,
        "reading": progress.reading,
        "has_sizes": progress.has_sizes,
        "computing": None if progress.computing is None else progress.computing.as_json(),
        "warnings": [warning.as_dict() for warning in progress.warnings],
        "cost": progress.cost.state(),
        "starts": {pointer: start.as_saved() for pointer, start in progress.starts.items()},
        "curves": progress.curves.state(),
        "used": progress.used,
    }

    def write(path: Path) -> None:
        # torch's own writer, which needs a path, hides the error of a full disk.
        with path.open("wb") as file:
            torch.save(state, file)

    written = write_whole(folder / f"{step:09d}.pt", write)
    for old in sorted(folder.glob("*.pt"))[:-CHECKPOINTS_KEPT]:
        old.unlink()
    return written


def load(path: Path, device: torch.device) -> Progress:
    """Read a checkpoint. Tensors of models come to `device`; random states stay on the CPU.

    Before format 2, every job used the running averages of its batch norms.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        finished = {
            trial: {model: Outcome(**saved) for model, saved in outcomes.items()}
            for trial, outcomes in state["finished"].items()
        }
        number = state.get("format", 1)
        if number > FORMAT:
            raise ValueError(f"format {number} is of a newer version")
        computing = state.get("computing")
        return Progress(
            finished,
            dict(state["prepared"]),
            state["training"],
            state.get("batch_norm", "running"),
            state.get("reading", 1),
            state.get("has_sizes", False),
            None if computing is None else Computing(**computing),
            [WarningItem(**warning) for warning in state.get("warnings", ())],
            number,
            # Before format 2 no cost was kept: only the seconds from here on are counted.
            CostMeter(state.get("cost")),
            # Absent in a checkpoint of an earlier version, in which all students started from random weights.
            {pointer: Start.of_saved(saved) for pointer, saved in state.get("starts", {}).items()},
            Curves(state.get("curves", curves.NOT_KEPT)),
            state.get("used", {}),
        )
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Internal(f"the checkpoint {path.name} cannot be read: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Work:
    """The work of a stage, in images that one network is run on; a step of a learning network counts as three, because
    its backward pass costs about twice its forward pass. All networks count alike."""

    step: int
    epoch_end: int
    stage_end: int

    @classmethod
    def of(cls, trial: Trial, stage: Stage, job: PreparedJob) -> Work:
        recipe = job.spec.training
        learners, models, teachers = len(trial.students) * trial.scheme.branches, _models(trial), 0
        if trial.methods and trial.taught_by is not None:
            teachers = len(job.spec.teachers) if trial.taught_by == GIVEN else 1
        first = stage.method.first_stage if stage.method is not None else None
        if first is not None and not first.trains_student:
            learners = models = 0
        held_out = images_held_out(job.data.facts, recipe)
        measured = 0
        if recipe.batch_norm != "running":
            rows = recipe.batch_size * (stage.steps // stage.epochs)
            measured = recipe.batch_size * batch_norm.batches_in(rows, recipe.batch_size)
        return cls(
            step=recipe.batch_size * (3 * learners + teachers),
            epoch_end=models * (held_out + measured),
            stage_end=models * 2 * held_out if stage is trial.stages[-1] else 0,
        )

    def of_stage(self, stage: Stage) -> int:
        return stage.steps * self.step + stage.epochs * self.epoch_end + self.stage_end


def _models(trial: Trial) -> int:
    """Return the networks that are run to evaluate a trial once: a branch or an exit counts as one."""
    scheme = trial.scheme
    if scheme.kind == "ensemble":
        return 1 + scheme.branches
    return len(trial.students) + len(scheme.exits or ())


class Meter:
    """The share of a job that is done, every evaluation included, and the time that the rest will take."""

    def __init__(self, job: PreparedJob, lines: Lines) -> None:
        self.lines, self.load = lines, job.load
        plan = [(trial, stage) for trial in job.trials for stage in trial.stages]
        self.last = plan[-1][1]
        self.work = {stage.name: Work.of(trial, stage, job) for trial, stage in plan}
        self.before: dict[str, int] = {}
        self.steps_before: dict[str, int] = {}
        self.training = self.steps = 0
        for _, stage in plan:
            self.before[stage.name], self.steps_before[stage.name] = self.training, self.steps
            self.training += self.work[stage.name].of_stage(stage)
            self.steps += stage.steps
        # Each model is measured on the test images at its best and at its last epoch.
        models = 2 * sum(_models(trial) for trial in job.trials) + len(job.spec.teachers) + (job.baseline is not None)
        # Teacher, student and student alone are also measured on held-out images.
        shown = len(job.spec.teachers) + 1 + (job.spec.baseline != "none")
        on_held_out = shown * findings.images_measured(job.data.facts, job.spec.training)
        self.total = self.training + models * len(job.data.test) + on_held_out
        self.measured = 0
        self.began: tuple[float, int] | None = None

    def measuring(self, images: int) -> None:
        """Count images of the final evaluation."""
        self.measured += images
        if self.lines.progress_is_due():
            self.report(self.last, self.last.epochs, self.steps, min(self.training + self.measured, self.total))

    def end(self) -> None:
        """Report that the job is done, its files written."""
        self.report(self.last, self.last.epochs, self.steps, self.total + 1)

    def report(self, stage: Stage, epoch: int, step: int, done: int) -> None:
        """Write a progress line. Writing the files counts as one: before that no job is done to 100 %, not even where
        the percent is shown as a whole number."""
        now, total = time.monotonic(), self.total + 1
        began_at, began_with = self.began = self.began or (now, done)
        per_unit_s = (now - began_at) / (done - began_with) if done > began_with else None
        self.lines.progress(
            trial=stage.name,
            epoch=epoch,
            epochs=stage.epochs,
            step=step,
            total_steps=self.steps,
            percent=100.0 if done == total else min(99.49, math.floor(10_000 * done / total) / 100),
            seconds_remaining=None if per_unit_s is None else round(per_unit_s * (total - done), 1),
        )


class Watch:
    """Reports a stage's progress, saves checkpoints, and stops the training on request."""

    def __init__(self, stage: Stage, meter: Meter, workspace: Workspace, progress: Progress) -> None:
        self.stage, self.meter, self.workspace, self.progress = stage, meter, workspace, progress
        self.work, self.steps_before = meter.work[stage.name], meter.steps_before[stage.name]
        self.evaluated_images = 0
        self.saved_at = time.monotonic()
        self.disk_full = False

    def metric(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self.workspace.lines.metric(self.stage.name, step, epoch, values)
        self.progress.curves.add(self.stage.name, step, values)
        figures = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.info("%s, epoch %d, step %d: %s", self.stage.name, epoch, step, figures)

    def after_step(self, training: StageTraining) -> None:
        self.evaluated_images = 0
        if (threads := self.meter.load.after_step()) is not None:
            self._warn_of_threads(threads)
        due = time.monotonic() - self.saved_at >= training.recipe.checkpoint_every_s
        if self.workspace.stop_requested:
            self._save(training, training.state())
            raise Stopped
        if due and not training.ended:  # `run` saves the end of a stage, as its result.
            self.save_or_warn(training, training.state())
        if training.ended or self.workspace.lines.progress_is_due():
            self._report(training)

    def _warn_of_threads(self, threads: int) -> None:
        """Say that other processes took cores, or gave them back. One warning is enough for a job."""
        log.info("%d threads from here on, because of other processes on this machine", threads)
        text = "other processes took cores during the training, which went on with fewer threads: sums are rounded "
        hint = "set training.threads, or DISTILLERY_THREADS, for a number that the load does not change"
        warning = WarningItem("bits_not_repeatable", "/training/threads", f"{text}differently", hint)
        self.workspace.warn(warning)

    def evaluated(self, training: StageTraining, images: int) -> None:
        """Count images of an evaluation between two steps."""
        self.evaluated_images += images
        if self.workspace.lines.progress_is_due():
            self._report(training)

    def save_or_warn(self, training: StageTraining, state: Mapping[str, Any] | None) -> None:
        """Save a checkpoint. If the disk is full, warn once until a save succeeds again; the training continues."""
        try:
            self._save(training, state)
            self.disk_full = False
        except StorageFull as error:
            self.saved_at = time.monotonic()
            if not self.disk_full:
                text = f"{error.message}; the training continues without this checkpoint"
                hint = "free some disk space: the next checkpoint is tried as usual"
                self.workspace.warn(WarningItem("checkpoint_not_saved", "", text, hint))
            self.disk_full = True

    def _save(self, training: StageTraining, state: Mapping[str, Any] | None) -> None:
        """Write a checkpoint under the job's own count of steps: the highest number is always the furthest."""
        self.progress.training, self.progress.warnings = state, tuple(self.workspace.warnings)
        step = self.steps_before + training.global_step
        written = save(self.workspace.out / "checkpoints", step, self.progress)
        self.workspace.announce("checkpoint", written, step=step)
        self.saved_at = time.monotonic()

    def _report(self, training: StageTraining) -> None:
        work, position = self.work, training.position
        done = self.meter.before[self.stage.name] + training.global_step * work.step + position.epoch * work.epoch_end
        # What an evaluation needs may differ from the estimate; the next step corrects it.
        done += min(self.evaluated_images, work.stage_end if training.ended else work.epoch_end)
        epoch = min(position.epoch + 1, training.epochs)
        self.meter.report(self.stage, epoch, self.steps_before + training.global_step, done)
