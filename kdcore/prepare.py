"""A job's inputs, prepared once and shared by its trials: data, teacher, device, and the spec with its defaults."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from base.errors import SpecFaults, SpecInvalid, TeacherMismatch, WarningRefused
from base.files import Written
from base.warning import WarningItem, refused_if_strict
from kdcore import data, models, weights
from kdcore import device as devices
from kdcore.catalog import ArchitectureFacts
from kdcore.classifier import Classifier, FrozenTeacher, TeacherEnsemble
from kdcore.data.images import Data, Images, TrainingSet
from kdcore.lesson import Teacher
from kdcore.programs import Program, open_program
from kdcore.protocol import NOTHING_KNOWN, KnownBefore, Lines
from kdcore.spec import Dataset, JobSpec, Known, Trial, each_teacher, fit, preprocessing, resolve, spec_warnings, trials
from kdcore.spec import Student as StudentSpec
from kdcore.spec import Teacher as TeacherSpec
from kdcore.spec.fitting import class_order
from kdcore.weights import TeacherFile

log = logging.getLogger("kdcore")


@dataclass
class Workspace:
    """The files and streams of a run: its folder, input files by reference, the cache of decoded data, and its
    JSON lines. `stop_requested` is set by SIGTERM."""

    out: Path
    inputs: Mapping[str, Path]
    cache: Path
    lines: Lines
    known: KnownBefore = NOTHING_KNOWN
    stop_requested: bool = False
    warnings: list[WarningItem] = field(init=False)
    """All warnings of the job so far; the report lists them."""

    def __post_init__(self) -> None:
        self.warnings = list(self.known.warnings)

    def warn(self, warning: WarningItem) -> None:
        """Add a warning, and emit it, unless the job has it already."""
        if warning not in self.warnings:
            self.warnings.append(warning)
            self.lines.warning(warning)

    def source(self, reference: str) -> Path | None:
        """Return the file of a reference; None for a built-in name. Raises SpecInvalid if the file was not given."""
        if reference in self.inputs:
            return self.inputs[reference]
        kind, _, rest = reference.partition(":")
        if kind == "file":
            return Path(rest)
        if rest:
            raise SpecInvalid(f"{reference} is not among the inputs", hint=f"add --input {reference}=PATH")
        return None

    def announce(self, event: str, written: Written, **fields: Any) -> None:
        """Emit a line about a file in the folder."""
        relative = str(written.path.relative_to(self.out))
        self.lines.emit(event, path=relative, bytes=written.bytes, sha256=written.sha256, **fields)

    def file(self, reference: str) -> Path:
        """Return the file of a reference that is not a built-in name."""
        path = self.source(reference)
        assert path is not None, "every reference but a built-in name has a file"
        return path


@dataclass
class PreparedJob:
    """A job with its inputs read and its defaults resolved."""

    spec: JobSpec
    trials: tuple[Trial, ...]
    known: Known
    data: Data
    unlabelled: Images | None
    device: torch.device
    bf16: bool
    teacher: Teacher | None
    baseline: Classifier | None
    """The student that an earlier job trained alone. It is only measured."""

    def student(self, spec: StudentSpec) -> Classifier:
        """Return an untrained student, with weights drawn from torch's generator."""
        facts = self.data.facts
        assert spec.preprocessing is not None, "resolve() gives every student its normalisation"
        network = models.build(spec.architecture, facts.num_classes, facts.channels)
        return Classifier(network, spec.preprocessing.mean, spec.preprocessing.std, bf16=self.bf16).to(self.device)

    def training_set(self, trial: Trial) -> TrainingSet:
        """Return the images that a trial learns from; the baseline never gets the unlabelled ones."""
        labelled = TrainingSet.of(self.data.train, self.spec.training, self.data.val)
        if self.unlabelled is None or self.spec.unlabelled is None or trial.name == "alone":
            return labelled.to(self.device)
        return labelled.with_unlabelled(self.unlabelled, self.spec.unlabelled).to(self.device)


def prepare(spec: JobSpec, workspace: Workspace) -> PreparedJob:
    """Read the data and the teachers, compare the spec with both, and fill in its defaults."""
    workspace.lines.phase("preparing")
    loaded = data.load(spec.dataset, workspace.source(spec.dataset.source), workspace.cache)
    facts, unlabelled = loaded.facts, _unlabelled(spec, loaded, workspace)
    files = {pointer: _teacher_file(one, loaded, workspace) for pointer, one in each_teacher({"teacher": spec.teacher})}
    known = Known(
        dataset=facts,
        unlabelled=None if unlabelled is None else facts.model_copy(update={"train": len(unlabelled), "test": 0}),
        teachers={pointer: file.facts for pointer, file in files.items()},
        inspected=_inspected(spec, loaded, files),
    )
    faults = fit({name: getattr(spec, name) for name in JobSpec.model_fields}, known)
    if any(fault.code == "teacher_mismatch" for fault in faults):
        raise TeacherMismatch(str(SpecFaults(faults)))
    if faults:
        raise SpecFaults(faults)
    for warning in spec_warnings(spec, known):
        workspace.warn(warning)
    refuse_if_strict(spec, workspace)
    spec = resolve(spec, known)
    device = devices.choose(spec.training)
    devices.make_exact(spec.training.seed)
    bf16 = devices.bf16(spec.training, device)
    teacher = _teacher(spec, loaded, files, bf16)
    baseline = _baseline(spec, loaded, workspace, bf16)
    precision = "bf16" if bf16 else "fp32"
    log.info("torch %s on %s, %d threads, %s", torch.__version__, device, torch.get_num_threads(), precision)
    log.info("%d training and %d test images of %d classes", facts.train, facts.test, facts.num_classes)
    if unlabelled is not None:
        log.info("%d images without labels", len(unlabelled))
    return PreparedJob(
        spec=spec,
        trials=trials(spec, facts, known.unlabelled),
        known=known,
        data=loaded,
        unlabelled=unlabelled,
        device=device,
        bf16=bf16,
        teacher=teacher.to(device) if teacher else None,
        baseline=baseline.to(device) if baseline else None,
    )


