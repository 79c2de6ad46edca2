"""What of teacher, student and method does not fit the data, or each other, once they have been looked up."""

from collections.abc import Iterator
from typing import Any

from kdcore.catalog import ArchitectureFacts, DatasetFacts, ModelFacts
from kdcore.errors import Fault
from kdcore.spec.known import Known
from kdcore.spec.methods import Byot, Fsp, Method, Pair
from kdcore.spec.rules import Fields, each_assistant, each_method, each_student, each_teacher
from kdcore.spec.tapping import choose, takes_taps
from kdcore.spec.vocabulary import Preprocessing, Student, Teacher, Training, Unlabelled


def fit(fields: Fields, known: Known) -> list[Fault]:
    """Every misfit that can be seen without building anything."""
    dataset = known.dataset
    if dataset is None:
        return []
    faults = [*_labelled(dataset), *_pool_fit(dataset, known.unlabelled)]
    for pointer, teacher in each_teacher(fields):
        faults += _channels(dataset, teacher, pointer)
        if pointer in known.teachers:
            faults += _teacher_fit(dataset, known.teachers[pointer], teacher, pointer)
    for pointer, student in (*each_assistant(fields), *each_student(fields)):
        faults += _channels(dataset, student, pointer)
        network = known.network(student.architecture)
        if network is not None:
            faults += _architecture_fit(dataset, network, f"{pointer}/architecture")
    faults += _taps_are_known(fields, known)
    faults += _enough_images(dataset, known.unlabelled, fields)
    return faults


def teacher_network(fields: Fields, known: Known) -> ArchitectureFacts | None:
    """The network whose activations teach: the one teacher's, or among peers and exits a student's."""
    given = each_teacher(fields)
    if not given:
        return next((known.network(student.architecture) for _, student in each_student(fields)), None)
    pointer, teacher = given[0]
    facts = known.teachers.get(pointer)
    return known.network(facts.architecture if facts else teacher.architecture)


def _taps_are_known(fields: Fields, known: Known) -> Iterator[Fault]:
    named = each_student(fields)
    student = known.network(named[0][1].architecture) if named else None
    teacher = teacher_network(fields, known)
    if student is None or teacher is None:
        return
    for pointer, method in each_method(fields):
        if not takes_taps(method):
            continue
        pairs = method.pairs or choose(method, student, teacher)
        if not pairs:
            yield _no_taps(method, pointer, student, teacher)
        elif isinstance(method, Fsp):
            yield from _widths_agree(pairs, pointer, student, teacher, known)
    for pointer, method in each_method(fields):
        if isinstance(method, Byot) and method.exits is None and len(student.taps) < 2:
            text = f"{student.name} has no known stages to leave it at; name them"
            yield Fault(f"{pointer}/exits", text, "missing", "module paths")
        if isinstance(method, Byot) and student.embedding is None:
            text = f"the classifier of {student.name} has no known input to learn from"
            yield Fault(f"{pointer}/name", text, "not_allowed", got=method.name)


def _no_taps(method: Method, pointer: str, student: ArchitectureFacts, teacher: ArchitectureFacts) -> Fault:
    field = "taps" if "taps" in type(method).model_fields else "tap"
    text = f"{method.name!r} finds no place to compare {student.name} with {teacher.name} by itself; name it"
    if method.name == "ofd":
        text += " (the teacher's needs a batch norm right before its ReLU)"
    return Fault(f"{pointer}/{field}", text, "missing", '{"student": "<module path>", "teacher": "<module path>"}')


def _widths_agree(
    pairs: tuple[Pair, ...], pointer: str, student: ArchitectureFacts, teacher: ArchitectureFacts, known: Known
) -> Iterator[Fault]:
    for pair in pairs:
        ours, theirs = _width(student, pair.student, known), _width(teacher, pair.teacher, known)
        if ours is not None and theirs is not None and ours != theirs:
            text = f"{student.name} has {ours} channels at {pair.student}, {teacher.name} {theirs} at {pair.teacher}"
            yield Fault(pointer, f"'fsp' compares channel with channel: {text}", "not_allowed", "taps of equal width")
            return


def _width(network: ArchitectureFacts, path: str, known: Known) -> int | None:
    if (network.name, path) in known.shapes:
        return known.shapes[network.name, path][0]
    return dict(zip(network.taps, network.tap_widths, strict=False)).get(path)


