"""One job from spec to report: prepare it, train each stage of each trial, measure, export.

Read `run` first. The trials and their stages are planned in `spec/plan.py`; one step is `StageTraining._step`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.errors import LossDiverged
from base.warning import WarningItem
from kdcore import checkpoint, device, documents, exports, objectives, report
from kdcore.cache import teacher as teacher_cache
from kdcore.cache.teacher import CachedTeacher
from kdcore.catalog.facts import DATASET_READING, DatasetFacts
from kdcore.checkpoint import Meter, Progress, Watch
from kdcore.classifier import Classifier, FrozenTeacher
from kdcore.data import layouts
from kdcore.device import Computing
from kdcore.lesson import NOTHING, Needs, Scheme, Teacher
from kdcore.measure import alarms, chance, evaluate, levers, teacher_check
from kdcore.measure.alarms import Alarms
from kdcore.measure.cost import TRAINING
from kdcore.measure.grading import Outcome
from kdcore.measure.kept import Kept
from kdcore.objectives import Setting
from kdcore.prepare import PreparedJob, Workspace, prepare, refuse_if_strict
from kdcore.schemes.ensemble import NativeEnsemble
from kdcore.schemes.exits import Exits
from kdcore.schemes.mutual import Mutual
from kdcore.schemes.offline import Alone, Offline, Preparation, TeacherAhead
from kdcore.spec import GIVEN, JobSpec, Trial, each_start, start_summary, trials
from kdcore.spec.methods import Method, SchemeOptions
from kdcore.stored_logits import StoredLogits
from kdcore.training import Observer, StageTraining

log = logging.getLogger("kdcore")


def run(spec: JobSpec, workspace: Workspace, resume: Path | None = None) -> dict[str, Any]:
    """Run the whole job. Returns the report, which is also in `report.json` beside `student.safetensors`.

    Raises an EngineError if it fails, or checkpoint.Stopped after a requested stop, when a checkpoint is saved.
    """
    started = time.monotonic()
    resumed, computing, changed = None, None, ""
    if resume is not None:
        log.info("resuming from %s", resume.name)
        resumed = checkpoint.load(resume, device.choose(spec.training))
        computing, changed = device.resume(resumed.computing, spec.training, workspace.cache)
    job = prepare(spec, workspace, resumed.starts if resumed is not None else None, computing)
    statistics = job.spec.training.batch_norm
    assert statistics is not None, "resolve() names the batch-norm statistics"
    progress = resumed or Progress(batch_norm=statistics, starts=dict(job.starts))
    progress.computing = job.computing
    progress.cost.count({**workspace.seconds, "preparing": time.monotonic() - started - workspace.seconds["data"]})
    if resumed is not None:
        _continue_as_begun(job, workspace, progress, changed)
    keep = Kept(workspace.cache, workspace.room(), job.spec.dataset, job.data.facts, job.computing)
    if resumed is None and job.teacher is not None:
        with progress.cost.during("teacher_check"):
            teacher_check.check(spec, job, workspace, keep)
        refuse_if_strict(spec, workspace)
        alarms.warn_if_saturated(job, workspace, keep)
    meter = Meter(job, workspace.lines)
    progress.cost.prepared(job.device, started)

    workspace.lines.phase("training")
    with _cached(job, workspace, progress) as cache:
        for trial in job.trials:
            if trial.name not in progress.finished:
                with progress.cost.during(f"{TRAINING}{trial.name}"):
                    _train(trial, job, workspace, progress, meter, cache or job.teacher)

    workspace.lines.phase("evaluating")
    results = ((trial, untrained(trial, job), progress.finished[trial.name]) for trial in job.trials)
    with progress.cost.during("evaluating"), progress.cost.measuring(len(job.data.test)):
        summary = report.build_report(job, results, workspace.warn, keep, meter.measuring)
    summary["seconds"] = round(progress.cost.seconds, 3)
    summary["computing"] = {**job.computing.as_json(), "allocator": device.allocator(), "used": progress.used}
    summary["teacher_cache"], summary["kept_logits"] = teacher_cache.report(job, cache), keep.report()
    if job.starts:
        students = dict(each_start(vars(job.spec)))
        summary["starts"] = {
            at: start_summary(students[at], start.facts, job.data.facts) for at, start in job.starts.items()
        }

    workspace.lines.phase("exporting")
    with progress.cost.exporting():
        files = exports.write_students(job, workspace, progress.finished, summary)
        summary["quantization"] = exports.int8_table(job, workspace, progress.finished, files)
    summary["files"] = [file.as_dict() for file in files]
    summary["seconds"] = round(progress.cost.seconds, 3)  # Measured again: writing files can take most of a short job.
    summary["warnings"] = [warning.as_dict() for warning in workspace.warnings]
    summary["cost"] = progress.cost.cost(job.computing.bf16).model_dump(mode="json")
    summary["timings"] = progress.cost.timings()
    documents.write(job, workspace, summary, progress.curves)
    meter.end()
    return summary


@contextmanager
def _cached(job: PreparedJob, workspace: Workspace, progress: Progress) -> Iterator[CachedTeacher | None]:
    """Yield the cache in front of the job's teacher; None if it has none."""
    cost = progress.cost
    # A teacher that runs ahead is beside the student's step: its look-ups are no part of the seconds of the job.
    spent = (lambda _: None) if job.computing.overlap else partial(cost.move, activity="caching")
    with cost.during("caching"):
        cache = teacher_cache.in_front(job, workspace, spent)
    try:
        yield cache
    finally:
        if cache is not None:
            with cost.during("caching"):
                cache.close()


