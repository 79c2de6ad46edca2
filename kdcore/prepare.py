"""A job's inputs, prepared once and shared by its trials: data, teacher, device, and the spec with its defaults."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from base.data_cache import TEACHER_MAX_BYTES
from base.errors import SpecFaults, SpecInvalid, TeacherMismatch, WarningRefused
from base.files import Written, sha256_of
from base.warning import WarningItem, refused_if_strict
from kdcore import data, models, weights
from kdcore import device as devices
from kdcore.catalog import ArchitectureFacts, DatasetFacts, ModelFacts
from kdcore.classifier import Classifier, FrozenTeacher, TeacherEnsemble
from kdcore.data.decoding import Split
from kdcore.data.images import Data, Images, TrainingSet
from kdcore.device import Computing
from kdcore.lesson import Teacher
from kdcore.programs import Program, is_program, open_program
from kdcore.protocol import NOTHING_KNOWN, KnownBefore, Lines
from kdcore.spec import (
    GIVEN,
    Dataset,
    JobSpec,
    Known,
    RandomResizedCrop,
    Training,
    Trial,
    each_start,
    each_student,
    each_teacher,
    fit,
    preprocessing,
    resolve,
    spec_warnings,
    start_summary,
    tags_without_weights,
    trials,
)
from kdcore.spec import Student as StudentSpec
from kdcore.spec import Teacher as TeacherSpec
from kdcore.spec.classes import answers_classes, class_order, outputs_of_map
from kdcore.spec.fitting import size_shown, teacher_size
from kdcore.stored_logits import LogitsFile, StoredLogits, open_logits
from kdcore.weights import TeacherFile, published, starting
from kdcore.weights.starting import Shape, Start

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
    cache_max_bytes: int | None = None
    """What the cache may hold; None: as much as its disk."""
    teacher_cache_max_bytes: int = TEACHER_MAX_BYTES
    """What the stored outputs of all teachers may take of it."""
    stop_requested: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    """Of this attempt, by activity (`cost.ACTIVITIES`), until the job has a meter."""
    warnings: list[WarningItem] = field(init=False)
    """All warnings of the job so far; the report lists them."""

    def __post_init__(self) -> None:
        self.warnings = list(self.known.warnings)

    def warn(self, warning: WarningItem) -> None:
        """Add a warning, and emit it, unless the job has it already."""
        if warning not in self.warnings:
            self.warnings.append(warning)
            self.lines.warning(warning)

    @contextmanager
    def timing(self, activity: str) -> Iterator[None]:
        """Add the seconds of a `with` block to those of an activity."""
        began = time.monotonic()
        yield
        self.seconds[activity] = self.seconds.get(activity, 0.0) + time.monotonic() - began

    def room(self, pointer: str = "/dataset") -> data.Room:
        """Return the room for the decoded data set at a place in the spec."""
        return data.Room(self.cache_max_bytes, self._warn_once, pointer, self.lines.working, self.lines.waiting)

    def _warn_once(self, warning: WarningItem) -> None:
        """Warn, unless the job has a warning of this code and place: its figures are others on each host."""
        if (warning.code, warning.pointer) not in {(one.code, one.pointer) for one in self.warnings}:
            self.warn(warning)

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
    computing: Computing
    teacher: Teacher | None
    baseline: Classifier | None
    """The student that an earlier job trained alone. It is only measured."""
    starts: dict[str, Start] = field(default_factory=dict)
    """What students and assistants start from, by their pointers in the spec."""
    load: devices.LoadWatch = field(default_factory=lambda: devices.LoadWatch(1, adapts=False))
    """What adapts the threads to other processes while the job runs."""
    teacher_answers: bool = True
    """False if the teacher has other classes than the data, so that its accuracy cannot be measured."""

    @property
    def device(self) -> torch.device:
        return torch.device(self.computing.device)

    @property
    def stored(self) -> StoredLogits | None:
        """The teacher, if it is a file of logits."""
        return self.teacher if isinstance(self.teacher, StoredLogits) else None

    def start(self, spec: StudentSpec) -> Start | None:
        """Return what a student or an assistant starts from; None for random weights."""
        return next(
            (self.starts[at] for at, one in each_start(vars(self.spec)) if one == spec and at in self.starts), None
        )

    def student(self, spec: StudentSpec) -> Classifier:
        """Return an untrained student, with weights drawn from torch's generator. What is to be frozen is frozen."""
        facts = self.data.facts
        assert spec.preprocessing is not None, "resolve() gives every student its normalisation"
        network = models.build(spec.architecture, facts.num_classes, facts.channels)
        starting.freeze(network, Shape(spec.architecture, facts.num_classes, facts.channels, spec.freeze))
        return Classifier(network, spec.preprocessing.mean, spec.preprocessing.std, bf16=self.computing.bf16).to(
            self.device
        )

    def keep_to_one_size(self) -> None:
        """Show every network the images of the data's own size, and cut boxes from these, as in versions without other
        sizes."""
        for member in self.teacher.members if self.teacher is not None else ():
            member.image_size = None
        teachers = tuple(teacher.model_copy(update={"image_size": None}) for teacher in self.spec.teachers)
        if teachers:
            teacher = teachers if isinstance(self.spec.teacher, tuple) else teachers[0]
            self.spec = self.spec.model_copy(update={"teacher": teacher})
        augmentation = self.spec.training.augmentation
        if isinstance(augmentation, RandomResizedCrop):
            recipe = self.spec.training.model_copy(
                update={"augmentation": augmentation.model_copy(update={"store_size": None})}
            )
            self.spec = self.spec.model_copy(update={"training": recipe})
        self.data = replace(self.data, train=self.data.train.at(None), test=self.data.test.at(None))
        self.unlabelled = None if self.unlabelled is None else self.unlabelled.at(None)

    def training_set(self, trial: Trial) -> TrainingSet:
        """Return the images that a trial learns from, with those of the teacher's size if it has the job's own teacher.
        The baseline never gets the unlabelled ones. Another run holds out the images of its own seed."""
        sides = self.data.train.sized if trial.taught_by == GIVEN else ()
        train = self.data.train.for_training(sides)
        recipe = self.spec.training.model_copy(update={"seed": self.spec.training.seed + trial.run})
        labelled = TrainingSet.of(train, recipe, self.data.val)
        if self.unlabelled is None or self.spec.unlabelled is None or trial.is_baseline:
            return labelled.to(self.device)
        unlabelled = self.unlabelled.for_training(sides)
        return labelled.with_unlabelled(unlabelled, self.spec.unlabelled).to(self.device)


