"""The facts of a spec's references, and the faults that follow from them for teacher, student and method."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from base.errors import Fault
from kdcore.catalog import (
    ArchitectureFacts,
    DatasetFacts,
    LogitsFacts,
    ModelFacts,
    ProgramFacts,
    StartFacts,
    UnknownName,
    architecture,
)
from kdcore.spec.classes import class_faults, needs_classes
from kdcore.spec.inputs import EVERYTHING_ELSE, Preprocessing, Student, Teacher, Unlabelled
from kdcore.spec.job import TRAINED_BASELINES, JobSpec
from kdcore.spec.methods import Networks
from kdcore.spec.recipe import Augmentation, CropFlip, NoAugmentation, RandomResizedCrop, Training
from kdcore.spec.rules import (
    Fields,
    each_assistant,
    each_method,
    each_start,
    each_student,
    each_teacher,
    only_logits,
)


@dataclass(frozen=True)
class Known:
    """The known facts of a spec's references. Missing facts were not found, or need a download."""

    dataset: DatasetFacts | None = None
    unlabelled: DatasetFacts | None = None
    teachers: Mapping[str, ModelFacts] = field(default_factory=dict)
    """By their pointer in the spec."""
    starts: Mapping[str, StartFacts] = field(default_factory=dict)
    """What students and assistants take over from their checkpoints, by the student's pointer in the spec."""
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
    for pointer, student in each_start(fields):
        if pointer in known.starts:
            faults += _start_fit(dataset, student, known.starts[pointer], pointer)
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
    if isinstance(facts, LogitsFacts):
        yield from _logits_fit(dataset, facts, f"{pointer}/logits", fields)
        return
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
        text = f"the file is {facts.kind}, which holds its own network"
        for name in ("architecture", "part", "averaged"):
            given = getattr(teacher, name)
            if given is not None:
                yield Fault(f"{pointer}/{name}", text, "unused", "leave it out", given)
        yield from _program_fit(facts, size, file, f"{pointer}/image_size", teacher.image_size)
        if teacher.program is None:
            yield from only_logits(fields, file, teacher.checkpoint)
    elif teacher.architecture not in (None, facts.architecture, facts.architecture.partition("+")[0]):
        text = f"the checkpoint is a {facts.architecture}"
        yield _mismatch(f"{pointer}/architecture", text, facts.architecture, teacher.architecture)
    yield from class_faults(dataset, teacher, facts, pointer, file, needs_classes(fields))
    if teacher.preprocessing is None:
        yield from _own_preprocessing_fits(facts, f"{pointer}/preprocessing")
    if facts.channels != dataset.channels:
        text = f"the teacher takes images of {facts.channels} channels, the data set has {dataset.channels}"
        yield _mismatch(file, text + _channels_field(facts.channels), dataset.channels, facts.channels)


