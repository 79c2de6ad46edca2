"""The report, with every model of a job measured once on test images not used in training; and the delivered student.

Shapes: n test images, K classes, k models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from base.warning import WarningItem
from kdcore.classifier import Classifier
from kdcore.measure import evaluate, teacher_check
from kdcore.measure.findings import Findings
from kdcore.measure.grading import Outcome
from kdcore.measure.kept import Kept
from kdcore.measure.verdict import Run, verdict
from kdcore.prepare import PreparedJob
from kdcore.spec import Trial, run_name, run_seeds
from kdcore.spec.plan import GENERATION
from kdcore.stored_logits import StoredLogits

VERSION = 2
"""Of the schema of report.json (docs/report.md). Before it was counted, a report had no number: 1."""

Result = tuple[Trial, Mapping[str, Classifier], Mapping[str, Outcome]]
"""A finished trial, its models, and their outcomes by the same names."""
LogitsOf = Callable[[Classifier], Tensor]
"""Measures a model on the test images."""


@dataclass(frozen=True)
class Delivered:
    """A job's student: weights under the network's own names, with the prefix `<number>.` for several members."""

    weights: Mapping[str, Tensor]
    members: int


def delivered(job: PreparedJob, finished: Mapping[str, Mapping[str, Outcome]]) -> Delivered:
    """Return the student at its best epoch; if the method delivers an ensemble, all generations at theirs."""
    if not job.spec.scheme.ensemble_is_result:
        return Delivered(finished["student"]["student"].best, 1)
    generations = [trial for trial in job.trials if not trial.is_baseline]
    weights = {
        f"{number}.{name}": value
        for number, trial in enumerate(generations)
        for name, value in finished[trial.name]["student"].best.items()
    }
    return Delivered(weights, len(generations))


def build_report(
    job: PreparedJob,
    results: Iterable[Result],
    warn: Callable[[WarningItem], None],
    keep: Kept,
    on_images: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Return the rows of teacher, student and the same student alone, and the verdict; `models` are all others.

    `on_images` is called with the numbers of images that models have been run on. `keep` keeps logits of models that
    later jobs may have, too.
    """

    def logits_of(model: Classifier) -> Tensor:
        return evaluate.logits_on(model, job.data.test, on_images)

    def kept_logits_of(model: Classifier, architecture: str) -> Tensor:
        return keep.logits(architecture, model, job.data.test, lambda: logits_of(model))

    labels, student_spec, findings = job.data.test.labels, job.spec.students[0], Findings(job, keep, on_images)
    rows: dict[str, Any] = {}
    right: dict[str, Tensor] = {}
    teacher_nK: Tensor | None = None
    if job.teacher is not None and not job.teacher_answers:
        rows["teacher"] = _row_without_figures(job)
    for name, architecture, network, logits_nK in _teachers(job, kept_logits_of):
        teacher_nK = logits_nK if name == "teacher" else teacher_nK
        rows[name] = model_row(architecture, network, logits_nK, labels)
        right[name] = is_right(logits_nK, labels)
    if job.stored is not None:
        teacher_nK = job.stored.of_test_images()
        rows["teacher"] = _stored_row(job, job.stored)
        if teacher_nK is not None:
            right["teacher"] = is_right(teacher_nK, labels)
    findings.teacher(teacher_nK)
    generations: list[Tensor] = []
    for result in results:
        for name, row, logits_nK in _trained(job, *result, teacher_nK, logits_of, findings):
            rows[name], right[name] = row, is_right(logits_nK, labels)
            if name == "student" or name.startswith(GENERATION):
                generations.append(logits_nK)
    if len(generations) > 1:
        ensemble_nK = evaluate.mean_of(generations)
        rows |= _generation_rows(rows["student"], ensemble_nK, len(generations), job, teacher_nK)
        if job.spec.scheme.ensemble_is_result:
            right["student"] = is_right(ensemble_nK, labels)
            findings.ensemble(ensemble_nK)
    if job.baseline is not None:
        logits_nK = kept_logits_of(job.baseline, student_spec.architecture)
        rows["alone"] = model_row(student_spec.architecture, job.baseline.network, logits_nK, labels, teacher_nK)
        right["alone"] = is_right(logits_nK, labels)
        findings.trained("alone", job.baseline, logits_nK, student_spec.architecture)
    findings.add_temperatures(rows)
    student, alone = rows["student"], rows.get("alone")
    counts = torch.bincount(labels.cpu(), minlength=job.data.facts.num_classes).tolist()
    answers = None if job.teacher is None else job.teacher_answers
    trained_on = rows["teacher"]["training_accuracy"] if job.stored is not None and teacher_nK is None else None
    judged = verdict(_runs(job, right), counts, right.get("teacher"), answers, trained_on)
    for warning in judged.warnings:
        warn(warning)
    return {
        "version": VERSION,
        "verdict": judged.sentence,
        "proof": judged.proof,
        "teacher": rows.pop("teacher", None),
        "student": rows.pop("student"),
        "alone": rows.pop("alone", None),
        "gain": student["accuracy"] - alone["accuracy"] if alone else None,
        "models": rows,
        "test_samples": len(labels),
        "dataset": job.data.facts.model_dump(mode="json"),
        **findings.fields(),
    }


def is_right(logits_nK: Tensor, labels_n: Tensor) -> Tensor:
    """Return whether each answer is the label: bool n, on the CPU."""
    return logits_nK.argmax(1).cpu() == labels_n.cpu()


def _runs(job: PreparedJob, right: Mapping[str, Tensor]) -> list[Run]:
    """Return the runs of a job, one for each seed, the delivered one first."""
    return [
        Run(seed, right[run_name("student", seed, run)], right.get(run_name("alone", seed, run)))
        for run, seed in enumerate(run_seeds(job.spec))
    ]


