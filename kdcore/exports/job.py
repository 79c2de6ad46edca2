"""A job of the kind `export`: the student of another job, from its file or any checkpoint, measured and written.

Nothing of that job is trained or loaded but its data and the student's weights: no teacher, no baseline.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from base.errors import SpecInvalid, WarningRefused
from base.files import write_text
from kdcore import checkpoint, data, device, exports, report
from kdcore.catalog.facts import DATASET_READING
from kdcore.checkpoint import Progress
from kdcore.classifier import Classifier
from kdcore.exports import Deliverable
from kdcore.measure import batch_norm, evaluate
from kdcore.prepare import PreparedJob, Workspace
from kdcore.quantization import Range
from kdcore.run import scheme_of_trial, students_of
from kdcore.spec import ExportSpec, JobSpec, Known, Trial, parse, trials

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """A student's weights under its network's own names, on the CPU, and the epoch after which it had them."""

    weights: Weights
    epoch: int | None
    """None within the first epoch, and for the file of a job, which does not say it."""
    members: int = 1
    """Several are an ensemble, whose names have the prefix `<number>.`."""
    ranges: Sequence[Range] | None = None
    """Of its activations, if these weights were trained for int8."""


def run_export(spec: ExportSpec, workspace: Workspace) -> dict[str, Any]:
    """Run a job of the kind `export`. Returns its report, which is also in `report.json`.

    Raises SpecInvalid if the checkpoint has no weights of the student yet, and WarningRefused if a file is refused and
    the spec is strict. A stop ends the process: an export saves no checkpoint and starts again.
    """
    started = time.monotonic()
    workspace.lines.phase("preparing")
    asked = parse(spec.distillation, stored=True)
    job, progress = _prepared(spec, asked, workspace)
    trained = _of_file(spec, workspace) if progress is None else _of_progress(spec, job, progress)
    student = _deliverable(job, trained, {})
    workspace.lines.phase("evaluating")
    with workspace.timing("evaluating"):
        classifier = Classifier(deepcopy(student.network), student.mean, student.std).to(job.device)
        logits_nK = evaluate.logits_with_progress(classifier, job.data.test, workspace)
        measured = evaluate.figures(student.architecture, student.network, logits_nK, job.data.test.labels)
    workspace.lines.phase("exporting")
    with workspace.timing("exporting"):
        files = exports.ship(
            _deliverable(job, trained, measured), spec.export, spec.export_options, job.data, workspace
        )
    refused = [file.refused for file in files if file.refused is not None]
    if spec.strict and refused:
        raise WarningRefused("; ".join(f"{one['code']}: {one['message']}" for one in refused), refused[0]["hint"])
    summary = {
        "job": spec.job,
        "checkpoint": {"which": spec.checkpoint, "step": spec.step, "epoch": trained.epoch},
        "measured": measured,
        "files": [file.as_dict() for file in files],
        "dataset": job.data.facts.model_dump(mode="json"),
        "computing": {**job.computing.as_json(), "allocator": device.allocator()},
        "warnings": [warning.as_dict() for warning in workspace.warnings],
        "seconds": round(time.monotonic() - started, 3),
        "timings": {activity: round(seconds, 3) for activity, seconds in workspace.seconds.items()},
    }
    written = write_text(workspace.out / "report.json", json.dumps(summary, indent=2) + "\n")
    workspace.announce("artifact", written, name="report.json", media_type="application/json")
    return summary


def _prepared(spec: ExportSpec, asked: JobSpec, workspace: Workspace) -> tuple[PreparedJob, Progress | None]:
    """Return the job with its data alone, and the state in its checkpoint; None if the weights are a student's file."""
    where = asked.training.model_copy(update={"device": "auto", "step": "eager", "overlap": False})
    computing = device.begin(where, workspace.cache)
    torch.set_num_threads(computing.threads)
    device.make_exact(asked.training.seed)
    progress = None
    if spec.weights_format == "checkpoint":
        progress = checkpoint.load(workspace.file(spec.weights), torch.device("cpu"))
        recipe = asked.training.model_copy(update={"batch_norm": progress.batch_norm})
        asked = asked.model_copy(update={"training": recipe})
    with workspace.timing("data"):
        source = workspace.source(asked.dataset.source)
        loaded = data.load(asked.dataset, source, workspace.cache, workspace.room())
    if progress is not None and progress.reading < DATASET_READING:
        loaded = loaded.without_validation()
    unlabelled = loaded.facts if asked.unlabelled is not None else None  # Only its steps would be others.
    prepared = PreparedJob(
        spec=asked,
        trials=trials(asked, loaded.facts, unlabelled),
        known=Known(dataset=loaded.facts),
        data=loaded,
        unlabelled=None,
        computing=computing,
        teacher=None,
        baseline=None,
    )
    return prepared, progress