def default_augmentation(dataset: DatasetFacts) -> Augmentation:
    """Return the default augmentation. Grey images may be digits or letters: a mirrored one is another one, or none."""
    side = min(dataset.image_size)
    is_grey = dataset.grey or dataset.channels == 1
    if dataset.kind == "named" and is_grey:
        return NoAugmentation()
    return CropFlip(padding=side // 8, flip=not is_grey) if side <= 64 else RandomResizedCrop(flip=not is_grey)


def views_drawn(how: Augmentation) -> int | None:
    """Return the number of views that an augmentation draws from, which are numbered from 0; None if these have no
    numbers."""
    if isinstance(how, CropFlip):
        return (2 * how.padding + 1) ** 2 * (2 if how.flip else 1)
    return 1 if isinstance(how, NoAugmentation) else None


def _logits_fit(dataset: DatasetFacts, facts: LogitsFacts, pointer: str, fields: Fields) -> Iterator[Fault]:
    """Yield the faults of a file of logits: other rows or classes than the data's, or other views than the job's."""
    for what, own, wanted in (
        ("rows of logits", facts.train, dataset.train),
        ("rows of test_logits", facts.test, dataset.test),
        ("columns, one a class", facts.num_classes, dataset.num_classes),
    ):
        if own is not None and own != wanted:
            images = "classes" if what.startswith("columns") else "test images" if "test" in what else "training images"
            text = f"the file has {own} {what}, the data set has {wanted} {images}, and each needs one, in its order"
            if images == "classes":
                text += "; of a teacher of other classes, send the columns of the data's classes"
            yield _mismatch(pointer, text, wanted, own)
    training = fields.get("training")
    if not isinstance(training, Training):
        return
    at, how = "/training/augmentation", training.augmentation or default_augmentation(dataset)
    drawn, chosen = views_drawn(how), "" if training.augmentation is not None else ", the default here,"
    works = "none" if facts.views is None else f"crop_flip with {facts.views} views"
    if facts.views is None and not isinstance(how, NoAugmentation):
        more = "" if drawn is None else f", or send the logits of all its views, 0 to {drawn - 1}, with the array views"
        text = (
            f"the file has logits of images without augmentation, and {how.name}{chosen} changes them: use none{more}"
        )
        yield Fault(at, text, "not_allowed", {"name": "none"}, how.name)
    elif facts.views is not None and not (isinstance(how, CropFlip) and drawn == facts.views):
        text = f"the file has logits of the views 0 to {facts.views - 1} of crop_flip, and {how.name}{chosen}"
        if drawn is not None and isinstance(how, CropFlip):
            text += (
                f" draws views 0 to {drawn - 1}: all of these are needed and no others, (2 x padding + 1)^2, and twice "
                "as many with flip"
            )
        else:
            text += " has no views of these numbers"
        yield Fault(at, text, "not_allowed", works, how.model_dump(mode="json"))


def keeps_classifier(student: Student, facts: StartFacts, dataset: DatasetFacts) -> bool:
    """Return True if a student takes over the classifier of its checkpoint: it has as many classes as the data, and
    their names are the data's, in any order, or are not known."""
    names = student.class_names or facts.class_names
    if facts.num_classes != dataset.num_classes or not facts.classifier_taken:
        return False
    return not names or not dataset.class_names or set(names) == set(dataset.class_names)


def fresh_parameters(student: Student, facts: StartFacts, dataset: DatasetFacts) -> list[str]:
    """Return the names of the parameters that a student does not take from its checkpoint, in the network's order."""
    classifier = [] if keeps_classifier(student, facts, dataset) else facts.classifier
    return list(dict.fromkeys((*facts.fresh, *classifier)))


def start_summary(student: Student, facts: StartFacts, dataset: DatasetFacts) -> dict[str, Any]:
    """Return what the answers of the service and the report say about a student that starts from a checkpoint."""
    kept = keeps_classifier(student, facts, dataset)
    fresh = fresh_parameters(student, facts, dataset)
    return {
        "checkpoint": student.checkpoint,
        "digest": facts.digest,
        "parameters": facts.parameters,
        "taken": facts.taken - (0 if kept else facts.classifier_taken),
        "fresh": fresh[:FRESH_NAMED],
        "fresh_tensors": len(fresh),
        "classifier": "kept" if kept else "fresh",
        "trained": facts.parameters - facts.frozen,
    }


FRESH_NAMED = 20
"""Fresh parameters that a summary names; it counts all of them."""


def _start_fit(dataset: DatasetFacts, student: Student, facts: StartFacts, pointer: str) -> Iterator[Fault]:
    at = f"{pointer}/checkpoint"
    if facts.channels is not None and facts.channels != dataset.channels:
        text = f"the checkpoint is of images of {facts.channels} channels, the data set has {dataset.channels}"
        yield Fault(at, text + _channels_field(facts.channels), "not_allowed", dataset.channels, facts.channels)
    elif facts.taken == facts.classifier_taken:
        text = (
            f"nothing in the checkpoint fits {student.architecture}: no parameter before its classifier has the name "
            f"and shape of one in the file, first {facts.fresh[0] if facts.fresh else ''}"
        )
        yield Fault(at, text, "not_allowed", "a checkpoint of this architecture", student.checkpoint)
        return
    names, count = student.class_names, facts.num_classes
    if names and count is not None and len(names) != count:
        text = f"{len(names)} class names, and the checkpoint has {count} classes"
        yield Fault(f"{pointer}/class_names", text, "not_allowed", count, len(names))
    for position, path in enumerate(student.freeze):
        if path in facts.unknown_modules:
            near = facts.unknown_modules[path]
            text = f"{student.architecture} has no module {path!r}"
            text += f"; did you mean {' or '.join(near)}?" if near else ""
            yield Fault(f"{pointer}/freeze/{position}", text, "not_allowed", near or None, path)
    if facts.unknown_modules:
        return
    random = list(facts.frozen_fresh)
    if facts.frozen_classifier and not keeps_classifier(student, facts, dataset):
        random += [name for name in facts.classifier if name not in random]
    if facts.frozen == facts.parameters:
        text = "everything is frozen: nothing would be trained"
        yield Fault(f"{pointer}/freeze", text, "not_allowed", [EVERYTHING_ELSE], list(student.freeze))
    elif random:
        text = f"{random[0]} is frozen and not taken from the checkpoint: it would stay random"
        yield Fault(f"{pointer}/freeze", text, "not_allowed", "modules that the checkpoint gives", list(student.freeze))


def preprocessing_fault(mean: Sequence[float] | None, std: Sequence[float] | None) -> str | None:
    """Return why a mean and std that a file or a registration states cannot be used; None if they can.

    Where one of the two is not stated, the other is checked alone.
    """
    try:
        Preprocessing(mean=tuple(mean or (0.5,)), std=tuple(std or (0.5,)))
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
    if fields.get("baseline") in TRAINED_BASELINES:
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


def images_per_class(spec: JobSpec, known: Known) -> float | None:
    """Return how many images of each class a student sees; None while the data are not known."""
    if known.dataset is None or (spec.unlabelled is not None and known.unlabelled is None):
        return None
    images = images_to_train_on(known.dataset, known.unlabelled, spec.unlabelled, spec.training)
    return spec.training.epochs * images / known.dataset.num_classes


def _mismatch(pointer: str, message: str, allowed: Any, got: Any) -> Fault:
    return Fault(pointer, message, "teacher_mismatch", allowed, got)