def _continue_as_begun(job: PreparedJob, workspace: Workspace, progress: Progress, changed: str) -> None:
    """Keep to the batch-norm statistics, the held-out images, the sizes of images and the warnings of the job that the
    checkpoint continues. `changed`: what this machine computes otherwise, in words."""
    for warning in progress.warnings:
        workspace.warn(warning)
    if changed:
        ended = [stage.name for trial in job.trials if trial.name in progress.finished for stage in trial.stages]
        progress.used = {name: progress.used[name] for name in progress.used if name in [*ended, *progress.prepared]}
        text = f"the job continues {changed}, because that is all it may use here: its sums are rounded differently"
        hint = "submit the job again for figures of one kind"
        workspace.warn(WarningItem("bits_not_repeatable", "/training", text, hint))
    recipe = job.spec.training.model_copy(update={"batch_norm": progress.batch_norm})
    job.spec = job.spec.model_copy(update={"training": recipe})
    if not progress.has_sizes:
        job.keep_to_one_size()
    if progress.reading < DATASET_READING and _was_read_otherwise(job.data.facts):
        text = "the checkpoint is of an earlier version, which read this data set in another way: it continues on " + (
            ", ".join(f"{count} images of {name}" for name, count in job.data.facts.splits.items()) or "other labels"
        )
        workspace.warn(WarningItem("bits_not_repeatable", "/dataset", text, "submit the job again"))
    if progress.reading < DATASET_READING and job.data.val is not None:
        job.data = job.data.without_validation()
        job.known = replace(job.known, dataset=job.data.facts)
        job.trials = trials(job.spec, job.data.facts, job.known.unlabelled)
    height, width = job.data.facts.image_size
    if progress.format < checkpoint.FORMAT and evaluate.batch_size(height, width) != evaluate.LARGEST_BATCH:
        text = (
            "the checkpoint is of an earlier version, which evaluated 256 images at a time: accuracies and losses of "
            "further epochs may differ in their last bits, and so may the choice of the best epoch"
        )
        workspace.warn(WarningItem("bits_not_repeatable", "", text, "submit the job again for figures of one kind"))


def _was_read_otherwise(facts: DatasetFacts) -> bool:
    """Return True if earlier versions took other images for the training or test split, or dropped the transparency of
    pictures. That they used no validation split is not counted: a resumed job does not use it either."""
    by_names = {"", "arrays", layouts.SPLITS, layouts.CLASSES, layouts.UNLABELLED}
    read_before = {"train", "test", "val", "valid", "validation", "x_train", "x_test"}
    names = [name.lower() for name in facts.splits]
    used = [names[0], *names[2:]] if facts.validation else names
    by_other_names = facts.layout not in by_names or not read_before.issuperset(used)
    return by_other_names or bool(facts.pictures.get("alpha"))


def _train(
    trial: Trial,
    job: PreparedJob,
    workspace: Workspace,
    progress: Progress,
    meter: Meter,
    given: Teacher | None,
) -> None:
    """Train a trial from its start, stage after stage. `given`: the teacher that the spec names."""
    try:
        teacher = given if trial.taught_by == GIVEN else _earlier_student(trial, job, progress)
        with _beside(teacher, job.computing) as taught_by:
            _train_stages(TrialSetup(trial, job, taught_by), workspace, progress, meter)
    except LossDiverged:
        teacher_check.require_finite_in_training(job, workspace.lines)  # Its fault is not the learning rate's.
        raise


@contextmanager
def _beside(teacher: Teacher | None, computing: Computing) -> Iterator[Teacher | None]:
    """Let a teacher run ahead in a thread of its own while a `with` block trains its student, if the job computes so.
    Then the threads of the CPU are divided between the two. A file of logits computes nothing."""
    if teacher is None or isinstance(teacher, StoredLogits) or not computing.overlap:
        yield teacher
        return
    torch.set_num_threads(computing.student_threads)
    try:
        with closing(TeacherAhead(teacher, computing.teacher_threads)) as ahead:
            yield ahead
    finally:
        torch.set_num_threads(computing.threads)


