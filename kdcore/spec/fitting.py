"""The facts of a spec's references, and the faults that follow from them for teacher, student and method."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from base.errors import Fault
from kdcore.catalog import ArchitectureFacts, DatasetFacts, ModelFacts, ProgramFacts, UnknownName, architecture
from kdcore.spec.job import Preprocessing, Student, Teacher, Training, Unlabelled
from kdcore.spec.methods import Networks
from kdcore.spec.rules import Fields, each_assistant, each_method, each_student, each_teacher, only_logits


@dataclass(frozen=True)
class Known:
    """The known facts of a spec's references. Missing facts were not found, or need a download."""

    dataset: DatasetFacts | None = None
    unlabelled: DatasetFacts | None = None
    teachers: Mapping[str, ModelFacts] = field(default_factory=dict)
    """By their pointer in the spec."""
    inspected: Mapping[str, ArchitectureFacts] = field(default_factory=dict)
    """The facts of networks that must be built to be inspected, by name."""
    shapes: Mapping[tuple[str, str], list[int]] = field(default_factory=dict)
    """Shapes, without the batch, of the taps that the spec names, by architecture and path."""

    def network(self, name: str | None) -> ArchitectureFacts | None:
        """Return the facts of an architecture."""
        if name is None or name in self.inspected:
            return self.inspected.get(name or "")
        try:
            return architecture(name)
        except UnknownName:
            return None

    def lacks_places(self, network: ArchitectureFacts) -> bool:
        """Return True for a network whose places only an inspection can find, before it has been inspected."""
        return network.source == "timm" and network.name not in self.inspected


def fit(fields: Fields, known: Known) -> list[Fault]:
    """Return the faults of a spec, given the facts of its references. No network is built."""
    dataset = known.dataset
    if dataset is None:
        return []
    if not dataset.labelled:
        text = "the data set has no labels, and a student is measured on labelled images"
        return [Fault("/dataset/source", text, "not_allowed", "a labelled set, and this one as unlabelled")]
    faults = [*_pool_fit(dataset, known.unlabelled)]
    faults += _teacher_sizes_fit(fields, dataset)
    faults += _store_fits(fields, known, dataset)
    for pointer, teacher in each_teacher(fields):
        faults += _preprocessing_fit(dataset, teacher, pointer)
        size = teacher_size(fields, known, pointer, teacher)
        faults += _teacher_fit(dataset, teacher, pointer, known, fields, size)
    for pointer, student in (*each_assistant(fields), *each_student(fields)):
        faults += _preprocessing_fit(dataset, student, pointer)
        network = known.network(student.architecture)
        if network is not None:
            faults += _channels_fit(dataset, network, f"{pointer}/architecture")
            faults += _size_fit(dataset.image_size, network, f"{pointer}/architecture")
    faults += _places_fit(fields, known)
    faults += _enough_images(dataset, known.unlabelled, fields)
    return faults


def teacher_size(fields: Fields, known: Known, pointer: str, teacher: Teacher) -> tuple[int, int]:
    """Return height and width of a teacher's images. The data set must be known.

    Where a method compares gradients at the images, only a size that is given differs from the data's.
    """
    assert known.dataset is not None, "a size of images is asked for when the data set is known"
    alike = any(method.compares_gradients for _, method in each_method(fields))
    return size_shown(teacher.image_size, None if alike else known.teachers.get(pointer), known.dataset)


def size_shown(given: int | None, facts: ModelFacts | None, dataset: DatasetFacts) -> tuple[int, int]:
    """Return height and width of the images that a model gets: a given side, else that of the square images which its
    file notes, else the data's. Images that are no squares stay as they are."""
    if given is not None:
        return given, given
    height, width = dataset.image_size
    own = facts.image_size if facts is not None else None
    if height == width and own is not None and own[0] is not None and own[0] == own[1]:
        return own[0], own[0]
    return height, width


def _store_fits(fields: Fields, known: Known, dataset: DatasetFacts) -> Iterator[Fault]:
    """Yield the fault of a store that is smaller than the images that are cut from it."""
    training = fields.get("training")
    augmentation = training.augmentation if isinstance(training, Training) else None
    store = getattr(augmentation, "store_size", None)
    height, width = dataset.image_size
    if store is None or (store, store) == (height, width):
        return
    at = "/training/augmentation/store_size"
    if height != width:
        text = f"the data set's images are {height} x {width}, no squares: give a dataset.image_size, too"
        yield Fault(at, text, "not_allowed", "null", store)
        return
    largest = max((height, *(teacher_size(fields, known, at, one)[0] for at, one in each_teacher(fields))))
    if store < largest:
        text = f"images of {largest} pixels are cut from it: give as much or more, or {height} for none"
        yield Fault(at, text, "not_allowed", f">= {largest}", store)


