"""The parts of a job, built once and shared by its trials: the data, the frozen teacher, the device, and the spec with
nothing left to guess."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from base.errors import SpecFaults, SpecInvalid, TeacherMismatch
from kdcore import data, models, weights
from kdcore import device as devices
from kdcore.catalog import ArchitectureFacts, DatasetFacts
from kdcore.classifier import Classifier
from kdcore.data import Data, Images, Material, material, with_unlabelled
from kdcore.lines import Lines
from kdcore.programs import Program, open_program
from kdcore.spec import Dataset, JobSpec, Known, Trial, each_teacher, fit, preprocessing, resolve
from kdcore.spec import Student as StudentSpec
from kdcore.spec import Teacher as TeacherSpec
from kdcore.teacher import FrozenTeacher, Teacher, TeacherEnsemble
from kdcore.weights import TeacherFile

log = logging.getLogger("kdcore")


@dataclass
class Place:
    """Where a run reads and writes: its folder, its inputs by reference, the cache of decoded data, its lines, and
    a request to stop."""

    out: Path
    inputs: Mapping[str, Path]
    cache: Path
    lines: Lines
    stop_asked: bool = False

    def source(self, reference: str) -> Path | None:
        """The file that a reference stands for; None for a built-in name. Raises SpecInvalid for one not given."""
        if reference in self.inputs:
            return self.inputs[reference]
        kind, _, rest = reference.partition(":")
        if kind == "file":
            return Path(rest)
        if rest:
            raise SpecInvalid(f"{reference} is not among the inputs", hint=f"add --input {reference}=PATH")
        return None


@dataclass
class Parts:
    spec: JobSpec
    data: Data
    unlabelled: Images | None
    device: torch.device
    bf16: bool
    teacher: Teacher | None
    baseline: FrozenTeacher | None
    """The student alone, where an earlier job has trained it: frozen too, only measured."""
    known: Known

    def fresh(self, spec: StudentSpec) -> Classifier:
        """A student as it begins, its weights drawn from torch's generator as it stands."""
        facts = self.data.facts
        assert spec.preprocessing is not None, "resolve() gives every student its normalisation"
        network = models.build(spec.architecture, facts.num_classes, facts.channels)
        return Classifier(network, spec.preprocessing.mean, spec.preprocessing.std, bf16=self.bf16).to(self.device)

    def material(self, trial: Trial) -> Material:
        """What a trial learns from: only the baseline never sees the unlabelled images."""
        labelled = material(self.data.train, self.spec.training)
        if self.unlabelled is None or self.spec.unlabelled is None or trial.name == "alone":
            return labelled.to(self.device)
        return with_unlabelled(labelled, self.unlabelled, self.spec.unlabelled).to(self.device)


def build(spec: JobSpec, place: Place) -> Parts:
    """Read the data and the teachers, hold the spec against both, and spell out its defaults."""
    place.lines.phase("preparing")
    loaded = data.load(spec.dataset, place.source(spec.dataset.source), place.cache)
    unlabelled = _unlabelled(spec, loaded, place)
    files = _teacher_files(spec, loaded, place)
    known = Known(
        dataset=loaded.facts,
        unlabelled=_pool_facts(loaded.facts, unlabelled),
        teachers={pointer: file.facts for pointer, file in files.items()},
        inspected=_inspected(spec, loaded, files),
    )
    _refuse_misfits(spec, known)
    spec = resolve(spec, known)
    device = devices.choose(spec.training)
    devices.make_exact(spec.training.seed)
    bf16 = devices.bf16(spec.training, device)
    teacher = _teacher(spec, loaded, files, bf16)
    alone = _baseline(spec, loaded, place, bf16)
    facts = loaded.facts
    log.info(
        "torch %s on %s, %d threads, %s", torch.__version__, device, torch.get_num_threads(), "bf16" if bf16 else "fp32"
    )
    log.info("%d training and %d test images of %d classes", facts.train, facts.test, facts.num_classes)
    if unlabelled is not None:
        log.info("%d images without labels", len(unlabelled))
    return Parts(
        spec=spec,
        data=loaded,
        unlabelled=unlabelled,
        device=device,
        bf16=bf16,
        teacher=teacher.to(device) if teacher else None,
        baseline=alone.to(device) if alone else None,
        known=known,
    )