def _train_stages(setup: TrialSetup, workspace: Workspace, progress: Progress, meter: Meter) -> None:
    trial, job = setup.trial, setup.job
    for number, stage in enumerate(trial.stages):
        watch, clock = Watch(stage, meter, workspace, progress), progress.cost.stage(stage)
        after_step = clock.around(_noting(setup, stage.name, progress, watch.after_step))
        observer = Observer(watch.metric, after_step, clock.before_evaluation, watch.evaluated)
        training = setup.training(number, observer)
        if stage is trial.stages[-1]:
            training.alarms = _alarms(trial, job, training, workspace)
        if stage.name in progress.prepared:
            training.adopt(progress.prepared[stage.name])
            continue
        if progress.training is not None:
            training.restore(progress.training)
        levers.begin(training)
        outcomes = training.run()
        if stage is trial.stages[-1]:
            _compare_statistics(trial, training, outcomes, workspace)
            progress.finished[trial.name], progress.prepared = outcomes, {}
            _forget_starts(job, progress)
        else:
            progress.prepared[stage.name] = training.learned()
        watch.save_or_warn(training, None)


def _noting(
    setup: TrialSetup, stage: str, progress: Progress, after_step: Callable[[StageTraining], None]
) -> Callable[[StageTraining], None]:
    """Return `after_step`, before which the levers of the first step are noted. A resumed stage keeps those of its
    begin: the report of a job that was stopped is that of one that was not."""

    def noting(training: StageTraining) -> None:
        if stage not in progress.used:
            progress.used[stage] = levers.used(setup.job, setup.trial, training)
            log.info("%s: %s", stage, levers.in_words(progress.used[stage]))
        after_step(training)

    return noting


def _forget_starts(job: PreparedJob, progress: Progress) -> None:
    """Drop the weights with which no trial will begin any more, so that checkpoints do not keep them."""
    to_come = [student for trial in job.trials if trial.name not in progress.finished for student in trial.students]
    for pointer, student in each_start(vars(job.spec)):
        if student not in to_come:
            progress.starts[pointer] = progress.starts[pointer].without_state()


def _alarms(trial: Trial, job: PreparedJob, training: StageTraining, workspace: Workspace) -> Alarms:
    """Return the alarms of a trial's last stage. The loss of an earlier one may be constant, as it has no student."""
    held_out = training.training_set.held_out
    counts = torch.bincount(held_out.labels.cpu(), minlength=job.data.facts.num_classes).tolist()
    return Alarms(
        workspace.warn,
        trial="the student" if trial.name == "student" else trial.name,
        level=chance.chance_level(counts),
        held_out=len(held_out),
        objective=training.objective is not None and training.beta > 0,
    )


def _compare_statistics(
    trial: Trial, training: StageTraining, outcomes: Mapping[str, Outcome], workspace: Workspace
) -> None:
    """Warn for each model whose running averages of batch-norm statistics give another accuracy, by more than noise."""
    for name, outcome in outcomes.items():
        accuracies = training.grading.compare_statistics(name, outcome, training.evaluated)
        if accuracies is None:
            continue
        measured, running = accuracies
        model = name if trial.name == "student" else trial.name if name == "student" else f"{trial.name}/{name}"
        text = (
            f"{model}: with the running averages of its batch norms {running:.1%} of the held-out images are right, "
            f"with statistics measured anew {measured:.1%}"
        )
        if training.recipe.batch_norm != "running":
            text += ", which the report and the file have"
            hint = "nothing needs to be done; more steps bring the two closer"
        else:
            text += "; the report and the file have the running averages"
            hint = "submit the job without training.batch_norm, by default it is 'views' or 'measured'"
        workspace.warn(WarningItem("batch_norm_not_converged", "/training", text, hint))


def _earlier_student(trial: Trial, job: PreparedJob, progress: Progress) -> Teacher | None:
    """Return the best student of an earlier trial as a teacher; None if the trial has none. No other job has that one,
    so that none of its outputs are kept."""
    if trial.taught_by is None:
        return None
    earlier = next(one for one in job.trials if one.name == trial.taught_by)
    student = job.student(earlier.students[0])
    student.network.load_state_dict(progress.finished[earlier.name]["student"].best)
    return FrozenTeacher(student, job.computing.folded)