def _teacher_sizes_fit(fields: Fields, dataset: DatasetFacts) -> Iterator[Fault]:
    """Yield the faults of image sizes that are given for teachers."""
    height, width = dataset.image_size
    for pointer, teacher in each_teacher(fields):
        at, side = f"{pointer}/image_size", teacher.image_size
        if side is None or (side, side) == (height, width):
            continue
        if height != width:
            text = f"the data set's images are {height} x {width}, no squares: give a dataset.image_size, too"
            yield Fault(at, text, "not_allowed", "null", side)
        for _, method in each_method(fields):
            if method.compares_gradients:
                text = f"{method.name!r} compares gradients at the images, which must then have one size"
                yield Fault(at, text, "not_allowed", height, side)


def teacher_network(fields: Fields, known: Known) -> ArchitectureFacts | None:
    """Return the network whose activations teach: the first teacher's, or in a scheme without one the student's."""
    given = each_teacher(fields)
    if not given:
        return next((known.network(student.architecture) for _, student in each_student(fields)), None)
    pointer, teacher = given[0]
    facts = known.teachers.get(pointer)
    return known.network(facts.architecture if facts else teacher.architecture)


def _places_fit(fields: Fields, known: Known) -> Iterator[Fault]:
    """Yield the faults of the places that methods compare: those that a spec names, and those that it leaves open."""
    named = each_student(fields)
    student = known.network(named[0][1].architecture) if named else None
    teacher = teacher_network(fields, known)
    if student is None or teacher is None or known.lacks_places(student) or known.lacks_places(teacher):
        return
    for pointer, method in each_method(fields):
        for fault in method.misfits(Networks(student, teacher, known.shapes)):
            yield replace(fault, pointer=pointer + fault.pointer)


def _teacher_fit(
    dataset: DatasetFacts, teacher: Teacher, pointer: str, known: Known, fields: Fields, size: tuple[int, int]
) -> Iterator[Fault]:
    facts = known.teachers.get(pointer)
    file = f"{pointer}/program" if teacher.program is not None else f"{pointer}/checkpoint"
    network = known.network(facts.architecture if facts else teacher.architecture)
    if network is not None:
        at = f"{pointer}/architecture" if teacher.architecture is not None else file
        if teacher.image_size is not None:
            at = f"{pointer}/image_size"
        yield from _size_fit(size, network, at, teacher.image_size, f"{pointer}/image_size")
    if facts is None:
        return
    if isinstance(facts, ProgramFacts):
        if teacher.architecture is not None:
            text = f"the file is {facts.kind}, which holds its own network"
            yield Fault(f"{pointer}/architecture", text, "unused", "leave it out", teacher.architecture)
        yield from _program_fit(facts, size, file, f"{pointer}/image_size", teacher.image_size)
        if teacher.program is None:
            yield from only_logits(fields, file, teacher.checkpoint)
    elif teacher.architecture not in (None, facts.architecture):
        text = f"the checkpoint is a {facts.architecture}"
        yield _mismatch(f"{pointer}/architecture", text, facts.architecture, teacher.architecture)
    if facts.num_classes != dataset.num_classes:
        text = f"the teacher has {facts.num_classes} classes, the data set has {dataset.num_classes}"
        yield _mismatch(file, text, dataset.num_classes, facts.num_classes)
    else:
        yield from _class_names_fit(dataset, teacher, facts, pointer, file)
    if teacher.preprocessing is None:
        yield from _own_preprocessing_fits(facts, f"{pointer}/preprocessing")
    if facts.channels != dataset.channels:
        text = f"the teacher takes images of {facts.channels} channels, the data set has {dataset.channels}"
        yield _mismatch(file, text + _channels_field(facts.channels), dataset.channels, facts.channels)


def class_names(teacher: Teacher, facts: ModelFacts | None) -> list[str] | None:
    """Return the names of a teacher's classes in the order of its outputs: those of the spec, else the file's."""
    return list(teacher.class_names) if teacher.class_names else (facts.class_names if facts else None)


def class_order(names: Sequence[str] | None, dataset: DatasetFacts) -> tuple[int, ...] | None:
    """Return, for each class of the data, the output of the teacher that has its name.

    None if nothing has to be reordered: names are not known, or are in the data's order. The names are the data's.
    """
    if not names or not dataset.class_names or list(names) == dataset.class_names:
        return None
    places = {name: place for place, name in enumerate(names)}
    return tuple(places[name] for name in dataset.class_names)


