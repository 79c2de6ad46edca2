"""The proof: every model that a job has to do with, measured once on test images that no training has seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcore import evaluate, report
from kdcore.classifier import Classifier
from kdcore.parts import Parts
from kdcore.spec import Trial, trials
from kdcore.teacher import FrozenTeacher, TeacherEnsemble
from kdcore.training import Outcome
from kdcore.trial import models

Finished = Mapping[str, Mapping[str, Outcome]]
"""Outcomes by trial, then by model."""


@dataclass(frozen=True)
class Answer:
    """What a job delivers: weights under the networks' own names, each behind `<number>.` where they are several."""

    weights: Mapping[str, Tensor]
    members: int


def measure(parts: Parts, finished: Finished) -> dict[str, Any]:
    """The report: teacher, student and the same student alone; `models` are all others."""
    labels = parts.data.test.labels
    taught = dict(_teachers(parts))
    teacher_nK = taught["teacher"][2] if taught else None
    rows: dict[str, Any] = {name: report.of_model(*row, labels) for name, row in taught.items()}
    answers_nK: list[Tensor] = []
    for trial in trials(parts.spec):
        for name, (row, logits_nK) in _trained(trial, parts, finished[trial.name], teacher_nK).items():
            rows[name] = row
            if name == "student" or name.startswith("generation-"):
                answers_nK.append(logits_nK)
    if len(answers_nK) > 1:
        rows |= _generations(rows["student"], answers_nK, parts, teacher_nK)
    if parts.baseline is not None:
        student = parts.spec.students[0]
        rows["alone"] = report.of_model(
            *_measured(student.architecture, parts.baseline.classifier, parts), labels, teacher_nK
        )
    student, alone = rows["student"], rows.get("alone")
    return {
        "teacher": rows.pop("teacher", None),
        "student": rows.pop("student"),
        "alone": rows.pop("alone", None),
        "gain": student["accuracy"] - alone["accuracy"] if alone else None,
        "models": rows,
        "test_samples": len(labels),
        "dataset": parts.data.facts.model_dump(mode="json"),
    }


def answer(parts: Parts, finished: Finished) -> Answer:
    """The student at its best epoch; or all generations, where that is what was asked for."""
    generations = [trial for trial in trials(parts.spec) if trial.name != "alone"]
    if not parts.spec.scheme.ensemble_is_result:
        return Answer(finished["student"]["student"].best, 1)
    weights = {
        f"{number}.{name}": value
        for number, trial in enumerate(generations)
        for name, value in finished[trial.name]["student"].best.items()
    }
    return Answer(weights, len(generations))


def _teachers(parts: Parts) -> Iterator[tuple[str, tuple[str, nn.Module, Tensor]]]:
    teacher, specs = parts.teacher, parts.spec.teachers
    if isinstance(teacher, FrozenTeacher):
        yield "teacher", _measured(_named(specs[0]), teacher.classifier, parts)
    if isinstance(teacher, TeacherEnsemble):
        each = [
            _measured(_named(spec), one.classifier, parts) for spec, one in zip(specs, teacher.members, strict=True)
        ]
        names = " + ".join(name for name, _, _ in each)
        yield "teacher", (names, teacher, teacher.combined([logits_nK for _, _, logits_nK in each]))
        for number, measured in enumerate(each, 1):
            yield f"teacher-{number}", measured


def _trained(
    trial: Trial, parts: Parts, outcomes: Mapping[str, Outcome], teacher_nK: Tensor | None
) -> dict[str, tuple[dict[str, Any], Tensor]]:
    """Row and logits of each model that a trial trained, by the name that it has in the report."""
    built, labels, found = models(trial, parts), parts.data.test.labels, {}
    for number, (name, outcome) in enumerate(outcomes.items()):
        model = built[name]
        best_nK = _logits_with(model, outcome.best, parts)
        last_is_best = outcome.best_epoch == outcome.epochs
        last_nK = best_nK if last_is_best else _logits_with(model, outcome.last, parts)
        spec = trial.students[number] if len(trial.students) > 1 else trial.students[0]
        row = report.of_model(spec.architecture, model.network, best_nK, labels, teacher_nK)
        found[name if trial.name == "student" else trial.name] = (
            row | report.of_training(outcome, last_nK, labels),
            best_nK,
        )
    return found


def _generations(
    last: dict[str, Any], logits_knK: list[Tensor], parts: Parts, teacher_nK: Tensor | None
) -> dict[str, Any]:
    """The last generation and all of them as one, each beside the other: whichever is the answer is the student."""
    together_nK = torch.stack([logits_nK.double().softmax(1) for logits_nK in logits_knK]).mean(0).log().float()
    count = len(logits_knK)
    ensemble = {
        **report.of_logits(together_nK, parts.data.test.labels, teacher_nK),
        "architecture": f"{count} x {last['architecture']}",
        "parameters": count * last["parameters"],
        "bytes": count * last["bytes"],
    }
    return (
        {"student": ensemble, "last": last}
        if parts.spec.scheme.ensemble_is_result
        else {"student": last, "ensemble": ensemble}
    )


def _measured(architecture: str, classifier: Classifier, parts: Parts) -> tuple[str, nn.Module, Tensor]:
    return architecture, classifier.network, evaluate.logits_on(classifier, parts.data.test)


def _named(teacher: Any) -> str:
    return teacher.architecture or "program"


def _logits_with(model: Classifier, these: Mapping[str, Tensor], parts: Parts) -> Tensor:
    model.network.load_state_dict(these)
    return evaluate.logits_on(model, parts.data.test)
