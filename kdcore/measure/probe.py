"""A probe of what a job will cost: a few real steps of each stage, and a few evaluated images, with random weights and
random pixels of the job's shapes. It takes seconds for the usual small networks, and its time is bounded: what would
take longer is measured on smaller batches and scaled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import ceil
from statistics import median

import torch

from base.errors import SpecInvalid
from kdcore import device as devices
from kdcore import models
from kdcore.catalog import DatasetFacts
from kdcore.classifier import Classifier, FrozenTeacher, TeacherEnsemble
from kdcore.data.images import Data, Images
from kdcore.device import Computing
from kdcore.lesson import Teacher
from kdcore.measure import batch_norm, evaluate
from kdcore.measure.cost import device_name, peak_memory
from kdcore.prepare import PreparedJob, own_side, wide_side
from kdcore.run import TrialSetup
from kdcore.spec import GIVEN, JobSpec, Known, Stage, Trial, trials
from kdcore.spec import Teacher as TeacherSpec
from kdcore.spec.cost import JobCost, ProbeRequest, StageCost
from kdcore.spec.fitting import images_held_out, images_to_train_on
from kdcore.training import Observer, StageTraining

BUDGET_S = 6.0
"""Seconds for all stages and evaluations together. One step of the smallest batch is always taken."""
STEPS = 3
"""Measured steps of a stage, after one that is not counted."""
SMALL_BATCH = 8
MODELS_AT_THE_END = 2
"""The report measures a trained model at its best epoch and at its last one."""


class _Enough(Exception):
    """Ends a training that was only probed."""


@dataclass
class _Measured:
    """What one stage of the probe has found."""

    step_s: float
    memory_bytes: int
    image_s: float
    """Seconds of running all of the stage's models on one image."""
    statistics_s: float
    """The same while their batch-norm statistics are measured."""


def probe(request: ProbeRequest) -> JobCost:
    """Return the cost of a job, of which nothing is read but the spec. Raises SpecInvalid if its networks are in files:
    a program's graph, or published weights whose architecture is not known yet."""
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    spec, facts = request.spec, request.dataset
    unknown = [
        teacher.program or teacher.logits or teacher.checkpoint
        for teacher in spec.teachers
        if teacher.architecture is None
    ]
    if unknown:
        raise SpecInvalid(f"only a job that runs can measure {unknown[0]}: its network is in the file")
    devices.make_exact(spec.training.seed)
    prober = _Prober(spec, facts, devices.begin(spec.training, None, (torch.get_num_threads(), "")))
    return prober.run()


