"""One job from spec to proof: build the parts, train the student, train it alone, measure, export.

Read from `run` downwards; one step of training is `Training._step` in training.py.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from kdcore import checkpoint, evaluate, export, objectives, report
from kdcore import device as devices
from kdcore.classifier import Classifier
from kdcore.data import Data
from kdcore.files import Written, write_text
from kdcore.parts import Parts, Place, build
from kdcore.schemes.alone import Alone
from kdcore.schemes.offline import Offline
from kdcore.spec import JobSpec
from kdcore.teacher import FrozenTeacher
from kdcore.training import Loss, Observer, Scheme, Trained, Training

log = logging.getLogger("kdcore")


class Stopped(Exception):
    """Somebody asked the engine to stop; the state is safe in a checkpoint."""


@dataclass
class Progress:
    """Trials that have ended, and the state of the one that has not: the whole of what a checkpoint holds."""

    finished: dict[str, Trained] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None


def run(spec: JobSpec, place: Place, resume: Path | None = None) -> dict[str, Any]:
    """The whole job; returns the report, which also stands in `report.json` beside `student.safetensors`.

    Raises an EngineError that says what is wrong, or Stopped once a checkpoint is safe.
    """
    started = time.monotonic()
    parts = build(spec, place)
    progress = _resumed(resume, parts)

    place.lines.phase("training")
    for name in trials(parts.spec):
        if name not in progress.finished:
            _train(name, parts, place, progress)

    place.lines.phase("evaluating")
    summary = _measure(parts, progress.finished)
    summary["seconds"] = round(time.monotonic() - started, 3)

    place.lines.phase("exporting")
    _export(parts, place, progress.finished["student"], summary)
    return summary


def trials(spec: JobSpec) -> Iterator[str]:
    """What a job trains, in order: the student, then (for a baseline) the same student without its teacher."""
    yield "student"
    if spec.baseline == "train":
        yield "alone"


def _train(name: str, parts: Parts, place: Place, progress: Progress) -> None:
    spec = parts.spec
    # Every trial begins from the same seed: the same initial weights, the same order, the same views.
    devices.make_exact(spec.training.seed)
    watch = _Watch(name, parts, place, progress)
    training = Training(
        scheme=_scheme(name, parts.student(), parts.teacher),
        loss=_loss(name, spec),
        recipe=spec.training,
        images=parts.data.train,
        num_classes=parts.data.facts.num_classes,
        observer=Observer(metric=watch.metric, after_step=watch.after_step),
    )
    if progress.training is not None:
        training.restore(progress.training)
    progress.finished[name] = training.run()
    watch.save(training, None)


def _scheme(name: str, student: Classifier, teacher: FrozenTeacher | None) -> Scheme:
    return Offline(student, teacher) if name == "student" and teacher is not None else Alone(student)


def _loss(name: str, spec: JobSpec) -> Loss:
    """The baseline's labels weigh 1: alpha is a share between two losses, and alone there is only one."""
    smoothing = spec.training.label_smoothing
    if name == "alone":
        return Loss(alpha=1.0, beta=0.0, smoothing=smoothing, objective=None)
    assert spec.alpha is not None, "resolve() gives every method its alpha"
    return Loss(spec.alpha, spec.beta or 0.0, smoothing, objectives.build(spec))


