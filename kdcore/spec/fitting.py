"""What of teacher, student and method does not fit the data, or each other, once they have been looked up."""

from collections.abc import Iterator
from typing import Any

from base.errors import Fault
from kdcore.catalog import METHODS, ArchitectureFacts, DatasetFacts
from kdcore.catalog.programs import ProgramFacts
from kdcore.spec.known import Known
from kdcore.spec.methods import Byot, FitNet, Fsp, Method, Ofd, Pair
from kdcore.spec.rules import Fields, each_assistant, each_method, each_student, each_teacher
from kdcore.spec.tapping import choose, takes_taps
from kdcore.spec.vocabulary import Preprocessing, Student, Teacher, Training, Unlabelled


def fit(fields: Fields, known: Known) -> list[Fault]:
    """Every misfit that can be seen without building anything."""
    dataset = known.dataset
    if dataset is None:
        return []
    if not dataset.labelled:
        text = "the data set holds no labels: a student is measured on labelled images"
        return [Fault("/dataset/source", text, "not_allowed", "a labelled set; this one beside it, as unlabelled")]
    faults = [*_pool_fit(dataset, known.unlabelled)]
    for pointer, teacher in each_teacher(fields):
        faults += _preprocessing_fit(dataset, teacher, pointer)
        faults += _teacher_fit(dataset, teacher, pointer, known)
    for pointer, student in (*each_assistant(fields), *each_student(fields)):
        faults += _preprocessing_fit(dataset, student, pointer)
        network = known.network(student.architecture)
        if network is not None:
            faults += _channels_fit(dataset, network, f"{pointer}/architecture")
            faults += _size_fit(dataset, network, f"{pointer}/architecture")
    faults += _places_fit(fields, known)
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


def _places_fit(fields: Fields, known: Known) -> Iterator[Fault]:
    """The places that methods look at: those that a spec names, and those that it leaves to be found."""
    named = each_student(fields)
    student = known.network(named[0][1].architecture) if named else None
    teacher = teacher_network(fields, known)
    if student is None or teacher is None or known.is_mystery(student) or known.is_mystery(teacher):
        return
    for pointer, method in each_method(fields):
        if isinstance(method, Byot):
            yield from _exits_fit(method, pointer, student, known)
        if not takes_taps(method):
            continue
        yield from _shapes_fit(method, pointer, student, teacher, known)
        pairs = method.pairs or choose(method, student, teacher)
        if not pairs:
            yield _no_taps(method, pointer, student, teacher)
        elif isinstance(method, Fsp):
            yield from _widths_agree(pairs, pointer, student, teacher, known)
        elif isinstance(method, Ofd):
            yield from _margins_fit(method, pointer, teacher, known)


def _exits_fit(method: Byot, pointer: str, student: ArchitectureFacts, known: Known) -> Iterator[Fault]:
    if method.exits is None and len(student.taps) < 2:
        text = f"{student.name} has no known stages to leave it at: name the exits"
        yield Fault(f"{pointer}/exits", text, "missing", "module paths")
    if student.embedding is None:
        text = f"'byot' teaches the features that {student.name} classifies by, and where they are is not known"
        yield Fault(f"{pointer}/name", text, "not_allowed", "a network whose classifier has one known input", "byot")
    for position, path in enumerate(method.exits or ()):
        shape = known.shapes.get((student.name, path), [0, 0, 0])
        if len(shape) != 3:
            yield _other_shape(f"{pointer}/exits/{position}", path, student, shape, "'byot' leaves at a map")


def _shapes_fit(
    method: Method, pointer: str, student: ArchitectureFacts, teacher: ArchitectureFacts, known: Known
) -> Iterator[Fault]:
    """Only taps that a spec names have been looked at."""
    takes = METHODS[method.name].takes
    if takes == "anything" or (isinstance(method, FitNet) and method.regressor == "linear"):
        return
    ranks, needed = {"maps": ({3}, "a map"), "maps_or_vectors": ({1, 3}, "a map or a vector")}[takes]
    several = "taps" in type(method).model_fields
    for position, pair in enumerate(method.pairs):
        place = f"{pointer}/taps/{position}" if several else f"{pointer}/tap"
        for side, network, path in (("student", student, pair.student), ("teacher", teacher, pair.teacher)):
            shape = known.shapes.get((network.name, path))
            if shape is not None and len(shape) not in ranks:
                yield _other_shape(f"{place}/{side}", path, network, shape, f"{method.name!r} needs {needed}")


def _other_shape(pointer: str, path: str, network: ArchitectureFacts, shape: list[int], needed: str) -> Fault:
    given = " x ".join(map(str, shape))
    text = f"{path} of {network.name} gives {given} for each image; {needed}"
    return Fault(pointer, text, "not_allowed", "channels x height x width", given)


