"""What a report says of teacher, student and student alone beyond their accuracy, collected while they are measured.

Shapes: n test images, h held-out images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from base.wire import Calibration, CalibrationView, ClassesView, Fidelity, FidelityView, SimilarClasses
from kdcore.classifier import Classifier
from kdcore.data.images import Images, split
from kdcore.measure import calibration, evaluate, fidelity
from kdcore.measure.kept import Kept, part_of
from kdcore.spec import Training
from kdcore.spec.fitting import images_held_out
from kdcore.spec.plan import GENERATION

if TYPE_CHECKING:
    from kdcore.catalog import DatasetFacts
    from kdcore.prepare import PreparedJob

HELD_OUT = 5000
"""The most held-out images to which a temperature is fitted; it is one number, and needs no more."""
MODELS = ("teacher", "student", "alone")


@dataclass(frozen=True)
class Answers:
    """What is kept of a model's logits."""

    predicted_n: Tensor
    probability_n: Tensor
    """Of the predicted class."""
    calibration: Calibration
    fidelity: Fidelity | None


class Findings:
    """Collects the answers of the models named in MODELS. The teacher is seen first."""

    def __init__(self, job: PreparedJob, keep: Kept, on_images: Callable[[int], None] | None = None) -> None:
        self._job, self._keep, self._on_images = job, keep, on_images
        self._labels_n = job.data.test.labels.cpu()
        self._classes = job.data.facts.num_classes
        self._source, self._rows = _held_out(job)
        self._images: Images | None = None
        self._held_out_hK: dict[str, Tensor | None] = {}
        self._teacher_nK: Tensor | None = None
        self._answers: dict[str, Answers] = {}

    def teacher(self, test_nK: Tensor | None) -> None:
        """See the teacher's logits on test images, of all of its members together; None if there are none."""
        teacher, held_out_hK = self._job.teacher, None
        if teacher is None or test_nK is None:
            return
        if self._job.stored is not None:
            held_out_hK = None if self._job.data.val is not None else self._job.stored.of_rows(self._rows)
        else:
            names = [spec.architecture or "program" for spec in self._job.spec.teachers]
            each = [self._measured(*of) for of in zip(teacher.members, names, strict=True)]
            measured = [one for one in each if one is not None]
            held_out_hK = teacher.combined(measured) if len(measured) == len(each) else None
        self._teacher_nK = test_nK
        self._see("teacher", test_nK, held_out_hK)

    def trained(self, name: str, model: Classifier, test_nK: Tensor, known_as: str | None = None) -> None:
        """See a trained model, and its logits on test images. Of others than student, student alone and generations
        nothing is collected. `known_as`: the architecture, if an earlier job has trained it: then later ones may need
        its logits, too."""
        if name not in MODELS and not name.startswith(GENERATION):
            return
        self._held_out_hK[name] = self._measured(model, known_as)
        if name in MODELS:
            self._see(name, test_nK, self._held_out_hK[name])

    def ensemble(self, test_nK: Tensor) -> None:
        """See all generations together in the place of the student, which is the last one."""
        names = [name for name in self._held_out_hK if name == "student" or name.startswith(GENERATION)]
        measured = [one for name in names if (one := self._held_out_hK[name]) is not None]
        self._see("student", test_nK, evaluate.mean_of(measured))

    def _measured(self, model: Classifier, known_as: str | None = None) -> Tensor | None:
        """Return a model's logits on held-out images: h × K; None if these are not there in its size. Those of a model
        that is known are kept for later jobs."""
        side = model.image_size
        if side is None:
            images = self._images = self._images or self._source.at(None).part(self._rows)
        elif side in self._source.sized:
            part = self._source.at(side).part(self._rows)
            images = Images(part.pixels, part.labels, {side: part.pixels})
        else:
            return None
        if known_as is None:
            return evaluate.logits_on(model, images, self._on_images)
        held_out = part_of("train" if self._job.data.val is None else "val", len(self._source), self._rows)
        measure = partial(evaluate.logits_on, model, images, self._on_images)
        return self._keep.logits(known_as, model, images, measure, held_out)

    def _see(self, name: str, test_nK: Tensor, held_out_hK: Tensor | None) -> None:
        temperature, of_teacher = None, None
        if held_out_hK is not None:
            temperature = calibration.fitted_temperature(held_out_hK, self._source.labels.cpu()[self._rows])
        if name != "teacher" and self._teacher_nK is not None:
            of_teacher = fidelity.fidelity(test_nK, self._teacher_nK, self._labels_n, self._classes)
        self._answers[name] = Answers(
            test_nK.argmax(1),
            calibration.confidences(test_nK),
            calibration.calibration(test_nK, self._labels_n, temperature),
            of_teacher,
        )

    def add_temperatures(self, rows: Mapping[str, dict[str, Any]]) -> None:
        """Give the rows of the models in MODELS the temperatures that were fitted for them."""
        for name, answers in self._answers.items():
            rows[name]["temperature"] = answers.calibration["temperature"]

    def fields(self) -> dict[str, Any]:
        """Return the report's `fidelity`, `calibration`, `confusion` and `classes`."""
        teacher, student, alone = (self._answers.get(name) for name in MODELS)
        assert student is not None, "a job has a student"
        return {
            "fidelity": self._fidelity(teacher, student, alone),
            "calibration": CalibrationView(
                bins=calibration.BINS,
                held_out="training" if self._job.data.val is None else "validation",
                held_out_images=len(self._rows),
                teacher=None if teacher is None else teacher.calibration,
                student=student.calibration,
                alone=None if alone is None else alone.calibration,
            ),
            "confusion": fidelity.confusion(student.predicted_n, self._labels_n, self._classes),
            "classes": self._by_class(teacher, student, alone),
        }

    def _fidelity(self, teacher: Answers | None, student: Answers, alone: Answers | None) -> FidelityView | None:
        if teacher is None or student.fidelity is None:
            return None
        errs = int((teacher.predicted_n != self._labels_n).sum())
        of_alone = None if alone is None else alone.fidelity
        return FidelityView(teacher_errs=errs, student=student.fidelity, alone=of_alone)

    def _by_class(self, teacher: Answers | None, student: Answers, alone: Answers | None) -> ClassesView:
        names, temperature = self._job.data.facts.class_names, None
        similar: list[SimilarClasses] = []
        if self._teacher_nK is not None:
            temperature = self._job.spec.temperature or 1.0
            similar = fidelity.similar_classes(self._teacher_nK, self._labels_n, temperature, self._classes)
        teacher_n = None if teacher is None else teacher.predicted_n
        return ClassesView(
            test_samples=torch.bincount(self._labels_n, minlength=self._classes).tolist(),
            teacher=None if teacher is None else self._accuracies(teacher),
            student=self._accuracies(student),
            alone=None if alone is None else self._accuracies(alone),
            worst=fidelity.worst_classes(student.predicted_n, student.probability_n, teacher_n, self._labels_n, names),
            temperature=temperature,
            similar=similar,
        )

    def _accuracies(self, answers: Answers) -> list[float | None]:
        return fidelity.by_class(answers.predicted_n == self._labels_n, self._labels_n, self._classes)


def images_measured(facts: DatasetFacts, recipe: Training) -> int:
    """Return the number of held-out images on which each of MODELS is run."""
    return min(HELD_OUT, images_held_out(facts, recipe))


def _held_out(job: PreparedJob) -> tuple[Images, Tensor]:
    """Return the split that held-out images are of, and their rows: evenly spaced if there are more than HELD_OUT."""
    if job.data.val is not None:
        source, rows = job.data.val, torch.arange(len(job.data.val))
    else:
        recipe = job.spec.training
        source, (_, rows) = job.data.train, split(job.data.train, recipe.validation_fraction, recipe.seed)
    if len(rows) > HELD_OUT:
        rows = rows[torch.arange(HELD_OUT) * len(rows) // HELD_OUT]
    return source, rows