def refuse_if_strict(spec: JobSpec, workspace: Workspace) -> None:
    """Raise WarningRefused if the spec is strict and a warning is known before the training."""
    refused = refused_if_strict(workspace.warnings) if spec.strict else []
    if refused:
        raise WarningRefused("; ".join(f"{one.code}: {one.message}" for one in refused), refused[0].hint)


def _unlabelled(spec: JobSpec, loaded: Data, workspace: Workspace) -> Images | None:
    if spec.unlabelled is None:
        return None
    source = Dataset.of(spec.unlabelled.source, spec.dataset.for_unlabelled())
    return data.load_unlabelled(source, workspace.source(source.source), workspace.cache, loaded.facts)


def _teacher_file(spec: TeacherSpec, loaded: Data, workspace: Workspace) -> TeacherFile | Program:
    reference = spec.program or spec.checkpoint
    assert reference is not None, "rules refuse a teacher without a file"
    if reference.startswith("weights:"):
        return weights.published(reference.removeprefix("weights:"))
    if spec.program is not None:
        return open_program(workspace.file(reference), loaded.facts)
    choice = weights.chosen(spec, workspace.known)
    return weights.open_teacher(workspace.file(reference), spec.architecture, loaded.facts.channels, choice)


def _inspected(spec: JobSpec, loaded: Data, files: Mapping[str, TeacherFile | Program]) -> dict[str, ArchitectureFacts]:
    """Return the facts of timm's networks if a method has no taps yet. The networks must be built for that."""
    if not any(method.places_are_open for method in spec.methods):
        return {}
    facts = loaded.facts
    names = {student.architecture for student in spec.students} | {file.facts.architecture for file in files.values()}
    return {
        name: models.inspect(name, facts.num_classes, facts.channels, facts.image_size)
        for name in sorted(names)
        if name.startswith("timm/")
    }


def _teacher(
    spec: JobSpec, loaded: Data, files: Mapping[str, TeacherFile | Program], bf16: bool
) -> FrozenTeacher | TeacherEnsemble | None:
    """Return the teacher; several become one."""
    specs = list(each_teacher({"teacher": spec.teacher}))
    each = [FrozenTeacher(_classifier(teacher, loaded, files[pointer], bf16)) for pointer, teacher in specs]
    if len(each) < 2:
        return each[0] if each else None
    shares = [teacher.weight if teacher.weight is not None else 1.0 for _, teacher in specs]
    return TeacherEnsemble(each, shares, spec.temperature or 1.0)


def _baseline(spec: JobSpec, loaded: Data, workspace: Workspace, bf16: bool) -> Classifier | None:
    """Return the student that an earlier job trained alone. Raises SpecInvalid if it is another network."""
    if spec.baseline in ("none", "train"):
        return None
    student = spec.students[0]
    file = weights.open_teacher(workspace.file(spec.baseline), None, loaded.facts.channels)
    if (file.facts.architecture, file.facts.num_classes) != (student.architecture, loaded.facts.num_classes):
        raise SpecInvalid(f"the baseline is a {file.facts.architecture} of {file.facts.num_classes} classes")
    own = student.model_copy(update={"preprocessing": preprocessing(file.facts, loaded.facts)})
    return _classifier(own, loaded, file, bf16)


def _classifier(spec: TeacherSpec | StudentSpec, loaded: Data, file: TeacherFile | Program, bf16: bool) -> Classifier:
    assert spec.preprocessing is not None, "resolve() gives every model its normalisation"
    mean, std = spec.preprocessing.mean, spec.preprocessing.std
    order = class_order(spec.class_names, loaded.facts) if isinstance(spec, TeacherSpec) else None
    if isinstance(file, Program):
        # A program's graph sets its precision itself.
        return Classifier(file, mean, std, order=order)
    assert spec.architecture is not None, "resolve() names every teacher's architecture"
    network = models.build(spec.architecture, loaded.facts.num_classes, loaded.facts.channels)
    weights.load_into(network, file.state, f"the file of {spec.architecture}")
    return Classifier(network, mean, std, bf16=bf16, order=order)