def _no_taps(method: Method, pointer: str, student: ArchitectureFacts, teacher: ArchitectureFacts) -> Fault:
    field = "taps" if "taps" in type(method).model_fields else "tap"
    text = f"{method.name!r} finds no place to compare {student.name} with {teacher.name} by itself: name its {field}"
    if method.name == "ofd":
        text += " (the teacher's need a batch norm right before their ReLU)"
    return Fault(f"{pointer}/{field}", text, "missing", '{"student": "<module path>", "teacher": "<module path>"}')


def _widths_agree(
    pairs: tuple[Pair, ...], pointer: str, student: ArchitectureFacts, teacher: ArchitectureFacts, known: Known
) -> Iterator[Fault]:
    for pair in pairs:
        ours, theirs = _width(student, pair.student, known), _width(teacher, pair.teacher, known)
        if ours is not None and theirs is not None and ours != theirs:
            text = f"{student.name} has {ours} at {pair.student}, {teacher.name} {theirs} at {pair.teacher}"
            text = f"'fsp' compares channel with channel: {text}"
            yield Fault(f"{pointer}/taps", text, "not_allowed", "taps of equal width, or a student as wide")
            return


def _margins_fit(method: Ofd, pointer: str, teacher: ArchitectureFacts, known: Known) -> Iterator[Fault]:
    for position, (pair, margin) in enumerate(zip(method.pairs, method.margins or (), strict=False)):
        map_width, own = _width(teacher, pair.teacher, known), _width(teacher, margin, known)
        if map_width is not None and own is not None and map_width != own:
            text = f"{margin} of {teacher.name} has {own} channels, the tap {pair.teacher} has {map_width}"
            yield Fault(f"{pointer}/margins/{position}", text, "not_allowed", map_width, own)


def _width(network: ArchitectureFacts, path: str, known: Known) -> int | None:
    if (network.name, path) in known.shapes:
        return known.shapes[network.name, path][0]
    return dict(zip(network.taps, network.tap_widths, strict=False)).get(path)


def _teacher_fit(dataset: DatasetFacts, asked: Teacher, pointer: str, known: Known) -> Iterator[Fault]:
    facts = known.teachers.get(pointer)
    file = f"{pointer}/program" if asked.program is not None else f"{pointer}/checkpoint"
    network = known.network(facts.architecture if facts else asked.architecture)
    if network is not None:
        yield from _size_fit(dataset, network, file if asked.architecture is None else f"{pointer}/architecture")
    if facts is None:
        return
    if isinstance(facts, ProgramFacts):
        yield from _program_fit(dataset, facts, file)
    elif asked.architecture not in (None, facts.architecture):
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


def _program_fit(dataset: DatasetFacts, facts: ProgramFacts, pointer: str) -> Iterator[Fault]:
    if not facts.takes(dataset.image_size):
        own = " x ".join("any" if side is None else str(side) for side in facts.image_size)
        height, width = dataset.image_size
        text = f"the program takes images of {own} pixels, the data set has {height} x {width}"
        yield _mismatch(pointer, text, list(dataset.image_size), list(facts.image_size))


def _channels_fit(dataset: DatasetFacts, facts: ArchitectureFacts, pointer: str) -> Iterator[Fault]:
    if facts.channels not in ("any", dataset.channels):
        text = f"{facts.name} takes images of {facts.channels} channels, the data set has {dataset.channels}"
        yield Fault(pointer, text, "not_allowed", None, facts.name)


def _size_fit(dataset: DatasetFacts, facts: ArchitectureFacts, pointer: str) -> Iterator[Fault]:
    height, width = dataset.image_size
    if min(dataset.image_size) < facts.min_image:
        text = f"{facts.name} needs images of at least {facts.min_image} pixels, the data set has {height} x {width}"
        yield Fault(pointer, text, "not_allowed", None, facts.name)
    if facts.max_image is not None and max(dataset.image_size) > facts.max_image:
        text = f"{facts.name} takes images of {facts.max_image} pixels at most, the data set has {height} x {width}"
        yield Fault(pointer, text, "not_allowed", None, facts.name)


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


def _preprocessing_fit(dataset: DatasetFacts, model: Teacher | Student, pointer: str) -> Iterator[Fault]:
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
    """How many images an epoch sees: what is held out, one image at least, is not trained on."""
    labelled = dataset.train - max(1, round(dataset.train * training.validation_fraction))
    if pool is None or unlabelled is None:
        return labelled
    return pool.train + (labelled if unlabelled.labelled_too else 0)


def _mismatch(pointer: str, message: str, allowed: Any, got: Any) -> Fault:
    return Fault(pointer, message, "teacher_mismatch", allowed, got)