def _of_file(spec: ExportSpec, workspace: Workspace) -> Trained:
    """Return the weights of the file that the job has delivered."""
    with safe_open(workspace.file(spec.weights), "pt") as file:
        notes = json.loads((file.metadata() or {}).get("distillery", "{}"))
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Trained(weights, None, notes.get("members", 1), notes.get("activation_ranges"))


def _of_progress(spec: ExportSpec, job: PreparedJob, progress: Progress) -> Trained:
    """Return the weights of the student in a checkpoint: its trial has ended, or is being trained."""
    outcome = progress.finished.get("student", {}).get("student")
    if outcome is not None:
        ranges = outcome.ranges or None
        if spec.checkpoint == "last":
            # Ranges are those of the best epoch: of other weights they would be wrong.
            return Trained(
                outcome.last, outcome.epochs, ranges=ranges if outcome.best_epoch == outcome.epochs else None
            )
        delivered = report.delivered(job, progress.finished)
        return Trained(delivered.weights, outcome.best_epoch, delivered.members, ranges)
    trial = next(trial for trial in job.trials if trial.name not in progress.finished)
    state, stage = progress.training, trial.stages[min(len(progress.prepared), len(trial.stages) - 1)]
    if trial.name != "student" or stage is not trial.stages[-1] or state is None:
        text = f"the checkpoint is of the stage {stage.name}: the training of the student itself has not begun"
        raise SpecInvalid(text, hint="export from a checkpoint of a later step")
    rounding = state.get("quantization", {})
    ranges = rounding.get("ranges", {}).get("student")
    if spec.checkpoint == "last":
        weights = _last(trial, job, state, keeps_statistics=ranges is not None)
        return Trained(weights, int(state["position"]["epoch"]) or None, ranges=ranges)
    best = state["best"]["student"]
    if best["epoch"] > 0:
        return Trained(best["weights"], int(best["epoch"]), ranges=best.get("ranges") or None)
    if "student" in rounding.get("before", {}):
        # The training for int8 has begun, and none of its epochs has ended: its best float weights are what there is.
        return Trained(rounding["before"]["student"], None)
    text = "the checkpoint is of the student's first epoch, after which it is first measured: no epoch is the best"
    raise SpecInvalid(text, hint="export with the checkpoint 'last', or from one of a later step")


def _last(trial: Trial, job: PreparedJob, state: Mapping[str, Any], *, keeps_statistics: bool) -> Weights:
    """Return the weights after the last step, as the training would grade them: averaged and with measured batch-norm
    statistics, if the recipe says so. `keeps_statistics`: those of a training for int8 stay as they are."""
    scheme = scheme_of_trial(trial, job, students_of(trial, job), None)
    nn.ModuleList(scheme.learners()).load_state_dict(state["learners"])
    student = scheme.models["student"]
    if "student" in state["averages"]:
        student.network.load_state_dict(state["averages"]["student"])
    statistics: Weights = {}
    recipe = job.spec.training.model_copy(update={"seed": trial.seed})
    if recipe.batch_norm != "running" and not keeps_statistics:
        statistics = batch_norm.measured(student, batch_norm.of_recipe(job.training_set(trial), recipe))
    found = {**student.network.state_dict(), **statistics}
    return {name: value.detach().cpu() for name, value in found.items()}


def _deliverable(job: PreparedJob, trained: Trained, metrics: Mapping[str, Any]) -> Deliverable:
    ranges = trained.ranges
    return Deliverable.of(job.spec, job.data.facts, trained.weights, metrics, trained.members, activation_ranges=ranges)