def _teacher_fit(dataset: DatasetFacts, facts: ModelFacts, asked: Teacher, pointer: str) -> Iterator[Fault]:
    file = f"{pointer}/program" if asked.program is not None else f"{pointer}/checkpoint"
    if asked.architecture not in (None, facts.architecture):
        text = f"the checkpoint is a {facts.architecture}"
        yield _mismatch(f"{pointer}/architecture", text, facts.architecture, asked.architecture)
    if facts.num_classes != dataset.num_classes:
        text = f"the teacher tells {facts.num_classes} classes apart, the data set has {dataset.num_classes}"
        yield _mismatch(file, text, dataset.num_classes, facts.num_classes)
    elif facts.class_names and facts.class_names != dataset.class_names:
        text = "the teacher's classes are named or ordered otherwise than the data set's"
        yield _mismatch(file, text, dataset.class_names[:10], facts.class_names[:10])
    if facts.channels != dataset.channels:
        text = f"the teacher takes images of {facts.channels} channels, the data set has {dataset.channels}"
        yield _mismatch(file, text, dataset.channels, facts.channels)


def _architecture_fit(dataset: DatasetFacts, facts: ArchitectureFacts, pointer: str) -> Iterator[Fault]:
    if facts.channels not in ("any", dataset.channels):
        text = f"{facts.name} takes images of {facts.channels} channels, the data set has {dataset.channels}"
        yield Fault(pointer, text, "not_allowed", None, facts.name)
    if min(dataset.image_size) < facts.min_image:
        height, width = dataset.image_size
        text = f"{facts.name} needs images of at least {facts.min_image} pixels, the data set has {height} x {width}"
        yield Fault(pointer, text, "not_allowed", None, facts.name)
    if facts.max_image is not None and max(dataset.image_size) > facts.max_image:
        height, width = dataset.image_size
        text = f"{facts.name} takes images of {facts.max_image} pixels at most, the data set has {height} x {width}"
        yield Fault(pointer, text, "not_allowed", None, facts.name)


def _labelled(dataset: DatasetFacts) -> Iterator[Fault]:
    if not dataset.labelled:
        text = "the data set holds no labels: a student is measured on labelled images"
        yield Fault("/dataset/source", text, "not_allowed", "a labelled set; this one beside it, as unlabelled")


def _pool_fit(dataset: DatasetFacts, pool: DatasetFacts | None) -> Iterator[Fault]:
    if pool is None:
        return
    for what, ours, theirs in (
        ("channels", dataset.channels, pool.channels),
        ("height and width", list(dataset.image_size), list(pool.image_size)),
    ):
        if ours != theirs:
            text = f"the data set's images have {what} {ours}, these {theirs}"
            yield Fault("/unlabelled/source", text, "not_allowed", ours, theirs)


def _channels(dataset: DatasetFacts, model: Teacher | Student, pointer: str) -> Iterator[Fault]:
    preprocessing: Preprocessing | None = model.preprocessing
    if preprocessing is None:
        return
    for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
        if len(values) != dataset.channels:
            text = f"one number for each of the data set's {dataset.channels} channels"
            yield Fault(f"{pointer}/preprocessing/{name}", text, "not_allowed", dataset.channels, len(values))


def _enough_images(dataset: DatasetFacts, pool: DatasetFacts | None, fields: Fields) -> Iterator[Fault]:
    training, unlabelled = fields.get("training"), fields.get("unlabelled")
    if not isinstance(training, Training) or (isinstance(unlabelled, Unlabelled) and pool is None):
        return
    counts = {"training": images_to_train_on(dataset, pool, unlabelled, training)}
    if fields.get("baseline") == "train":
        counts["labelled training"] = images_to_train_on(dataset, None, None, training)
    for kind, left in counts.items():
        if training.batch_size > left:
            text = f"{left} {kind} images are left after validation, fewer than one batch"
            yield Fault("/training/batch_size", text, "not_allowed", f"≤ {left}", training.batch_size)
            return


def images_to_train_on(
    dataset: DatasetFacts, pool: DatasetFacts | None, unlabelled: Unlabelled | None, training: Training
) -> int:
    """How many images an epoch sees: what is held out is not trained on."""
    labelled = dataset.train - round(dataset.train * training.validation_fraction)
    if pool is None or unlabelled is None:
        return labelled
    return pool.train + (labelled if unlabelled.labelled_too else 0)


def _mismatch(pointer: str, message: str, allowed: Any, got: Any) -> Fault:
    return Fault(pointer, message, "teacher_mismatch", allowed, got)
