"""The cost of a job before it runs, from what was measured of the same stages on the same kind of device. No torch.

A job that has succeeded, or a probe of a few steps, gives a `JobCost`. `cost_rows` divides it into rows that a service
keeps: one for each stage of each trial (seconds of a step), and another one for its epochs that train for int8; one for
the whole job (memory, reading of the data, the final measuring); and one for the student's files. Each is under a key
of all that decides it. `predict` puts the rows of another job together again. Each row of a stage or a job is also kept
under a key without the batch size (and, of the whole job, without the data): its seconds are then scaled in proportion
to the images of a batch.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kdcore.catalog import DatasetFacts
from kdcore.catalog.facts import Facts
from kdcore.spec.fitting import Known, images_held_out
from kdcore.spec.inputs import Teacher
from kdcore.spec.job import JobSpec
from kdcore.spec.plan import GIVEN, Stage, Trial, aware_epochs, trials
from kdcore.spec.recipe import Training

VERSION = 1
"""A part of every key. Increase it when the same job comes to cost something else."""
DeviceKind = Literal["cuda", "cpu"]
DEVICE_KINDS: tuple[DeviceKind, ...] = ("cuda", "cpu")
Basis = Literal["measured", "probe", "parameters"]
NOT_OF_A_STEP = {"weight", "pretraining_epochs", "warmup_epochs", "rampup_epochs", "generations", "answer"}
"""Options of methods that change no step's cost."""
TENSORS_OF_A_STUDENT = 4
"""The least number of float32 copies of a student's weights in memory: the weights, their gradients, the optimizer's
momentum, and the weights at the best epoch."""


class StageCost(Facts):
    """The cost of one stage of a trial, or of its epochs that train for int8."""

    step_s: float
    """Seconds of an optimizer step: teacher, student, objective, update. A median, without the first steps."""
    held_out_image_s: float
    """Seconds of measuring the stage's models after an epoch, batch-norm statistics included, for each held-out
    image."""


class JobCost(Facts):
    """What a job has cost, or what a probe of a few of its steps has found."""

    basis: Literal["measured", "probe"]
    device: DeviceKind
    device_name: str
    threads: int
    precision: Literal["fp32", "bf16"]
    preparing_s: float | None
    """Seconds of reading data and teacher and of building the networks; null after a probe, which reads no data."""
    stages: dict[str, StageCost]
    """By the names of the stages: `student`, `student/fsp`, `alone`; `student/int8`: its epochs that train for int8."""
    test_image_s: float
    """Seconds of measuring all models at the end, for each test image."""
    memory_bytes: int
    """The largest memory: resident memory of the engine's process on a CPU, allocated memory of the device on a GPU."""
    memory_fixed_bytes: int
    """The part of it that was there before the first step. The rest grows with the batch."""
    exporting_s: float | None = None
    """Seconds of writing and measuring the student's files; null after a probe, which writes none, and in reports of
    earlier versions."""


class ProbeRequest(Facts):
    """The argument of `python -m kdcore inspect cost`: a resolved spec and the facts of its data."""

    spec: JobSpec
    dataset: DatasetFacts
    threads: int | None = None
    """CPU threads; null for torch's default."""


@dataclass(frozen=True)
class Prediction:
    """What a job will cost."""

    basis: Basis
    device_kind: DeviceKind
    device: str
    """The device that was measured: `cpu, 2 threads` or `cuda, NVIDIA H200`."""
    seconds_by_phase: Mapping[str, float | None]
    memory_bytes: int
    memory_fixed_bytes: int
    batch_size: int

    @property
    def seconds(self) -> float:
        """The sum over the phases that are known."""
        return sum(seconds or 0.0 for seconds in self.seconds_by_phase.values())

    def largest_batch(self, memory_bytes: int) -> int | None:
        """Return the largest even batch that fits into this memory; None if none does."""
        of_an_image = (self.memory_bytes - self.memory_fixed_bytes) / self.batch_size
        if of_an_image <= 0:
            return None
        images = int((memory_bytes - self.memory_fixed_bytes) / of_an_image)
        return images // 2 * 2 if images >= 2 else None


def cost_keys(spec: JobSpec, known: Known, devices: Iterable[DeviceKind] = DEVICE_KINDS) -> list[str]:
    """Return all keys under which the cost of a resolved spec may have been kept."""
    keys = (key for device in devices for one in _parts(spec, known, device) for key in one.keys)
    return list(dict.fromkeys(keys))