def prepare(
    spec: JobSpec,
    workspace: Workspace,
    begun: Mapping[str, Start] | None = None,
    computing: Computing | None = None,
) -> PreparedJob:
    """Read the data, the teachers and what students start from, compare the spec with them, and fill in its defaults.

    `begun`: what the students of a resumed job started from, by pointer. These files are not read again.
    `computing`: how a resumed job computes; None to choose it now.
    """
    workspace.lines.phase("preparing")
    # Chosen first, since the data's mean and std are sums, too.
    if computing is None:
        computing = devices.begin(spec.training, workspace.cache)
        if spec.training.threads is not None and computing.threads < spec.training.threads:
            workspace.warn(_fewer_threads(spec.training.threads, computing.threads))
    torch.set_num_threads(computing.threads)
    is_resolved = all(student.preprocessing is not None for _, student in each_student(vars(spec)))
    if tagged := [] if is_resolved else list(tags_without_weights(vars(spec))):
        raise SpecFaults(tagged)
    with workspace.timing("data"):
        loaded = data.load(spec.dataset, workspace.source(spec.dataset.source), workspace.cache, workspace.room())
        facts, unlabelled = loaded.facts, _unlabelled(spec, loaded, workspace)
    files = {pointer: teacher_file(one, loaded, workspace) for pointer, one in each_teacher({"teacher": spec.teacher})}
    starts = _starts(spec, loaded, workspace, begun or {})
    known = Known(
        dataset=facts,
        unlabelled=None if unlabelled is None else facts.model_copy(update={"train": len(unlabelled), "test": 0}),
        teachers={pointer: file.facts for pointer, file in files.items()},
        starts={pointer: start.facts for pointer, start in starts.items()},
    )
    known = replace(known, inspected=_inspected(spec, known))
    faults = fit({name: getattr(spec, name) for name in JobSpec.model_fields}, known)
    if any(fault.code == "teacher_mismatch" for fault in faults):
        raise TeacherMismatch(str(SpecFaults(faults)))
    if faults:
        raise SpecFaults(faults)
    for warning in spec_warnings(spec, known):
        workspace.warn(warning)
    refuse_if_strict(spec, workspace)
    for pointer, student in each_start(vars(spec)):
        if pointer not in (begun or {}):
            summary = start_summary(student, starts[pointer].facts, facts)
            workspace.lines.emit("weights_taken", pointer=pointer, **summary)
            log.info("%s: %s", pointer, taken_in_words(summary))
    spec = resolve(spec, known)
    with workspace.timing("data"):
        loaded, unlabelled = _with_sizes(spec, loaded, unlabelled, workspace)
    device, bf16 = torch.device(computing.device), computing.bf16
    devices.make_exact(spec.training.seed)
    teacher = frozen_teacher(spec, loaded, files, computing)
    baseline = _baseline(spec, loaded, workspace, bf16)
    log.info("torch %s on %s", torch.__version__, computing)
    log.info("%d training and %d test images of %d classes", facts.train, facts.test, facts.num_classes)
    if unlabelled is not None:
        log.info("%d images without labels", len(unlabelled))
    return PreparedJob(
        spec=spec,
        trials=trials(spec, facts, known.unlabelled),
        known=known,
        data=loaded,
        unlabelled=unlabelled,
        computing=computing,
        load=_load_watch(computing, spec.training),
        teacher=teacher.to(device) if teacher else None,
        teacher_answers=all(
            answers_classes(one, files[pointer].facts, facts)
            for pointer, one in each_teacher({"teacher": spec.teacher})
        ),
        baseline=baseline.to(device) if baseline else None,
        starts=starts,
    )