class _Prober:
    def __init__(self, spec: JobSpec, facts: DatasetFacts, computing: Computing) -> None:
        self.spec, self.facts, self.computing = spec, facts, computing
        self.device = torch.device(computing.device)
        self.planned = trials(spec, facts, None)
        members = [FrozenTeacher(self._classifier(teacher), computing.folded) for teacher in spec.teachers]
        self.members = [member.classifier for member in members]
        self.teacher = _joined(members, spec)
        self.images = self._random_images(evaluate.batch_size(*facts.image_size))
        # All pixels are made before the memory is read: they are no part of what a step needs.
        self.jobs = {size: self._job(size) for size in sorted({self._batch, min(SMALL_BATCH, self._batch)})}
        self.memory_fixed = peak_memory(self.device)
        # Another seed costs what the first one does.
        stages = [stage for trial in self.planned if trial.run == 0 for stage in trial.stages]
        self.share_s = BUDGET_S / (1 + sum(len(_kinds(stage)) for stage in stages))

    def run(self) -> JobCost:
        measured = {}
        found: dict[object, _Measured] = {}
        for trial in self.planned:
            for number, stage in enumerate(trial.stages):
                for name, rounds in _kinds(stage):
                    # Generations and assistants of the same networks cost the same.
                    alike = (trial.students, self._taught_by(trial), trial.methods, stage.method, rounds)
                    if alike not in found:
                        found[alike] = self._stage(trial, number, rounds)
                    measured[name] = found[alike]
        teacher_image_s = sum(self._image_s(member) for member in self.members)
        # The report measures in float what was trained for int8, too, unless there is no epoch in float to know it of.
        images_s = {trial.name: measured[_kinds(trial.stages[-1])[0][0]].image_s for trial in self.planned}
        students_image_s = sum(images_s.values())
        given_baseline = self.spec.baseline != "none" and not self.spec.trains_baseline
        baseline_image_s = images_s["student"] if given_baseline else 0.0
        return JobCost(
            basis="probe",
            device="cuda" if self.device.type == "cuda" else "cpu",
            device_name=device_name(self.device),
            threads=torch.get_num_threads(),
            precision="bf16" if self.computing.bf16 else "fp32",
            preparing_s=None,
            stages={
                name: StageCost(step_s=one.step_s, held_out_image_s=self._held_out_image_s(one))
                for name, one in measured.items()
            },
            test_image_s=teacher_image_s + MODELS_AT_THE_END * students_image_s + baseline_image_s,
            memory_bytes=max(one.memory_bytes for one in measured.values()),
            memory_fixed_bytes=self.memory_fixed,
        )

    @property
    def _batch(self) -> int:
        return self.spec.training.batch_size

    def _stage(self, trial: Trial, number: int, rounds: bool) -> _Measured:
        """Measure a stage on a small batch, then on the real one if that fits into the stage's share of the time.
        `rounds`: its steps that train for int8."""
        small = min(self.jobs)
        found = self._steps(trial, number, small, rounds)
        of_the_batch = found.memory_bytes - self.memory_fixed
        scaled_s = found.step_s * self._batch / small
        if small == self._batch or scaled_s * (STEPS + 1) > self.share_s:
            memory = self.memory_fixed + of_the_batch * self._batch // small
            return replace(found, step_s=scaled_s, memory_bytes=memory)
        return self._steps(trial, number, self._batch, rounds)

    def _steps(self, trial: Trial, number: int, size: int, rounds: bool) -> _Measured:
        """Measure a stage with batches of this size."""
        ends: list[float] = []

        def after_step(_: StageTraining) -> None:
            self._wait()
            ends.append(time.monotonic())
            if len(ends) > STEPS or ends[-1] - began > self.share_s:
                raise _Enough

        setup = TrialSetup(trial, self.jobs[size], self._taught(trial, self.jobs[size]))
        training = setup.training(number, Observer(lambda *_: None, after_step))
        training.aware_epochs = training.epochs if rounds else 0
        began = time.monotonic()
        with suppress(_Enough):
            training.run()
        # The first step also chooses kernels; it counts if there was time for no other.
        lengths = [end - start for start, end in pairwise(ends)] or [ends[0] - began]
        # The kernel counts pages in batches, and may say a little less than before.
        memory, models = max(peak_memory(self.device), self.memory_fixed), training.scheme.models.values()
        batch = self.jobs[size].data.train.pixels[:size]
        return _Measured(
            step_s=median(lengths),
            memory_bytes=memory,
            image_s=sum(self._image_s(model) for model in models),
            statistics_s=sum(self._seconds(partial(batch_norm.measured, one, [batch])) for one in models) / size,
        )

    def _held_out_image_s(self, found: _Measured) -> float:
        """Return seconds of measuring a stage's models after an epoch, for each held-out image."""
        training = self.spec.training
        if training.batch_norm == "running":
            return found.image_s
        images = images_to_train_on(self.facts, None, None, training)
        statistics = batch_norm.batches_in(images, training.batch_size) * training.batch_size
        return found.image_s + found.statistics_s * statistics / images_held_out(self.facts, training)

    def _image_s(self, model: Classifier) -> float:
        """Return seconds of evaluating one image; of a few images first, then of a whole batch if there is
        time."""
        few = self.images.take(torch.arange(min(SMALL_BATCH, len(self.images))))
        seconds = self._seconds(partial(evaluate.logits_on, model, few)) / len(few)
        if seconds * len(self.images) < self.share_s / 4:
            seconds = self._seconds(partial(evaluate.logits_on, model, self.images)) / len(self.images)
        return seconds

    def _seconds(self, measured: Callable[[], object]) -> float:
        self._wait()
        began = time.monotonic()
        measured()
        self._wait()
        return time.monotonic() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _classifier(self, teacher: TeacherSpec) -> Classifier:
        assert teacher.architecture is not None and teacher.preprocessing is not None, "the spec is resolved"
        network = models.build(teacher.architecture, self.facts.num_classes, self.facts.channels)
        normalization = teacher.preprocessing.mean, teacher.preprocessing.std
        side = own_side(teacher, self.facts)
        return Classifier(network, *normalization, bf16=self.computing.bf16, image_size=side).to(self.device)

    def _taught_by(self, trial: Trial) -> object:
        if trial.taught_by in (None, GIVEN):
            return trial.taught_by
        return next(one.students for one in self.planned if one.name == trial.taught_by)

    def _taught(self, trial: Trial, job: PreparedJob) -> Teacher | None:
        """Return the teacher of a trial: the given one, or an untrained student of an earlier trial."""
        if trial.taught_by is None:
            return None
        if trial.taught_by == GIVEN:
            return self.teacher
        earlier = next(one for one in self.planned if one.name == trial.taught_by)
        return FrozenTeacher(job.student(earlier.students[0]), self.computing.folded)

    def _job(self, size: int) -> PreparedJob:
        """Return the job on random pixels: just enough for the steps of an epoch that does not end."""
        recipe = self.spec.training.model_copy(update={"batch_size": size})
        rows = ceil((STEPS + 2) * size / (1 - recipe.validation_fraction)) + 2
        images = self._random_images(rows)
        return PreparedJob(
            spec=self.spec.model_copy(update={"training": recipe}),
            trials=self.planned,
            known=Known(dataset=self.facts),
            data=Data(images, self.images, tuple(self.facts.class_names), self.facts),
            unlabelled=None,
            computing=self.computing,
            teacher=self.teacher,
            baseline=None,
        )

    def _random_images(self, count: int) -> Images:
        channels, size = self.facts.channels, self.facts.image_size
        pixels = torch.randint(0, 256, (count, channels, *size), dtype=torch.uint8)
        sides = {side for teacher in self.spec.teachers if (side := own_side(teacher, self.facts)) is not None}
        store = wide_side(self.spec.training, self.facts)

        def squares(side: int) -> torch.Tensor:
            """Return one picture for all rows: it costs what many do, and no memory."""
            return torch.randint(0, 256, (1, channels, side, side), dtype=torch.uint8).expand(count, -1, -1, -1)

        labels = torch.arange(count) % self.facts.num_classes
        wide = None if store is None else squares(store)
        return Images(pixels, labels, {side: squares(side) for side in sorted(sides)}, wide)


def _kinds(stage: Stage) -> list[tuple[str, bool]]:
    """Return the kinds of steps that a stage has: the name of each, and whether it trains for int8. Float is first."""
    in_float, in_int8 = stage.epochs > stage.aware_epochs, stage.aware_epochs > 0
    return [(stage.name, False)] * in_float + [(stage.aware_name, True)] * in_int8


def _joined(members: Sequence[FrozenTeacher], spec: JobSpec) -> FrozenTeacher | TeacherEnsemble | None:
    if len(members) < 2:
        return members[0] if members else None
    return TeacherEnsemble(members, [1.0] * len(members), spec.temperature or 1.0)
