"""The progress of a job: reported during training, and saved in checkpoints, from which it continues bit for bit."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from base.errors import Internal, StorageFull
from base.files import Written, write_whole
from base.warning import WarningItem
from kdcore.cost import Meter
from kdcore.prepare import PreparedJob, Workspace
from kdcore.protocol import CHECKPOINTS_KEPT, EXIT_STOPPED
from kdcore.spec import Stage
from kdcore.training import Outcome, StageTraining

log = logging.getLogger("kdcore")


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
    meter: Meter = field(default_factory=Meter, compare=False)


def save(folder: Path, step: int, progress: Progress) -> Written:
    """Write `<folder>/<step>.pt` whole and durable, and delete all but the last `CHECKPOINTS_KEPT`."""
    finished = {
        trial: {model: vars(outcome) for model, outcome in outcomes.items()}
        for trial, outcomes in progress.finished.items()
    }
    state = {
        "finished": finished,
        "prepared": progress.prepared,
        "training": progress.training,
        "cost": progress.meter.state(),
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
    """Read a checkpoint. Tensors of models come to `device`; random states stay on the CPU."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        finished = {
            trial: {model: Outcome(**saved) for model, saved in outcomes.items()}
            for trial, outcomes in state["finished"].items()
        }
        # A checkpoint of an earlier version has no cost: only the seconds from here on are counted.
        return Progress(finished, dict(state["prepared"]), state["training"], Meter(state.get("cost")))
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise Internal(f"the checkpoint {path.name} cannot be read: {type(error).__name__}: {error}") from error


class Watch:
    """Reports a stage's progress, saves checkpoints, and stops the training on request."""

    def __init__(self, stage: Stage, job: PreparedJob, workspace: Workspace, progress: Progress) -> None:
        self.name, self.workspace, self.progress = stage.name, workspace, progress
        plan = [one for trial in job.trials for one in trial.stages]
        self.steps_before = sum(one.steps for one in plan[: plan.index(stage)])
        self.steps_in_all = sum(one.steps for one in plan)
        self.saved_at = time.monotonic()
        self.disk_full = False
        self.began: tuple[float, int] | None = None

    def metric(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self.workspace.lines.metric(self.name, step, epoch, values)
        figures = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.info("%s, epoch %d, step %d: %s", self.name, epoch, step, figures)

    def after_step(self, training: StageTraining) -> None:
        due = time.monotonic() - self.saved_at >= training.recipe.checkpoint_every_s
        if self.workspace.stop_requested:
            self._save(training, training.state())
            raise Stopped
        if due and not training.ended:  # `run` saves the end of a stage, as its result.
            self.save_or_warn(training, training.state())
        if training.ended or self.workspace.lines.progress_is_due():
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
        self.progress.training = state
        step = self.steps_before + training.global_step
        written = save(self.workspace.out / "checkpoints", step, self.progress)
        self.workspace.announce("checkpoint", written, step=step)
        self.saved_at = time.monotonic()

    def _report(self, training: StageTraining) -> None:
        now = time.monotonic()
        done, total = self.steps_before + training.global_step, self.steps_in_all
        began_at, began_step = self.began = self.began or (now, done)
        per_step_s = (now - began_at) / (done - began_step) if done > began_step else None
        self.workspace.lines.progress(
            trial=self.name,
            epoch=min(training.position.epoch + 1, training.epochs),
            epochs=training.epochs,
            step=done,
            total_steps=total,
            percent=round(100 * done / total, 2),
            seconds_remaining=None if per_step_s is None else round(per_step_s * (total - done), 1),
        )