def _load_watch(computing: Computing, training: Training) -> devices.LoadWatch:
    """Return what adapts the threads to the load. Those of a teacher beside its student are divided for good."""
    adapts = computing.device == "cpu" and not computing.overlap and not devices.threads_are_asked(training)
    return devices.LoadWatch(computing.threads, adapts=adapts)


def _fewer_threads(asked: int, taken: int) -> WarningItem:
    text = (
        f"training.threads is {asked}, but the job takes {taken}: it has no more cores, and sums are rounded otherwise"
    )
    hint = "give a number that each machine has"
    return WarningItem("bits_not_repeatable", "/training/threads", text, hint)


def taken_in_words(summary: Mapping[str, Any]) -> str:
    """Return what a student has taken from its checkpoint, for the log."""
    text = f"{summary['taken']:,} of {summary['parameters']:,} parameters are those of {summary['checkpoint']}"
    return f"{text}; the classifier is {summary['classifier']}, {summary['trained']:,} parameters are trained"


def _starts(spec: JobSpec, loaded: Data, workspace: Workspace, begun: Mapping[str, Start]) -> dict[str, Start]:
    """Return what students and assistants start from, by pointer. A checkpoint that several name is read for each."""
    found = {}
    for pointer, student in each_start(vars(spec)):
        reference = student.checkpoint or ""
        if pointer in begun:
            found[pointer] = begun[pointer]
            continue
        path = None if reference.startswith(published.PREFIX) else workspace.file(reference)
        found[pointer] = starting.open_start(student, loaded.facts, path, workspace.cache)
    return found