def _refuse_misfits(spec: JobSpec, known: Known) -> None:
    faults = fit({name: getattr(spec, name) for name in JobSpec.model_fields}, known)
    if any(fault.code == "teacher_mismatch" for fault in faults):
        raise TeacherMismatch(str(SpecFaults(faults)))
    if faults:
        raise SpecFaults(faults)


def _unlabelled(spec: JobSpec, loaded: Data, place: Place) -> Images | None:
    if spec.unlabelled is None:
        return None
    source = Dataset(source=spec.unlabelled.source, image_size=spec.dataset.image_size)
    return data.load_unlabelled(source, place.source(source.source), place.cache, loaded.facts)


def _pool_facts(dataset: DatasetFacts, pool: Images | None) -> DatasetFacts | None:
    return None if pool is None else dataset.model_copy(update={"train": len(pool), "test": 0})


def _teacher_files(spec: JobSpec, loaded: Data, place: Place) -> dict[str, TeacherFile | Program]:
    """Each teacher's file by its pointer in the spec."""
    fields = {"teacher": spec.teacher}
    return {pointer: _teacher_file(teacher, loaded, place) for pointer, teacher in each_teacher(fields)}


def _teacher_file(spec: TeacherSpec, loaded: Data, place: Place) -> TeacherFile | Program:
    reference = spec.program or spec.checkpoint
    assert reference is not None, "rules ask each teacher for a file"
    if reference.startswith("weights:"):
        return weights.published(reference.removeprefix("weights:"))
    path = place.source(reference)
    assert path is not None, "every reference but a built-in name has a file"
    if spec.program is not None:
        return open_program(path, loaded.facts)
    return weights.open_teacher(path, spec.architecture, loaded.facts.channels)


def _inspected(spec: JobSpec, loaded: Data, files: Mapping[str, TeacherFile | Program]) -> dict[str, ArchitectureFacts]:
    """Networks whose taps only building can tell: those of timm, where a method still looks for its taps."""
    if not any(method.places_are_open for method in spec.methods):
        return {}
    facts = loaded.facts
    names = {student.architecture for student in spec.students} | {file.facts.architecture for file in files.values()}
    return {
        name: models.inspect(name, facts.num_classes, facts.channels, facts.image_size)
        for name in sorted(names)
        if name.startswith("timm/")
    }


def _teacher(spec: JobSpec, loaded: Data, files: Mapping[str, TeacherFile | Program], bf16: bool) -> Teacher | None:
    """The teacher; several as one."""
    each = [
        (teacher, _frozen(teacher, loaded, files[pointer], bf16))
        for pointer, teacher in each_teacher({"teacher": spec.teacher})
    ]
    if len(each) < 2:
        return each[0][1] if each else None
    weights_given = [teacher.weight if teacher.weight is not None else 1.0 for teacher, _ in each]
    return TeacherEnsemble([frozen for _, frozen in each], weights_given, spec.temperature or 1.0)


def _baseline(spec: JobSpec, loaded: Data, place: Place, bf16: bool) -> FrozenTeacher | None:
    """The student that an earlier job trained alone. Raises SpecInvalid where it is another network."""
    if spec.baseline in ("none", "train"):
        return None
    student = spec.students[0]
    path = place.source(spec.baseline)
    assert path is not None, "every reference but a built-in name has a file"
    file = weights.open_teacher(path, None, loaded.facts.channels)
    if (file.facts.architecture, file.facts.num_classes) != (student.architecture, loaded.facts.num_classes):
        raise SpecInvalid(f"the baseline is a {file.facts.architecture} of {file.facts.num_classes} classes")
    own = student.model_copy(update={"preprocessing": preprocessing(file.facts, loaded.facts)})
    return _frozen(own, loaded, file, bf16)


def _frozen(spec: TeacherSpec | StudentSpec, loaded: Data, file: TeacherFile | Program, bf16: bool) -> FrozenTeacher:
    assert spec.preprocessing is not None, "resolve() gives every model its normalisation"
    mean, std = spec.preprocessing.mean, spec.preprocessing.std
    if isinstance(file, Program):
        # A program's graph names its precision itself.
        return FrozenTeacher(Classifier(file, mean, std))
    assert spec.architecture is not None, "resolve() names every teacher's architecture"
    network = models.build(spec.architecture, loaded.facts.num_classes, loaded.facts.channels)
    weights.load_into(network, file.state, f"the file of {spec.architecture}")
    return FrozenTeacher(Classifier(network, mean, std, bf16=bf16))