class TrialSetup:
    """A trial's students, objectives and images. Creating it draws the students' weights from the trial's seed."""

    def __init__(self, trial: Trial, job: PreparedJob, teacher: Teacher | None) -> None:
        device.make_exact(trial.seed)
        self.trial, self.job, self.teacher = trial, job, teacher
        self.training_set = job.training_set(trial)
        self.students = students_of(trial, job)
        self.rate_factors = self._start()
        setting = Setting(
            temperature=job.spec.temperature,
            num_classes=job.data.facts.num_classes,
            epochs=job.spec.training.epochs,
            labels=self.training_set.images.labels,
            rows=self.training_set.rows,
        )
        self.objectives = objectives.build(trial.methods, setting)

    def _start(self) -> dict[nn.Parameter, float]:
        """Give students the weights from which they start. Returns the factor of the learning rate of every parameter
        that has one."""
        factors: dict[nn.Parameter, float] = {}
        for spec, student in zip(self.trial.students * self.trial.scheme.branches, self.students, strict=True):
            start = self.job.start(spec)
            if start is None:
                continue
            assert start.state is not None, "weights are kept until all trials that begin with them have ended"
            student.network.load_state_dict(start.state, strict=False)
            if spec.head_lr is not None and spec.head_lr != 1:
                fresh = (one for name, one in student.network.named_parameters() if name in start.fresh)
                factors |= dict.fromkeys(fresh, spec.head_lr)
        return factors

    def training(self, number: int, observer: Observer) -> StageTraining:
        """Return the training of a stage. Sets torch's generator, so that a trial can be resumed between two stages."""
        spec, stage, objective = self.job.spec, self.trial.stages[number], self.objectives[number]
        needs = objective.needs if objective is not None else NOTHING
        answers = spec.unlabelled is not None and spec.unlabelled.labels == "teacher"
        if number > 0:
            torch.manual_seed(self.trial.seed + number)
        if stage.method is not None:
            scheme, beta = self._before_the_labels(stage.method, needs, answers)
            alpha, smoothing = 0.0, 0.0
        else:
            scheme = scheme_of_trial(self.trial, self.job, self.students, self.teacher, needs, answers)
            alpha, beta, smoothing = spec.alpha or 0.0, spec.beta or 0.0, spec.training.label_smoothing
            if not self.trial.methods and spec.scheme.kind != "alone":
                alpha = 1.0  # alpha weighs the labels beside a distillation loss, which this trial does not have.
        return StageTraining(
            scheme=scheme,
            objective=objective,
            alpha=alpha,
            beta=beta if objective is not None else 0.0,
            smoothing=smoothing,
            epochs=stage.epochs,
            recipe=spec.training.model_copy(update={"seed": self.trial.seed}),
            training_set=self.training_set,
            num_classes=self.job.data.facts.num_classes,
            observer=observer,
            rate_factors=self.rate_factors,
            graph=self.job.computing.step == "graph",
            aware_epochs=stage.aware_epochs,
        )

    def _before_the_labels(self, method: Method, needs: Needs, answers: bool) -> tuple[Scheme, float]:
        """Return the scheme of a method's first stage, and the weight of its loss."""
        first = method.first_stage
        assert first is not None and self.teacher is not None, "a stage of one method is its first, and has a teacher"
        # If the method has no loss in the last stage, its weight belongs to its first stage.
        beta = (self.job.spec.beta or 0.0) * objectives.weight(method) if first.then_labels_alone else 1.0
        if not first.trains_student:
            return Preparation(self.teacher, needs), beta
        return Offline(self.students[0], self.teacher, needs, answers), beta


def students_of(trial: Trial, job: PreparedJob) -> list[Classifier]:
    """Return a trial's untrained students; one for each branch if the student is branched."""
    return [job.student(spec) for spec in trial.students * trial.scheme.branches]


def scheme_of_trial(
    trial: Trial,
    job: PreparedJob,
    students: list[Classifier],
    teacher: Teacher | None,
    needs: Needs = NOTHING,
    answers: bool = False,
) -> Scheme:
    """Return the scheme of a trial's last stage."""
    facts = job.data.facts
    match trial.scheme:
        case SchemeOptions("mutual"):
            return Mutual(students, needs)
        case SchemeOptions("ensemble", rampup_epochs=rampup):
            return NativeEnsemble(students, facts.image_size, rampup)
        case SchemeOptions("exits", exits=exits):
            network = job.known.network(trial.students[0].architecture)
            assert exits and network and network.embedding, "fit() refuses a job without exits and an embedding"
            return Exits(students[0], exits, network.embedding, facts.num_classes, facts.image_size)
    if teacher is None or not trial.methods:
        return Alone(students[0])
    return Offline(students[0], teacher, needs, answers)


def untrained(trial: Trial, job: PreparedJob) -> Mapping[str, Classifier]:
    """Return the models that a trial delivers, with random weights, in which its outcomes can be loaded."""
    return scheme_of_trial(trial, job, students_of(trial, job), None).models
