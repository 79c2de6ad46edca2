"""One job from spec to proof: build the parts, train what has to be trained, measure, export.

Read from `run` downwards; what is trained, and in which order, is `spec/plan.py`; one step is `Training._step`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from base.errors import StorageFull
from base.files import Written, write_text
from kdcore import checkpoint, export, proof
from kdcore.parts import Parts, Place, build
from kdcore.proof import Finished
from kdcore.spec import GIVEN, JobSpec, Trial, legs, trials
from kdcore.teacher import FrozenTeacher, Teacher
from kdcore.training import Observer, Outcome, Training
from kdcore.trial import Course

WEIGHTS = "application/octet-stream"

log = logging.getLogger("kdcore")


class Stopped(Exception):
    """Somebody asked the engine to stop; the state is safe in a checkpoint."""


@dataclass
class Progress:
    """All that a checkpoint holds: trials that have ended, by model; first stages of the trial at hand that have
    ended; and the state of the training that has not."""

    finished: dict[str, dict[str, Outcome]] = field(default_factory=dict)
    prepared: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None

    def as_state(self) -> dict[str, Any]:
        finished = {
            trial: {model: vars(outcome) for model, outcome in outcomes.items()}
            for trial, outcomes in self.finished.items()
        }
        return {"finished": finished, "prepared": self.prepared, "training": self.training}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        finished = {
            trial: {model: Outcome(**saved) for model, saved in outcomes.items()}
            for trial, outcomes in state["finished"].items()
        }
        return cls(finished, dict(state["prepared"]), state["training"])


def run(spec: JobSpec, place: Place, resume: Path | None = None) -> dict[str, Any]:
    """The whole job; returns the report, which also stands in `report.json` beside `student.safetensors`.

    Raises an EngineError that says what is wrong, or Stopped once a checkpoint is safe.
    """
    started = time.monotonic()
    parts = build(spec, place)
    progress = _resumed(resume, parts)

    place.lines.phase("training")
    for trial in trials(parts.spec):
        if trial.name not in progress.finished:
            _train(trial, parts, place, progress)

    place.lines.phase("evaluating")
    summary = proof.measure(parts, progress.finished)
    summary["seconds"] = round(time.monotonic() - started, 3)

    place.lines.phase("exporting")
    _export(parts, place, progress.finished, summary)
    return summary


def _train(trial: Trial, parts: Parts, place: Place, progress: Progress) -> None:
    """A trial from its fresh start: what its methods teach first, one after the other, then the training proper."""
    course = Course(trial, parts, _teacher(trial, parts, progress))
    for number, (name, _) in enumerate(course.stages):
        watch = _Watch(name, parts, place, progress)
        training = course.training(number, Observer(metric=watch.metric, after_step=watch.after_step))
        if name in progress.prepared:
            training.adopt(progress.prepared[name])
            continue
        if progress.training is not None:
            training.restore(progress.training)
        outcomes = training.run()
        if name == trial.name:
            progress.finished[name], progress.prepared = outcomes, {}
        else:
            progress.prepared[name] = training.learned()
        watch.save_if_there_is_room(training, None)


def _teacher(trial: Trial, parts: Parts, progress: Progress) -> Teacher | None:
    """The teacher that the spec names, or the best of an earlier trial, frozen."""
    if trial.taught_by is None or trial.taught_by == GIVEN:
        return parts.teacher if trial.taught_by == GIVEN else None
    earlier = next(one for one in trials(parts.spec) if one.name == trial.taught_by)
    student = parts.fresh(earlier.students[0])
    student.network.load_state_dict(progress.finished[earlier.name]["student"].best)
    return FrozenTeacher(student)


class _Watch:
    """Reports a trial's progress, keeps it resumable, and stops it when asked."""

    def __init__(self, name: str, parts: Parts, place: Place, progress: Progress) -> None:
        self.name, self.place, self.progress = name, place, progress
        plan = legs(parts.spec, parts.data.facts, parts.known.unlabelled)
        before = [leg.name for leg in plan].index(name)
        self.steps_before = sum(leg.steps for leg in plan[:before])
        self.steps_in_all = sum(leg.steps for leg in plan)
        self.saved_at = time.monotonic()
        self.short_of_room = False
        self.began: tuple[float, int] | None = None

    def metric(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self.place.lines.metric(self.name, step, epoch, values)
        told = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.info("%s, epoch %d, step %d: %s", self.name, epoch, step, told)

    def after_step(self, training: Training) -> None:
        due = time.monotonic() - self.saved_at >= training.recipe.checkpoint_every_s
        # The end of a trial is saved by whoever ran it, as a result.
        if self.place.stop_asked:
            self._save(training, training.state())
            raise Stopped
        if due and not training.ended:
            self.save_if_there_is_room(training, training.state())
        if training.ended or self.place.lines.progress_is_due():
            self._report(training)

    def save_if_there_is_room(self, training: Training, state: Mapping[str, Any] | None) -> None:
        """On a full disk the training goes on, from the last good checkpoint if need be; told once a shortage."""
        try:
            self._save(training, state)
            self.short_of_room = False
        except StorageFull as error:
            self.saved_at = time.monotonic()
            if not self.short_of_room:
                self.place.lines.warning(error.code, f"{error.message}; the training goes on without this checkpoint")
            self.short_of_room = True

    def _save(self, training: Training, state: Mapping[str, Any] | None) -> None:
        """Write a checkpoint under the job's own count of steps: the highest number is always the furthest."""
        self.progress.training = state
        step = self.steps_before + training.global_step
        written = checkpoint.save(self.place.out / "checkpoints", step, self.progress.as_state())
        _announce(self.place, "checkpoint", written, step=step)
        self.saved_at = time.monotonic()

    def _report(self, training: Training) -> None:
        epochs, now = training.stage.epochs, time.monotonic()
        done, total = self.steps_before + training.global_step, self.steps_in_all
        began_at, began_step = self.began = self.began or (now, done)
        per_step_s = (now - began_at) / (done - began_step) if done > began_step else None
        self.place.lines.progress(
            trial=self.name,
            epoch=min(training.position.epoch + 1, epochs),
            epochs=epochs,
            step=done,
            total_steps=total,
            percent=round(100 * done / total, 2),
            seconds_remaining=None if per_step_s is None else round(per_step_s * (total - done), 1),
        )


def _resumed(resume: Path | None, parts: Parts) -> Progress:
    if resume is None:
        return Progress()
    log.info("going on from %s", resume.name)
    return Progress.from_state(checkpoint.load(resume, parts.device))


def _export(parts: Parts, place: Place, finished: Finished, summary: Mapping[str, Any]) -> None:
    """The student; its peers where several learned from each other; the report and the resolved spec."""
    answer, students = proof.answer(parts, finished), parts.spec.students
    path = place.out / "student.safetensors"
    exported = export.student(path, answer.weights, students[0], parts, summary["student"], answer.members)
    _announce(place, "artifact", exported, name=path.name, media_type=WEIGHTS)
    for number, peer in enumerate(students[1:], 2):
        path = place.out / f"student-{number}.safetensors"
        best = finished["student"][path.stem].best
        exported = export.student(path, best, peer, parts, summary["models"][path.stem])
        _announce(place, "artifact", exported, name=path.name, media_type=WEIGHTS)
    for name, content in (("report.json", summary), ("spec.json", parts.spec.as_json())):
        written = write_text(place.out / name, json.dumps(content, indent=2) + "\n")
        _announce(place, "artifact", written, name=name, media_type="application/json")


def _announce(place: Place, event: str, written: Written, **fields: Any) -> None:
    relative = str(written.path.relative_to(place.out))
    place.lines.emit(event, path=relative, bytes=written.bytes, sha256=written.sha256, **fields)
