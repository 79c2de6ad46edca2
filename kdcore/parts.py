"""The parts of a job, built once and shared by its trials: the data, the frozen teacher, the device, and the spec with
nothing left to guess."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kdcore import data, models, weights
from kdcore import device as devices
from kdcore.classifier import Classifier
from kdcore.data import Data
from kdcore.errors import SpecFaults, SpecInvalid, TeacherMismatch
from kdcore.lines import Lines
from kdcore.spec import JobSpec, fit, preprocessing, resolve
from kdcore.spec import Student as StudentSpec
from kdcore.spec import Teacher as TeacherSpec
from kdcore.teacher import FrozenTeacher
from kdcore.weights import TeacherFile

log = logging.getLogger("kdcore")


@dataclass
class Place:
    """Where a run reads and writes: its folder, its inputs by reference, the cache of decoded data, its lines, and
    the wish that it stop."""

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
    device: torch.device
    bf16: bool
    teacher: FrozenTeacher | None
    baseline: FrozenTeacher | None
    """The student alone, where an earlier job has trained it: frozen too, only measured."""

    def student(self) -> Classifier:
        """A fresh student, its weights drawn from torch's generator as it stands."""
        spec, facts = self.spec.student, self.data.facts
        assert spec.preprocessing is not None, "resolve() gives every student its normalisation"
        network = models.build(spec.architecture, facts.num_classes, facts.channels)
        return Classifier(network, spec.preprocessing.mean, spec.preprocessing.std, bf16=self.bf16).to(self.device)


def build(spec: JobSpec, place: Place) -> Parts:
    """Read the data and the teacher, hold the spec against both, and spell out its defaults."""
    place.lines.phase("preparing")
    loaded = data.load(spec.dataset, place.source(spec.dataset.source), place.cache)
    file = _teacher_file(spec.teacher, loaded, place) if spec.teacher else None
    _refuse_misfits(spec, loaded, file)
    spec = resolve(spec, loaded.facts, file.facts if file else None)
    device = devices.choose(spec.training)
    devices.make_exact(spec.training.seed)
    bf16 = devices.bf16(spec.training, device)
    teacher = _frozen(spec.teacher, loaded, file, bf16).to(device) if spec.teacher and file else None
    alone = _baseline(spec, loaded, place, bf16)
    facts = loaded.facts
    log.info(
        "torch %s on %s, %d threads, %s", torch.__version__, device, torch.get_num_threads(), "bf16" if bf16 else "fp32"
    )
    log.info("%d training and %d test images of %d classes", facts.train, facts.test, facts.num_classes)
    return Parts(spec, loaded.to(device), device, bf16, teacher, alone.to(device) if alone else None)


def _refuse_misfits(spec: JobSpec, loaded: Data, file: TeacherFile | None) -> None:
    fields = {name: getattr(spec, name) for name in JobSpec.model_fields}
    faults = fit(fields, loaded.facts, file.facts if file else None, None)
    if any(fault.code == "teacher_mismatch" for fault in faults):
        raise TeacherMismatch(str(SpecFaults(faults)))
    if faults:
        raise SpecFaults(faults)


def _teacher_file(spec: TeacherSpec, loaded: Data, place: Place) -> TeacherFile:
    kind, _, name = spec.checkpoint.partition(":")
    if kind == "weights":
        return weights.published(name)
    path = place.source(spec.checkpoint)
    assert path is not None, "every reference but a built-in name has a file"
    return weights.open_teacher(path, spec.architecture, loaded.facts.channels)


def _baseline(spec: JobSpec, loaded: Data, place: Place, bf16: bool) -> FrozenTeacher | None:
    """The student that an earlier job trained alone. Raises SpecInvalid where it is another network."""
    if spec.baseline in ("none", "train"):
        return None
    path = place.source(spec.baseline)
    assert path is not None, "every reference but a built-in name has a file"
    file = weights.open_teacher(path, None, loaded.facts.channels)
    if (file.facts.architecture, file.facts.num_classes) != (spec.student.architecture, loaded.facts.num_classes):
        raise SpecInvalid(f"the baseline is a {file.facts.architecture} of {file.facts.num_classes} classes")
    own = spec.student.model_copy(update={"preprocessing": preprocessing(file.facts, loaded.facts)})
    return _frozen(own, loaded, file, bf16)


def _frozen(spec: TeacherSpec | StudentSpec, loaded: Data, file: TeacherFile, bf16: bool) -> FrozenTeacher:
    assert spec.architecture is not None and spec.preprocessing is not None, "resolve() names both"
    network = models.build(spec.architecture, loaded.facts.num_classes, loaded.facts.channels)
    weights.load_into(network, file.state, f"the file of {spec.architecture}")
    return FrozenTeacher(Classifier(network, spec.preprocessing.mean, spec.preprocessing.std, bf16=bf16))