def cost_rows(spec: JobSpec, known: Known, cost: JobCost) -> dict[str, dict[str, Any]]:
    """Return what to keep of a measured job: figures by key. A stage without figures is left out."""
    rows: dict[str, dict[str, Any]] = {}
    measured = cost.model_dump(mode="json")
    shared = {name: measured[name] for name in ("basis", "device", "device_name", "threads")}
    shared["batch_size"] = spec.training.batch_size
    of_job = {name: measured[name] for name in _OF_JOB}
    of_files = None if cost.exporting_s is None else {"exporting_s": cost.exporting_s}
    for part in _parts(spec, known, cost.device):
        figures = {"job": of_job, "files": of_files}.get(part.what, measured["stages"].get(part.name))
        for key in part.keys if figures is not None else ():
            rows[key] = {**shared, **figures}
    return rows


def predict(
    spec: JobSpec, known: Known, rows: Mapping[str, Mapping[str, Any]], device: DeviceKind
) -> Prediction | None:
    """Return what a resolved spec will cost on a kind of device, from rows by key; None if a part of its training or
    evaluation was not measured. Phases that no probe has are null where no job has measured them."""
    dataset = known.dataset
    assert dataset is not None, "a resolved spec has a data set"
    held_out = images_held_out(dataset, spec.training)
    training_s = evaluating_s = 0.0
    exporting_s: float | None = None
    used = []
    for part in _parts(spec, known, device):
        row = part.of(rows)
        if part.what == "files":
            exporting_s = None if row is None else row["exporting_s"]
            continue
        if row is None:
            return None
        used.append(row)
        scale = spec.training.batch_size / row["batch_size"]
        if part.what == "job":
            evaluating_s += row["test_image_s"] * dataset.test
            fixed = row["memory_fixed_bytes"]
            memory = fixed + round((row["memory_bytes"] - fixed) * scale)
            preparing_s = row["preparing_s"] if part.keys[0] in rows else None
        else:
            training_s += row["step_s"] * scale * part.steps
            evaluating_s += row["held_out_image_s"] * held_out * part.epochs
    last = used[-1]
    name = f"{last['threads']} thread{'s' * (last['threads'] > 1)}" if device == "cpu" else last["device_name"]
    return Prediction(
        basis="probe" if any(row["basis"] == "probe" for row in used) else "measured",
        device_kind=device,
        device=f"{device}, {name}",
        seconds_by_phase={
            "preparing": preparing_s,
            "training": training_s,
            "evaluating": evaluating_s,
            "exporting": exporting_s,
        },
        memory_bytes=memory,
        memory_fixed_bytes=fixed,
        batch_size=spec.training.batch_size,
    )


def least_memory(student_parameters: int, teacher_parameters: int, frozen_parameters: int = 0) -> int:
    """Return the bytes that a job needs at least: its weights, without activations and without the engine itself.

    Frozen parameters of the student have neither gradients nor a momentum.
    """
    student = TENSORS_OF_A_STUDENT * student_parameters - (TENSORS_OF_A_STUDENT - 2) * frozen_parameters
    return 4 * (student + teacher_parameters)


_OF_JOB = ("preparing_s", "test_image_s", "memory_bytes", "memory_fixed_bytes")