def model_row(
    architecture: str, network: nn.Module, logits_nK: Tensor, labels_n: Tensor, teacher_nK: Tensor | None = None
) -> dict[str, Any]:
    """Return the row of one model, compared with the teacher if its logits are given."""
    return {
        "architecture": architecture,
        "parameters": evaluate.parameters(network),
        "bytes": evaluate.size_bytes(network),
        **logits_row(logits_nK, labels_n, teacher_nK),
    }


def logits_row(logits_nK: Tensor, labels_n: Tensor, teacher_nK: Tensor | None = None) -> dict[str, Any]:
    """Return the part of a row that depends only on the logits."""
    score = evaluate.score(logits_nK, labels_n)
    return {
        "accuracy": score.accuracy,
        "accuracy_top5": score.accuracy_top5,
        "loss": score.loss,
        "agreement": None if teacher_nK is None else evaluate.agreement(logits_nK, teacher_nK),
    }


def training_row(outcome: Outcome, last_nK: Tensor, labels_n: Tensor) -> dict[str, Any]:
    """Return the part of a row about its training. The row's figures are those of the best epoch on held-out images,
    and the last epoch is given beside them."""
    return {
        "best": {"epoch": outcome.best_epoch, "validation_accuracy": outcome.best_accuracy},
        "last": {"epoch": outcome.epochs, "accuracy": evaluate.score(last_nK, labels_n).accuracy},
    }


def _teachers(
    job: PreparedJob, logits_of: Callable[[Classifier, str], Tensor]
) -> Iterator[tuple[str, str, nn.Module, Tensor]]:
    """Yield name, architecture, network and logits of the teacher, then of its members if there are several."""
    if job.teacher is None or job.stored is not None or not job.teacher_answers:
        return
    names = [spec.architecture or "program" for spec in job.spec.teachers]
    networks = [member.network for member in job.teacher.members]
    logits_knK = list(map(logits_of, job.teacher.members, names))
    yield "teacher", " + ".join(names), nn.ModuleList(networks), job.teacher.combined(logits_knK)
    if len(networks) > 1:
        for number, row in enumerate(zip(names, networks, logits_knK, strict=True), 1):
            yield f"teacher-{number}", *row


def _stored_row(job: PreparedJob, teacher: StoredLogits) -> dict[str, Any]:
    """Return the row of logits in a file. Without those of test images it has figures on training images only."""
    test_nK = teacher.of_test_images()
    trained = evaluate.score(*teacher_check.on_training_images(job, teacher))
    figures = dict.fromkeys(("accuracy", "accuracy_top5", "loss", "agreement"))
    return {
        "architecture": teacher.facts.architecture,
        "parameters": teacher.facts.parameters,
        "bytes": teacher.facts.bytes,
        **(figures if test_nK is None else logits_row(test_nK, job.data.test.labels)),
        "training_accuracy": trained.accuracy,
    }


def _row_without_figures(job: PreparedJob) -> dict[str, Any]:
    """Return the row of a teacher of other classes, whose answers cannot be right or wrong."""
    assert job.teacher is not None, "the row is a teacher's"
    (member,) = job.teacher.members
    return {
        "architecture": job.spec.teachers[0].architecture or "program",
        "parameters": evaluate.parameters(member.network),
        "bytes": evaluate.size_bytes(member.network),
        **dict.fromkeys(("accuracy", "accuracy_top5", "loss", "agreement")),
    }


def _trained(
    job: PreparedJob,
    trial: Trial,
    models: Mapping[str, Classifier],
    outcomes: Mapping[str, Outcome],
    teacher_nK: Tensor | None,
    logits_of: LogitsOf,
    findings: Findings,
) -> Iterator[tuple[str, dict[str, Any], Tensor]]:
    """Yield the name in the report, row and logits of each model that a trial trained."""
    labels = job.data.test.labels
    for number, (name, outcome) in enumerate(outcomes.items()):
        model = models[name]
        best_nK = logits_of(_with(model, outcome.best))
        suffix = trial.name.removeprefix("student")
        title = f"{name}{suffix}" if suffix != trial.name else trial.name
        findings.trained(title, model, best_nK)
        last_is_best = outcome.best_epoch == outcome.epochs
        last_nK = best_nK if last_is_best else logits_of(_with(model, outcome.last))
        spec = trial.students[number] if len(trial.students) > 1 else trial.students[0]
        row = model_row(spec.architecture, model.network, best_nK, labels, teacher_nK)
        row |= training_row(outcome, last_nK, labels)
        if outcome.running:
            running_nK = logits_of(_with(model, {**outcome.best, **outcome.running}))
            row["accuracy_running_averages"] = evaluate.score(running_nK, labels).accuracy
        yield title, row, best_nK


def _with(model: Classifier, weights: Mapping[str, Tensor]) -> Classifier:
    model.network.load_state_dict(weights)
    return model


def _generation_rows(
    last: dict[str, Any], mean_nK: Tensor, count: int, job: PreparedJob, teacher_nK: Tensor | None
) -> dict[str, Any]:
    """Yield the rows of the last generation and of all as an ensemble: one is the student, the other is beside it."""
    ensemble = {
        **logits_row(mean_nK, job.data.test.labels, teacher_nK),
        "architecture": f"{count} x {last['architecture']}",
        "parameters": count * last["parameters"],
        "bytes": count * last["bytes"],
    }
    return (
        {"student": ensemble, "last": last}
        if job.spec.scheme.ensemble_is_result
        else {"student": last, "ensemble": ensemble}
    )