def refuse_if_strict(spec: JobSpec, workspace: Workspace) -> None:
    """Raise WarningRefused if the spec is strict and a warning is known before the training."""
    refused = refused_if_strict(workspace.warnings) if spec.strict else []
    if refused:
        raise WarningRefused("; ".join(f"{one.code}: {one.message}" for one in refused), refused[0].hint)


def _unlabelled(spec: JobSpec, loaded: Data, workspace: Workspace) -> Images | None:
    if spec.unlabelled is None:
        return None
    source = Dataset.of(spec.unlabelled.source, spec.dataset.for_unlabelled())
    room = workspace.room("/unlabelled")
    return data.load_unlabelled(source, workspace.source(source.source), workspace.cache, loaded.facts, room)


def teacher_file(spec: TeacherSpec, loaded: Data, workspace: Workspace) -> TeacherFile | Program | LogitsFile:
    """Open a teacher's file. Of the data, only its facts are used."""
    if spec.logits is not None:
        return open_logits(workspace.file(spec.logits))
    reference = spec.program or spec.checkpoint
    assert reference is not None, "rules refuse a teacher without a file"
    if reference.startswith(published.PREFIX):
        return _published_teacher(reference, workspace)
    path = workspace.file(reference)
    if spec.program is not None or is_program(path):
        return _program(path, spec, loaded.facts)
    choice = weights.chosen(spec, workspace.known)
    return weights.open_teacher(path, spec.architecture, loaded.facts.channels, choice)


def _published_teacher(reference: str, workspace: Workspace) -> TeacherFile:
    found = published.find(reference.removeprefix(published.PREFIX))
    path = published.fetch(found, workspace.cache)
    stated = found.facts.model_dump(exclude={"file"})
    facts = ModelFacts(**{**stated, "bytes": path.stat().st_size, "digest": f"sha256:{sha256_of(path)}"})
    return TeacherFile(facts, published.state(found, path))


def _program(path: Path, spec: TeacherSpec, facts: DatasetFacts) -> Program:
    """Open a program, and try it on images of the size that it will get."""
    program = open_program(path)
    shown = size_shown(spec.image_size, program.facts, facts)
    if program.facts.image_size == shown and program.facts.channels == facts.channels:
        return program
    return open_program(path, facts.model_copy(update={"image_size": shown}))


def own_side(teacher: TeacherSpec, facts: DatasetFacts) -> int | None:
    """Return the side of a teacher's images; None if they have the data's own size."""
    return None if (teacher.image_size, teacher.image_size) == facts.image_size else teacher.image_size


def wide_side(training: Training, facts: DatasetFacts) -> int | None:
    """Return the side of the pictures from which boxes are cut; None if they are cut from the images themselves."""
    side = getattr(training.augmentation, "store_size", None)
    return None if (side, side) == facts.image_size else side


def _with_sizes(
    spec: JobSpec, loaded: Data, unlabelled: Images | None, workspace: Workspace
) -> tuple[Data, Images | None]:
    """Return the images with those of the teachers' sizes, and those from which boxes are cut."""
    sides = {side for teacher in spec.teachers if (side := own_side(teacher, loaded.facts)) is not None}
    wide = wide_side(spec.training, loaded.facts)
    if not sides and wide is None:
        return loaded, unlabelled
    enlarged, dataset = data.enlarges(spec.dataset), spec.dataset
    source, cache = workspace.source(dataset.source), workspace.cache
    splits: dict[Split, Images] = {"train": loaded.train, "test": loaded.test}
    splits = data.with_sizes(splits, sorted(sides), wide, enlarged, dataset, source, cache, workspace.room())
    loaded = replace(loaded, train=splits["train"], test=splits["test"])
    if unlabelled is None or spec.unlabelled is None:
        return loaded, unlabelled
    pool = Dataset.of(spec.unlabelled.source, dataset.for_unlabelled())
    source = workspace.source(pool.source)
    more = data.with_sizes(
        {"train": unlabelled}, sorted(sides), wide, enlarged, pool, source, cache, workspace.room("/unlabelled")
    )
    return loaded, more["train"]


