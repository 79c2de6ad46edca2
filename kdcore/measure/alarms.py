"""Alarms while a job trains: warnings about a training that cannot come to anything, as early as that is known.

    warn_if_saturated   before the first step: do the teacher's soft targets say more than the labels?
    Alarms              at each metric point of a stage: the distillation loss, the student's accuracy

They read figures that are measured anyway, so the device is never waited for, and nothing is drawn: with or without
alarms a training has the same bits. Their state is part of the checkpoint, so a resumed stage gives the same alarms.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from base.warning import WarningItem
from kdcore.lesson import Teacher
from kdcore.measure import chance, evaluate, teacher_check
from kdcore.measure.kept import Kept, part_of

if TYPE_CHECKING:
    from kdcore.prepare import PreparedJob, Workspace

log = logging.getLogger("kdcore")

POINTS = 3
"""The points from a stage's start after which a loss that never moved is called zero or constant."""
STEPS = 50
"""The smallest number of steps before an alarm: a network of fewer has not begun to learn."""
UNMOVED = 1e-5
"""The largest relative change of a constant loss: means of equal float32 numbers differ by their rounding."""
SATURATED = 0.01
"""The largest mean entropy of soft targets at temperature 1, as a part of ln K, that is called saturated."""
NEARLY = 0.03
"""The same for a job whose own temperature does not raise it above this. (A ResNet-56 that is right on 99.8 % of its
CIFAR-100 training images has 0.015 at temperature 1.)"""
SOFT = 0.1
"""The mean entropy, as a part of ln K, at which soft targets clearly say more than labels."""
IMAGES = 256
"""Training images on which the teacher's entropy is measured."""


def _nothing(warning: WarningItem) -> None:
    del warning


class Alarms:
    """The alarms of one stage. `see` gets every metric point.

    `level`: the accuracy of guessing. `objective`: the distillation loss is minimised, and may not be constant.
    """

    def __init__(
        self,
        warn: Callable[[WarningItem], None] = _nothing,
        *,
        trial: str = "student",
        level: float = 0.0,
        held_out: int = 0,
        objective: bool = False,
    ) -> None:
        self.warn, self.trial, self.level, self.held_out = warn, trial, level, held_out
        self.objective = objective
        self.state: dict[str, Any] = {
            "points": 0,
            "lowest": math.inf,
            "highest": -math.inf,
            "decided": False,
            "compared": False,
        }
        """Plain numbers, which a checkpoint keeps."""

    def see(self, step: int, steps: int, values: Mapping[str, float], images: int) -> None:
        """Look at a metric point after `step` of the stage's `steps`. `images`: of its training figures."""
        if self.objective and not self.state["decided"] and "train/distillation_loss" in values:
            self._see_loss(step, values["train/distillation_loss"])
        validation = values.get("validation/accuracy")
        if validation is not None and not self.state["compared"] and step >= max(STEPS, steps / 10):
            self.state["compared"] = True
            self._see_accuracy(step, values.get("train/accuracy", validation), validation, images)

    def _see_loss(self, step: int, loss: float) -> None:
        state = self.state
        state["points"] += 1
        state["lowest"], state["highest"] = min(state["lowest"], loss), max(state["highest"], loss)
        if state["points"] < POINTS or step < STEPS:
            return
        state["decided"] = True  # Once: towards the end of a schedule, a loss may well stay as it is.
        low, high = state["lowest"], state["highest"]
        if low == high == 0:
            code, text = "distillation_loss_zero", "is 0"
        elif high - low <= UNMOVED * max(abs(low), abs(high)):
            code, text = "distillation_loss_constant", f"is constantly {high:.6g}"
        else:
            return
        self.warn(
            WarningItem(
                code,
                "/method",
                f"the distillation loss of {self.trial} {text} since its first step: the teacher teaches nothing",
                "compare other places of the two networks, or another method; a tap behind dead units gives no signal",
            )
        )

    def _see_accuracy(self, step: int, training: float, validation: float, images: int) -> None:
        if not chance.is_at_chance(training, max(1, images), self.level):
            return
        low, _ = chance.wilson(validation, max(1, self.held_out))
        if low > self.level:
            return
        self.warn(
            WarningItem(
                "student_at_chance",
                "/training",
                f"after {step} steps {self.trial} is right on {100 * training:.1f} % of its training images and "
                f"{100 * validation:.1f} % of the held-out ones; guessing gives {100 * self.level:.1f} %",
                "cancel the job if this does not change; try a smaller training.optimizer.lr, or a warm-up",
            )
        )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state` of an earlier process."""
        self.state = dict(state)


def warn_if_saturated(job: PreparedJob, workspace: Workspace, keep: Kept) -> None:
    """Warn if the teacher's soft targets at temperature 1 say no more than the labels, on images it is trained on.

    Only where a method softens its logits. Figures at the job's own temperature are given beside it.
    """
    spec, teacher = job.spec, job.teacher
    if (
        teacher is None
        or not job.teacher_answers
        or not any(method.own_temperature is not None for method in spec.methods)
    ):
        return
    # Spread over the split: archives are often sorted by class.
    count = min(IMAGES, len(job.data.train))
    if job.stored is None:
        count = min(count, teacher_check.affordable(job.data.facts.image_size, teacher.members))
    rows = torch.linspace(0, len(job.data.train) - 1, count).long()
    if job.stored is not None:
        logits_knK = [job.stored.of_rows(rows)]
    else:
        images = job.data.train.take(rows)
        names = [each.architecture or "program" for each in spec.teachers]
        part = part_of("train", len(job.data.train), rows)
        logits_knK = [
            keep.logits(name, member, images, partial(evaluate.logits_on, member, images), part)
            for name, member in zip(names, teacher.members, strict=True)
        ]
    classes = job.data.facts.num_classes
    whole = math.log(classes)
    entropy = mean_entropy(teacher, logits_knK, 1.0)
    log.info("the teacher's mean entropy on %d training images: %.4f of %.3f nats", count, entropy, whole)
    own = spec.temperature or 1.0
    softened = mean_entropy(teacher, logits_knK, own)
    if entropy > SATURATED * whole and max(entropy, softened) > NEARLY * whole:
        return
    text = (
        f"the teacher is saturated on its training images: at temperature 1 its soft targets have a mean entropy of "
        f"{entropy:.4f} of {whole:.2f} nats and say no more than labels; at the job's temperature {own:g} it is "
        f"{softened:.4f}"
    )
    if softened > SOFT * whole:
        hint = "the job's temperature makes up for it: keep it"
    else:
        enough = [t for t in (2, 4, 8, 16, 32) if mean_entropy(teacher, logits_knK, t) > SOFT * whole]
        hint = f"raise the temperature to about {enough[0]}" if enough else "raise the temperature"
        hint += ", use stronger augmentation, or a teacher that was trained for a shorter time"
    workspace.warn(WarningItem("teacher_saturated", "/temperature", text, hint))


def mean_entropy(teacher: Teacher, logits_knK: list[Tensor], temperature: float) -> float:
    """Return the mean entropy in nats of the teacher's soft targets: 0 for labels, ln K for none."""
    p_nK = teacher.soft_targets([one.double() for one in logits_knK], temperature)
    return abs(float(torch.special.xlogy(p_nK, p_nK).sum(1).mean()))  # No term is positive; -0.0 is not shown.