def _class_names_fit(
    dataset: DatasetFacts, teacher: Teacher, facts: ModelFacts, pointer: str, file: str
) -> Iterator[Fault]:
    names, at = class_names(teacher, facts), f"{pointer}/class_names" if teacher.class_names else file
    if not names or names == dataset.class_names:
        return
    known = bool(dataset.class_names)
    if len(names) != facts.num_classes:
        text = f"{len(names)} class names, and the teacher has {facts.num_classes} classes"
        yield _mismatch(at, text, facts.num_classes, len(names))
    elif known and (len(set(names)) < len(names) or set(names) != set(dataset.class_names)):
        text = "the teacher's class names differ from the data set's"
        yield _mismatch(at, text, dataset.class_names[:10], names[:10])


def preprocessing_fault(mean: Sequence[float], std: Sequence[float]) -> str | None:
    """Return why a mean and std that a file or a registration states cannot be used; None if they can."""
    try:
        Preprocessing(mean=tuple(mean), std=tuple(std))
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    return None


def _own_preprocessing_fits(facts: ModelFacts, pointer: str) -> Iterator[Fault]:
    """Yield the fault of a mean or std that an earlier version registered without checking them."""
    if facts.mean is None or facts.std is None:
        return
    fault = preprocessing_fault(facts.mean, facts.std)
    if fault is not None:
        text = f"the model's own mean and std cannot be used: {fault}"
        yield _mismatch(pointer, text, "give them here, or register the model again", f"{facts.mean}, {facts.std}")


def _program_fit(
    facts: ProgramFacts, size: tuple[int, int], pointer: str, size_at: str, given: int | None
) -> Iterator[Fault]:
    if not facts.takes(size):
        own = " x ".join("any" if side is None else str(side) for side in facts.image_size)
        text = f"the program takes images of {own} pixels, {_shown(size, given)}"
        yield _mismatch(pointer if given is None else size_at, text, list(size), list(facts.image_size))


def _shown(size: tuple[int, int], given: int | None) -> str:
    """Return whose size it is: the data set's, or the one that is given for the teacher."""
    return f"{'the data set has' if given is None else 'and its image_size is'} {size[0]} x {size[1]}"


def _channels_fit(dataset: DatasetFacts, facts: ArchitectureFacts, pointer: str) -> Iterator[Fault]:
    if facts.channels not in ("any", dataset.channels):
        text = f"{facts.name} takes images of {facts.channels} channels, the data set has {dataset.channels}"
        yield Fault(pointer, text + _channels_field(facts.channels), "not_allowed", None, facts.name)


def _channels_field(wanted: int | str) -> str:
    """Return the field that gives the images as many channels as a network takes."""
    return {
        1: "; dataset.channels: 1 reads colour images as grey",
        3: "; dataset.channels: 3 reads grey images as colour",
    }.get(wanted if isinstance(wanted, int) else 0, "")


def _size_fit(
    size: tuple[int, int],
    facts: ArchitectureFacts,
    pointer: str,
    given: int | None = None,
    teacher_at: str | None = None,
) -> Iterator[Fault]:
    """Yield the faults of a network's images. `given`: the size that a teacher's spec has at `teacher_at`."""
    small, large = min(size) < facts.min_image, facts.max_image is not None and max(size) > facts.max_image
    if not small and not large:
        return
    what = f"needs images of at least {facts.min_image}" if small else f"takes images of {facts.max_image}"
    text = f"{facts.name} {what} pixels{'' if small else ' at most'}, {_shown(size, given)}"
    fits = facts.min_image if small else facts.max_image
    if teacher_at is not None and given is None and size[0] == size[1]:
        field = teacher_at.removeprefix("/").replace("/", ".")
        text += f"; {field}: {fits} gives it images of that size"
    if given is None:
        yield Fault(pointer, text, "not_allowed", None, facts.name)
    else:
        yield Fault(pointer, text, "not_allowed", fits, given)


def _pool_fit(dataset: DatasetFacts, pool: DatasetFacts | None) -> Iterator[Fault]:
    if pool is None:
        return
    for what, ours, theirs in (
        ("channels", dataset.channels, pool.channels),
        ("height and width", list(dataset.image_size), list(pool.image_size)),
    ):
        if ours != theirs:
            text = f"the data set's images have {what} {ours}, these have {theirs}"
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


def images_held_out(dataset: DatasetFacts, training: Training) -> int:
    """Return the number of images that choose the best epoch: the data's validation split, or else a part of its
    training split, of at least one image."""
    return dataset.validation or max(1, round(dataset.train * training.validation_fraction))


def images_to_train_on(
    dataset: DatasetFacts, pool: DatasetFacts | None, unlabelled: Unlabelled | None, training: Training
) -> int:
    """Return the number of images in an epoch."""
    labelled = dataset.train if dataset.validation else dataset.train - images_held_out(dataset, training)
    if pool is None or unlabelled is None:
        return labelled
    return pool.train + (labelled if unlabelled.labelled_too else 0)


def _mismatch(pointer: str, message: str, allowed: Any, got: Any) -> Fault:
    return Fault(pointer, message, "teacher_mismatch", allowed, got)