def _inspected(spec: JobSpec, known: Known) -> dict[str, ArchitectureFacts]:
    """Return the facts of timm's networks if a method has no taps yet. The networks must be built for that."""
    facts = known.dataset
    if facts is None or not any(method.places_are_open for method in spec.methods):
        return {}
    sizes = {student.architecture: facts.image_size for student in spec.students}
    for pointer, teacher in each_teacher({"teacher": spec.teacher}):
        sizes.setdefault(known.teachers[pointer].architecture, teacher_size(vars(spec), known, pointer, teacher))
    return {
        name: models.inspect(name, facts.num_classes, facts.channels, size)
        for name, size in sorted(sizes.items())
        if name.startswith("timm/")
    }


def frozen_teacher(
    spec: JobSpec, loaded: Data, files: Mapping[str, TeacherFile | Program | LogitsFile], computing: Computing
) -> FrozenTeacher | TeacherEnsemble | StoredLogits | None:
    """Return the teacher; several become one."""
    specs = list(each_teacher({"teacher": spec.teacher}))
    each = []
    for pointer, teacher in specs:
        file = files[pointer]
        if isinstance(file, LogitsFile):
            return StoredLogits(file, loaded)  # Rules refuse others beside it.
        each.append(FrozenTeacher(classifier(teacher, loaded, file, computing.bf16), computing.folded))
    if len(each) < 2:
        return each[0] if each else None
    shares = [teacher.weight if teacher.weight is not None else 1.0 for _, teacher in specs]
    return TeacherEnsemble(each, shares, spec.temperature or 1.0)


def _baseline(spec: JobSpec, loaded: Data, workspace: Workspace, bf16: bool) -> Classifier | None:
    """Return the student that an earlier job trained alone. Raises SpecInvalid if it is another network."""
    if spec.baseline == "none" or spec.trains_baseline:
        return None
    student = spec.students[0]
    file = weights.open_teacher(workspace.file(spec.baseline), None, loaded.facts.channels)
    if (file.facts.architecture, file.facts.num_classes) != (student.architecture, loaded.facts.num_classes):
        raise SpecInvalid(f"the baseline is a {file.facts.architecture} of {file.facts.num_classes} classes")
    own = student.model_copy(update={"preprocessing": preprocessing(file.facts, loaded.facts)})
    return classifier(own, loaded, file, bf16)


def classifier(spec: TeacherSpec | StudentSpec, loaded: Data, file: TeacherFile | Program, bf16: bool) -> Classifier:
    """Return the network of a resolved spec with the weights of its file, its outputs in the order of the data's
    classes. Of the data, only its facts are used."""
    assert spec.preprocessing is not None, "resolve() gives every model its normalisation"
    mean, std = spec.preprocessing.mean, spec.preprocessing.std
    order, outputs, side = None, None, None
    if isinstance(spec, TeacherSpec):
        order, outputs = class_order(spec.class_names, loaded.facts), outputs_of_map(spec, loaded.facts)
        side = own_side(spec, loaded.facts)
    if isinstance(file, Program):
        # A program's graph sets its precision itself.
        return Classifier(file, mean, std, order=order, image_size=side, outputs=outputs)
    assert spec.architecture is not None, "resolve() names every teacher's architecture"
    network = models.build(spec.architecture, file.facts.num_classes, loaded.facts.channels)
    weights.load_into(network, file.state, f"the file of {spec.architecture}")
    return Classifier(network, mean, std, bf16=bf16, order=order, image_size=side, outputs=outputs)