@dataclass(frozen=True)
class _Part:
    """What a job is put together of: the epochs of a stage that cost the same, the whole job, or its files."""

    what: Literal["stage", "job", "files"]
    keys: tuple[str, ...]
    """The exact one, then the one from which seconds are scaled, if there is one."""
    name: str = ""
    """Of a stage's epochs, in the `stages` of a JobCost."""
    steps: int = 0
    epochs: int = 0

    def of(self, rows: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
        return next((rows[key] for key in self.keys if key in rows), None)


def _parts(spec: JobSpec, known: Known, device: DeviceKind) -> Iterator[_Part]:
    """Yield every stage, its epochs in float and those that train for int8; then the files, and the whole job."""
    dataset = known.dataset
    assert dataset is not None, "a resolved spec has a data set"
    batch = {"batch_size": spec.training.batch_size}
    shared = {
        "version": VERSION,
        "device": device,
        # What auto means depends on the device itself.
        "precision": spec.training.precision,
        **({} if spec.training.kernels == "auto" else {"kernels": spec.training.kernels}),
        "image": [dataset.channels, *dataset.image_size],
        # A classifier of some classes more or less costs the same.
        "classes": dataset.num_classes.bit_length(),
        "optimizer": spec.training.optimizer.name,
        "augmentation": _augmentation(spec.training, dataset),
        "mix": spec.training.mix.name if spec.training.mix else None,
        "ema": spec.training.ema is not None,
        "batch_norm": spec.training.batch_norm,
    }
    planned = trials(spec, dataset, known.unlabelled)
    of_stages = []
    for stage, facts in (_stage(spec, dataset, trial, one, planned) for trial in planned for one in trial.stages):
        for each, name, epochs in _in_float_and_int8(stage, facts):
            of_stages.append(each)
            keys = (_digest({**shared, **each, **batch}), _digest({**shared, **each}))
            yield _Part("stage", keys, name, stage.steps * epochs // stage.epochs, epochs)
    yield _Part("files", (_digest(_files(spec, dataset, device)),))
    job = {
        **shared,
        "teachers": [_network(teacher, dataset) for teacher in spec.teachers],
        "stages": of_stages,
        "baseline": spec.baseline == "none" or spec.trains_baseline,
    }
    options = spec.dataset.deciding()
    named = [spec.dataset.source, options.pop("image_size", None)]
    data = {"dataset": [*named, options] if options else named}
    yield _Part("job", (_digest({**job, **batch, **data}), _digest(job)))


def _in_float_and_int8(stage: Stage, facts: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, int]]:
    """Yield what decides the cost of a stage's steps, with the name and the number of the epochs that have such steps:
    a step that rounds takes about twice the time, so that none of the two kinds says what the other costs."""
    if stage.epochs > stage.aware_epochs:
        yield facts, stage.name, stage.epochs - stage.aware_epochs
    if stage.aware_epochs:
        yield {**facts, "int8": True}, stage.aware_name, stage.aware_epochs


def _files(spec: JobSpec, dataset: DatasetFacts, device: DeviceKind) -> dict[str, Any]:
    """Return what decides the cost of writing a student's files and of measuring each on the test images."""
    return {
        "version": VERSION,
        "device": device,
        "files": sorted({"safetensors", *spec.export}),
        # The tolerance is compared, when all is measured.
        "export_options": spec.export_options.model_dump(mode="json", exclude={"tolerance"}),
        "students": [student.architecture for student in spec.students],
        "members": spec.scheme.generations if spec.scheme.ensemble_is_result else 1,
        "image": [dataset.channels, *dataset.image_size],
        "classes": dataset.num_classes.bit_length(),
        "test": dataset.test,
        # The weights before the epochs for int8 are exported and measured, too.
        "int8": aware_epochs(spec) > 0,
    }


def _stage(
    spec: JobSpec, dataset: DatasetFacts, trial: Trial, stage: Stage, planned: Iterable[Trial]
) -> tuple[Stage, dict[str, Any]]:
    """Return a stage with what decides the cost of its steps, beside what all stages of a job share."""
    if trial.taught_by == GIVEN:
        teachers = [_network(teacher, dataset) for teacher in spec.teachers]
    else:
        teachers = [one.students[0].architecture for one in planned if one.name == trial.taught_by]
    methods = trial.methods if stage.method is None else (stage.method,)
    frozen = [list(student.freeze) for student in trial.students]
    return stage, {
        **({"frozen": frozen} if any(frozen) else {}),
        "students": [student.architecture for student in trial.students],
        "teachers": teachers,
        "methods": [method.model_dump(mode="json", exclude=NOT_OF_A_STEP) for method in methods],
        "first_stage": stage.method is not None,
    }


def _augmentation(training: Training, dataset: DatasetFacts) -> str | None:
    """Return what decides the cost of views: the augmentation, and the size of the pictures that boxes are cut from, if
    that is not the data's."""
    if training.augmentation is None:
        return None
    name, side = training.augmentation.name, getattr(training.augmentation, "store_size", None)
    return name if side is None or dataset.image_size == (side, side) else f"{name} from {side}"


def _network(teacher: Teacher, dataset: DatasetFacts) -> str | None:
    """Return what decides a teacher's cost: its architecture, or the program or published weights that it names; and
    its image size, if that is not the data's."""
    name = teacher.architecture or teacher.program or teacher.logits or teacher.checkpoint
    side = teacher.image_size
    return name if side is None or dataset.image_size == (side, side) else f"{name} at {side}"


def _digest(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