class _Watch:
    """Reports a trial's progress, keeps it resumable, and stops it when asked."""

    def __init__(self, trial: str, parts: Parts, place: Place, progress: Progress) -> None:
        self.trial, self.parts, self.place, self.progress = trial, parts, place, progress
        self.trials = list(trials(parts.spec))
        self.saved_at = time.monotonic()
        self.began: tuple[float, int] | None = None

    def metric(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self.place.lines.metric(self.trial, step, epoch, values)
        told = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.info("%s, epoch %d, step %d: %s", self.trial, epoch, step, told)

    def after_step(self, training: Training) -> None:
        due = time.monotonic() - self.saved_at >= training.recipe.checkpoint_every_s
        # The end of a trial is saved by whoever ran it, as a result.
        if self.place.stop_asked or (due and not training.ended):
            self.save(training, training.state())
        if self.place.stop_asked:
            raise Stopped
        if training.ended or self.place.lines.progress_is_due():
            self._report(training)

    def save(self, training: Training, state: Mapping[str, Any] | None) -> None:
        """Write a checkpoint under the job's own count of steps: the highest number is always the furthest."""
        self.progress.training = state
        finished = {name: vars(trained) for name, trained in self.progress.finished.items()}
        step = self._steps_done(training)
        written = checkpoint.save(self.place.out / "checkpoints", step, {"finished": finished, "training": state})
        _announce(self.place, "checkpoint", written, step=step)
        self.saved_at = time.monotonic()

    def _report(self, training: Training) -> None:
        epochs, now = training.recipe.epochs, time.monotonic()
        done, total = self._steps_done(training), training.total_steps * len(self.trials)
        began_at, began_step = self.began = self.began or (now, done)
        per_step_s = (now - began_at) / (done - began_step) if done > began_step else None
        self.place.lines.progress(
            trial=self.trial,
            epoch=min(training.position.epoch + 1, epochs),
            epochs=epochs,
            step=done,
            total_steps=total,
            percent=round(100 * done / total, 2),
            seconds_remaining=None if per_step_s is None else round(per_step_s * (total - done), 1),
        )

    def _steps_done(self, training: Training) -> int:
        return self.trials.index(self.trial) * training.total_steps + training.global_step


def _resumed(resume: Path | None, parts: Parts) -> Progress:
    if resume is None:
        return Progress()
    log.info("going on from %s", resume.name)
    state = checkpoint.load(resume, parts.device)
    return Progress({name: Trained(**saved) for name, saved in state["finished"].items()}, state["training"])


def _measure(parts: Parts, finished: Mapping[str, Trained]) -> dict[str, Any]:
    """The report: every model once on the test images, which no training has seen."""
    labels, spec = parts.data.test.labels, parts.spec
    rows: dict[str, Any] = {"teacher": None, "student": None, "alone": None}
    teacher_nK = None
    if parts.teacher is not None and spec.teacher is not None:
        teacher_nK = evaluate.logits_on(parts.teacher.classifier, parts.data.test)
        network = parts.teacher.classifier.network
        rows["teacher"] = report.of_model(str(spec.teacher.architecture), network, teacher_nK, labels)
    student = parts.student()
    for name, trained in finished.items():
        best_nK = _logits_with(student, trained.best, parts.data)
        last_is_best = trained.best_epoch == trained.epochs
        last_nK = best_nK if last_is_best else _logits_with(student, trained.last, parts.data)
        row = report.of_model(spec.student.architecture, student.network, best_nK, labels, teacher_nK)
        rows[name] = row | report.of_training(trained, last_nK, labels)
    if parts.baseline is not None:
        alone_nK = evaluate.logits_on(parts.baseline.classifier, parts.data.test)
        network = parts.baseline.classifier.network
        rows["alone"] = report.of_model(spec.student.architecture, network, alone_nK, labels, teacher_nK)
    gain = rows["student"]["accuracy"] - rows["alone"]["accuracy"] if rows["alone"] else None
    return {**rows, "gain": gain, "test_samples": len(labels), "dataset": parts.data.facts.model_dump(mode="json")}


def _logits_with(student: Classifier, these: Mapping[str, Tensor], loaded: Data) -> Tensor:
    student.network.load_state_dict(these)
    return evaluate.logits_on(student, loaded.test)


def _export(parts: Parts, place: Place, trained: Trained, summary: Mapping[str, Any]) -> None:
    path = place.out / "student.safetensors"
    exported = export.student(path, trained.best, parts.spec, parts.data.facts, summary["student"])
    _announce(place, "artifact", exported, name=path.name, media_type="application/octet-stream")
    for name, content in (("report.json", summary), ("spec.json", parts.spec.as_json())):
        written = write_text(place.out / name, json.dumps(content, indent=2) + "\n")
        _announce(place, "artifact", written, name=name, media_type="application/json")


def _announce(place: Place, event: str, written: Written, **fields: Any) -> None:
    relative = str(written.path.relative_to(place.out))
    place.lines.emit(event, path=relative, bytes=written.bytes, sha256=written.sha256, **fields)
