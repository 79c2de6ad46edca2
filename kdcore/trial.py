"""One trial, from its fresh students to its trainings: who teaches whom, and what, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kdcore import device as devices
from kdcore import objectives
from kdcore.classifier import Classifier
from kdcore.lesson import NOTHING, Needs
from kdcore.objectives import Setting
from kdcore.parts import Parts
from kdcore.schemes.alone import Alone
from kdcore.schemes.ensemble import NativeEnsemble
from kdcore.schemes.exits import Exits
from kdcore.schemes.mutual import Mutual
from kdcore.schemes.offline import Offline
from kdcore.schemes.preparation import Preparation
from kdcore.spec import Trial, stages
from kdcore.spec.methods import SchemeOptions
from kdcore.teacher import Teacher
from kdcore.training import Observer, Scheme, Stage, Training


class Course:
    """A trial ready to begin. Building it draws the students' weights: the same ones for the same seed."""

    def __init__(self, trial: Trial, parts: Parts, teacher: Teacher | None) -> None:
        devices.make_exact(trial.seed)
        self.trial, self.parts, self.teacher = trial, parts, teacher
        self.material = parts.material(trial)
        self.students = fresh(trial, parts)
        self.curriculum = objectives.build(trial.methods, self._setting())
        self.stages = stages(parts.spec, trial)

    def training(self, number: int, observer: Observer) -> Training:
        """The training of a stage. Each begins with a state of torch's generator that does not hang on what ran
        before it in this process, so that a trial can be taken up again between two stages."""
        if number > 0:
            torch.manual_seed(self.trial.seed + number)
        return Training(
            scheme=self._scheme(number),
            stage=self._stage(number),
            recipe=self.parts.spec.training.model_copy(update={"seed": self.trial.seed}),
            material=self.material,
            num_classes=self.parts.data.facts.num_classes,
            observer=observer,
        )

    def _setting(self) -> Setting:
        spec = self.parts.spec
        return Setting(
            temperature=spec.temperature,
            num_classes=self.parts.data.facts.num_classes,
            epochs=spec.training.epochs,
            labels=self.material.images.labels,
            rows=self.material.rows,
        )

    def _stage(self, number: int) -> Stage:
        spec, curriculum = self.parts.spec, self.curriculum
        epochs, smoothing = self.stages[number][1], spec.training.label_smoothing
        if number < len(curriculum.first):
            method, objective = curriculum.first[number]
            stage = method.first_stage
            # The method's weight belongs to its first stage where it has no loss in the last one.
            alone = stage is not None and stage.then_labels_alone
            weight = (spec.beta or 0.0) * objectives.weight(method) if alone else 1.0
            return Stage(epochs, alpha=0.0, beta=weight, objective=objective)
        if not self.trial.methods:
            # Alone, labels weigh 1: alpha is a share between two losses, and here is one.
            alpha = spec.alpha if spec.scheme.kind == "alone" else 1.0
            return Stage(epochs, alpha=alpha or 0.0, beta=0.0, objective=None, smoothing=smoothing)
        assert spec.alpha is not None, "resolve() gives every method its alpha"
        return Stage(epochs, spec.alpha, spec.beta or 0.0, curriculum.mainly, smoothing)

    def _scheme(self, number: int) -> Scheme:
        if number < len(self.curriculum.first):
            method, objective = self.curriculum.first[number]
            assert self.teacher is not None, "rules ask for the teacher of every staged method"
            if method.first_stage is not None and not method.first_stage.trains_student:
                return Preparation(self.teacher, objective.needs)
            return Offline(self.students[0], self.teacher, objective.needs, self._answers())
        mainly = self.curriculum.mainly
        needs = mainly.needs if mainly is not None else NOTHING
        return scheme(self.trial, self.parts, self.students, self.teacher, needs, self._answers())

    def _answers(self) -> bool:
        unlabelled = self.parts.spec.unlabelled
        return unlabelled is not None and unlabelled.labels == "teacher"


def fresh(trial: Trial, parts: Parts) -> list[Classifier]:
    """A trial's students as they begin; one for each branch where a student is branched."""
    return [parts.fresh(spec) for spec in trial.students * trial.scheme.branches]


def scheme(
    trial: Trial,
    parts: Parts,
    students: list[Classifier],
    teacher: Teacher | None,
    needs: Needs = NOTHING,
    answers: bool = False,
) -> Scheme:
    """Who teaches whom in a trial."""
    facts = parts.data.facts
    match trial.scheme:
        case SchemeOptions("mutual"):
            return Mutual(students, needs)
        case SchemeOptions("ensemble", rampup_epochs=rampup):
            return NativeEnsemble(students, facts.image_size, rampup)
        case SchemeOptions("exits", exits=exits):
            network = parts.known.network(trial.students[0].architecture)
            assert exits and network and network.embedding, "fit() asks for exits and an embedding"
            return Exits(students[0], exits, network.embedding, facts.num_classes, facts.image_size)
    if teacher is None or not trial.methods:
        return Alone(students[0])
    return Offline(students[0], teacher, needs, answers)


def models(trial: Trial, parts: Parts) -> Mapping[str, Classifier]:
    """The models that come out of a trial, with no weights worth anything: to be given those of its outcome."""
    return scheme(trial, parts, fresh(trial, parts), None).models
