"""The warnings about a spec and its files that are known before anything runs: at registration, at submit."""

from collections.abc import Iterator, Mapping, Sequence

from base.warning import WarningItem
from kdcore.catalog import DatasetFacts, LogitsFacts, ModelFacts, ProgramFacts, StartFacts
from kdcore.catalog.facts import Loading
from kdcore.spec.classes import (
    answers_classes,
    as_numbers,
    class_names,
    class_order,
    class_outputs,
    map_example,
    needs_classes,
)
from kdcore.spec.fitting import Known, images_per_class, images_to_train_on, start_summary, teacher_size
from kdcore.spec.inputs import DataOptions, Student, Teacher
from kdcore.spec.job import JobSpec
from kdcore.spec.plan import aware_epochs
from kdcore.spec.resolving import weights_of
from kdcore.spec.rules import each_method, each_start, each_teacher
from kdcore.spec.shipping import INT8

HELPED_SOONER = "kd with nst beside it on ResNets as large as ResNet-20, or dist with ten classes or more"
"""What gained in the short trainings of `bench.budgets` (docs/measured.md)."""
FOR_SMALL = "dist, or kd"
"""Methods that gained there with the smallest student."""

LEAST_IMAGES = {"train": 10, "test": 5}
"""In each class. With fewer, one image more or less is a fifth of the class's accuracy."""
SHARE_CUT = 0.1
"""The share of all pixels that a crop may leave out without a warning."""
DARK = 31
"""The largest value of 255 at which all training images together are doubtful: 0 and 1, numbers of classes, 4 or 5
bits, and sklearn's digits (0..16) are not above it."""
OFTEN = 0.01
"""The share of the pictures with an orientation tag from which it is no accident."""


def loading_warnings(
    loading: Loading | None, architecture: str, pointer: str = "", file: str = "/blob"
) -> Iterator[WarningItem]:
    """Yield what had to be guessed to load a checkpoint. `pointer` is the place of its fields, `file` its own."""
    if loading is None:
        return
    if loading.architecture_found:
        more = f"; {', '.join(loading.similar)} have the same" if loading.similar else ""
        yield WarningItem(
            "architecture_found",
            f"{pointer}/architecture",
            f"the file does not name its architecture: its names and shapes are those of {architecture}{more}",
            "name it: architecture. The accuracy on your data confirms it",
        )
    if loading.averaged_by_default:
        yield WarningItem(
            "averaged_weights_taken",
            f"{pointer}/averaged",
            f"the file has averaged weights ({loading.part}) beside raw ones: the averaged were taken",
            "averaged: true says so, averaged: false takes the raw ones",
        )
    if loading.by_order:
        first = ", ".join(f"{own} is {given}" for own, given in list(loading.mapped_names.items())[:2])
        yield WarningItem(
            "weights_matched_by_order",
            file,
            f"the file's names are not those of {architecture}; its {loading.tensors} tensors have the same "
            f"shapes in the same order and were taken so ({first}, …)",
            "the accuracy on your data confirms it; save the weights under the network's names to be certain",
        )
    if loading.ignored:
        first = ", ".join(loading.ignored_names[:4]) + (", …" if loading.ignored > 4 else "")
        yield WarningItem(
            "tensors_left_out",
            file,
            f"{loading.ignored:,} tensors of the file are no part of {architecture}: {first}",
            "nothing to do if they belong to a loss or to another network of the training",
        )
    if loading.activation_guessed:
        yield WarningItem(
            "head_activation_guessed",
            f"{pointer}/architecture",
            "the file's classifier has hidden layers, and no file says their activation: "
            f"{loading.activation_guessed} was assumed",
            f"name it in the architecture: {architecture}, or with gelu, tanh, silu or linear (none) in the "
            f"place of {loading.activation_guessed}",
        )


def model_warnings(facts: ModelFacts) -> Iterator[WarningItem]:
    """Yield what is doubtful about a model that is registered."""
    yield from loading_warnings(facts.loading, facts.architecture)
    yield from normalization_warnings(facts)
    yield from _outputs_warnings(facts, "/blob")


def normalization_warnings(facts: ModelFacts) -> Iterator[WarningItem]:
    """Yield a warning if nothing says how a model's images were normalized."""
    if facts.mean is None or facts.std is None:
        yield WarningItem(
            "normalization_guessed",
            "/preprocessing",
            "the file does not say how its images were normalized: jobs will use the mean and std of their data set",
            "register it with the preprocessing of its training: mean and std for each channel, of pixels in 0..1",
        )


def _outputs_warnings(facts: ModelFacts, pointer: str) -> Iterator[WarningItem]:
    if isinstance(facts, ProgramFacts) and facts.outputs == "probabilities":
        yield WarningItem(
            "outputs_are_probabilities",
            pointer,
            f"{facts.kind} returns probabilities, not logits, as with a softmax at its end: their logarithm is used, "
            "which has the same softmax at every temperature",
            "nothing to do; an export without the softmax keeps more digits of small probabilities",
        )


def dataset_warnings(
    facts: DatasetFacts, pointer: str = "/blob", options: DataOptions | None = None
) -> Iterator[WarningItem]:
    """Yield what is doubtful about a data set; `pointer` is its place in the registration or the spec.

    `options` are those that were given for it: an explicit choice is not doubtful.
    """
    options = options or DataOptions()
    if facts.test_carved:
        yield WarningItem(
            "test_split_carved",
            pointer,
            f"the data has no test split: {facts.test} of its {facts.train + facts.test} images were set aside for it",
            "add a folder test/<class>/ (or arrays x_test and y_test) with images that are never trained on",
        )
    for one in facts.left_out:
        yield WarningItem(
            "files_left_out",
            pointer,
            f"left out: {one.what} ({one.count:,}): {one.why}" if one.count else f"missing: {one.what}: {one.why}",
            "nothing to do if they are not needed; docs/data.md has the layouts that are read",
        )
    if facts.merged:
        yield WarningItem(
            "folders_merged",
            pointer,
            "folders whose names differ only in their Unicode form or in blanks at their ends were read as one: "
            + ", ".join(facts.merged),
            "rename them if they are different classes",
        )
    if facts.repeated:
        yield WarningItem(
            "folders_repeated",
            pointer,
            f"each class folder holds the same folders: {', '.join(facts.repeated)}. Their images are read as those of "
            f"the class around them ({', '.join(facts.class_names[:3])}, …)",
            "if these are the classes, name the folders around them train and test; leave out folders of masks",
        )
    if facts.respelled:
        first = ", ".join(f"{one} is {file}" for one, file in list(facts.respelled_names.items())[:3])
        yield WarningItem(
            "file_names_differ",
            pointer,
            f"{facts.respelled:,} names in a table are those of files in another case or with another suffix, and were "
            f"read as these: {first}{', …' if facts.respelled > 3 else ''}",
            "write the names of the files into the table if these are other pictures",
        )
    yield from _small_classes(facts, pointer)
    yield from _pictures_warnings(facts, pointer, options)


def _small_classes(facts: DatasetFacts, pointer: str) -> Iterator[WarningItem]:
    """Yield a warning if classes have too few images to be learned, or to be measured."""
    small: dict[str, list[str]] = {}
    for split, least in LEAST_IMAGES.items():
        for name, count in zip(facts.class_names, facts.class_counts.get(split, ()), strict=False):
            if count < least:
                small.setdefault(name, []).append(f"{count} {split}")
    if small:
        named = "; ".join(f"{name}: {', '.join(counts)}" for name, counts in list(small.items())[:4])
        least_text = " or ".join(f"{least} {split}" for split, least in LEAST_IMAGES.items())
        yield WarningItem(
            "class_too_small",
            pointer,
            f"{len(small)} of {facts.num_classes} classes have fewer than {least_text} images "
            f"({named}{'; …' if len(small) > 4 else ''}): their accuracy says little",
            "add images of these classes, or leave the classes out",
        )


def _pictures_warnings(facts: DatasetFacts, pointer: str, options: DataOptions) -> Iterator[WarningItem]:
    """Yield what was left out of image files, or read in another way than it is stored."""
    counts = facts.pictures
    if facts.skipped:
        first = ", ".join(facts.skipped_names[:4]) + (", …" if facts.skipped > 4 else "")
        yield WarningItem(
            "pictures_skipped",
            pointer,
            f"{facts.skipped:,} image files cannot be read and were left out: {first}",
            "replace them if they matter",
        )
    # What a crop to a smaller square leaves out of every image is what `resize_to` says.
    inside = 1.0 if options.resize_to is None else ((options.image_size or 0) / options.resize_to) ** 2
    if options.resize is None and facts.pixels_cut > 1 - inside + SHARE_CUT:
        yield WarningItem(
            "pictures_cut",
            pointer,
            f"the crop to a square leaves out {facts.pixels_cut:.0%} of the pixels, at the edges",
            "resize: squash or pad keeps all of each image; resize: crop says that the middle is what counts. Read "
            "them as the teacher did",
        )
    if facts.largest is not None and facts.largest <= DARK:
        yield WarningItem(
            "pixels_dark",
            pointer,
            f"no value of the training images is above {facts.largest} of 255: they are nearly black",
            _brighter(facts.largest),
        )
    if count := counts.get("alpha"):
        yield WarningItem(
            "alpha_over_white",
            pointer,
            f"{count:,} pictures have transparent parts, which are read over white",
            "if the teacher saw another ground, put the pictures on it before packing them (torchvision's loader drops "
            "the transparency, so that the hidden colours show, often black)",
        )
    if options.orientation is None and counts.get("oriented", 0) > OFTEN * _pictures(counts):
        yield WarningItem(
            "orientation_ignored",
            pointer,
            f"{counts['oriented']:,} pictures have a camera's tag that turns or mirrors them; it is not applied",
            "orientation: apply turns them upright; orientation: ignore if the teacher learned from them as they are "
            "stored, as with torchvision's loader",
        )
    if count := counts.get("sixteen_bit"):
        yield WarningItem(
            "sixteen_bit_scaled",
            pointer,
            f"{count:,} pictures have more than 8 bits; each was scaled to 0..255 by the range of its own values",
            "if brightness must be comparable between pictures, convert them to 8 bits with one range for all",
        )
    if count := counts.get("animated"):
        yield WarningItem(
            "frames_left_out",
            pointer,
            f"{count:,} pictures are animated: only the first frame of each was read",
            "save the frames that matter as pictures of their own",
        )


def _brighter(largest: int) -> str:
    """Return what makes bytes in 0..255 of such values."""
    if largest <= 1:
        return (
            "pixels are bytes in 0..255: multiply masks of 0 and 1 by 255; floats in 0..1 before they become bytes, "
            "(x * 255).round().astype('uint8')"
        )
    return f"pixels are bytes in 0..255: if {largest} stands for white, (x * (255 / {largest})).round().astype('uint8')"


def _pictures(counts: Mapping[str, int]) -> int:
    return counts.get("grey", 0) + counts.get("colour", 0)


def grey_as_colour(pointer: str = "/dataset") -> WarningItem:
    """Return the warning that grey images get three channels because the teachers take three."""
    return WarningItem(
        "grey_as_colour",
        pointer,
        "the images are grey, and the teacher takes three channels: they are read with three equal channels",
        "channels: 3 says it in the spec or the registration; a student of one channel needs a teacher of one",
    )


def spec_warnings(spec: JobSpec, known: Known) -> list[WarningItem]:
    """Return what is doubtful about a spec as the client sent it, before `resolve` writes out its defaults."""
    warnings: list[WarningItem] = []
    if known.dataset is not None:
        warnings += dataset_warnings(known.dataset, "/dataset", spec.dataset)
    for pointer, teacher in each_teacher(vars(spec)):
        facts = known.teachers.get(pointer)
        if isinstance(facts, LogitsFacts):
            warnings += _logits_warnings(facts, pointer)
            continue
        if facts is not None:
            warnings += loading_warnings(facts.loading, facts.architecture, pointer, f"{pointer}/checkpoint")
        if facts is not None and known.dataset is not None:
            size = teacher_size(vars(spec), known, pointer, teacher)
            warnings += teacher_warnings(teacher, facts, known.dataset, pointer, size)
            if not needs_classes(vars(spec)) and not answers_classes(teacher, facts, known.dataset):
                warnings.append(_classes_differ(facts, known.dataset, pointer))
        if facts is not None and teacher.preprocessing is None and (facts.mean is None or facts.std is None):
            warnings.append(
                WarningItem(
                    "normalization_guessed",
                    f"{pointer}/preprocessing",
                    "nothing says how the teacher's images were normalized: it gets the mean and std of the data set",
                    "give the preprocessing of its training: mean and std for each channel, of pixels in 0..1",
                )
            )
    for pointer, student in each_start(vars(spec)):
        if pointer in known.starts and known.dataset is not None:
            warnings += start_warnings(student, known.starts[pointer], known.dataset, pointer)
    warnings += budget_warnings(spec, known)
    warnings += _small_student_warnings(spec, known)
    warnings += _int8_warnings(spec)
    return warnings


def _int8_warnings(spec: JobSpec) -> Iterator[WarningItem]:
    if aware_epochs(spec) and not set(spec.export) & set(INT8):
        yield WarningItem(
            "int8_not_exported",
            "/export",
            f"the student trains for int8, and no file of the job is int8: {', '.join(spec.export)}",
            f"add {INT8[0]} to export; or make it of the job later, by POST /v1/jobs/{{id}}/exports",
        )


def _logits_warnings(facts: LogitsFacts, pointer: str) -> Iterator[WarningItem]:
    if facts.test is None:
        yield WarningItem(
            "teacher_not_tested",
            f"{pointer}/logits",
            "the file has logits of training images only: the teacher's accuracy is measured on these, which it has "
            "probably learned from, and not on test images",
            "add the array test_logits, test images x classes, in the order of the test images",
        )


def budget_warnings(spec: JobSpec, known: Known) -> Iterator[WarningItem]:
    """Yield a warning if every method of the spec was measured not to help in a training as short as this one."""
    dataset, training, seen = known.dataset, spec.training, images_per_class(spec, known)
    if dataset is None or seen is None:
        return
    images = images_to_train_on(dataset, known.unlabelled, spec.unlabelled, training)
    weights = weights_of(spec, known)
    budgets = [one for method in spec.methods if (one := method.short_budget_with(weights)) is not None]
    if len(budgets) == len(spec.methods) and all(seen <= budget.images_per_class for budget in budgets):
        # Of several methods the one that needs least: it is enough if one of them helps.
        budget = min(budgets, key=lambda budget: budget.images_per_class)
        epochs = -(-(budget.helped_at or budget.images_per_class) * dataset.num_classes // images)
        yield WarningItem(
            "budget_short",
            "/training/epochs",
            f"{spec.method_name} was measured not to help in so short a training: {budget.gain:+.1f} points with "
            f"{budget.images_per_class} images for each class; here the student sees {seen:.0f}",
            f"train for {'at least' if budget.helped_at else 'more than'} {epochs} epochs, or try a method that helped "
            f"sooner: {HELPED_SOONER}",
        )
        return
    for pointer, method in each_method(vars(spec)):
        stage = method.resolved(training.epochs, None, None).first_stage
        steps = 0 if stage is None else (stage.epochs or 0) * (images // training.batch_size)
        if method.short_budget is not None and 0 < steps <= method.short_budget.first_stage_steps:
            yield WarningItem(
                "budget_short",
                f"{pointer}/pretraining_epochs",
                f"the first stage of {method.name} has {steps} steps; with so few it was measured to harm",
                "give it more pretraining_epochs, or more epochs: the published training has 30 epochs of 240",
            )


def _small_student_warnings(spec: JobSpec, known: Known) -> Iterator[WarningItem]:
    """Yield a warning for each method that was measured to harm a student as small as this one, with its own weight."""
    network = known.network(spec.students[0].architecture)
    if network is None or known.dataset is None:
        return
    parameters = network.parameters(known.dataset.num_classes, known.dataset.channels)
    single = len(spec.methods) == 1
    for pointer, method in each_method(vars(spec)):
        measured, usual = method.small_student, method.facts.beta
        weight = method.weight or (spec.beta if single else None) or method.own_beta
        if measured is None or parameters is None or usual is None or weight is None:
            continue
        # Another form of the method has another weight, and was not measured.
        if parameters > measured.parameters or weight < usual or method.own_beta != usual:
            continue
        yield WarningItem(
            "student_small",
            pointer,
            f"{method.name} was measured to harm students as small as this one: {measured.gain:+.1f} points with "
            f"{measured.parameters:,} parameters; this one has {parameters:,}",
            f"a smaller {'beta' if single else 'weight'} than {usual:g}, another method ({FOR_SMALL}), or a "
            "larger student",
        )


def teacher_warnings(
    teacher: Teacher, facts: ModelFacts, dataset: DatasetFacts, pointer: str, size: tuple[int, int]
) -> Iterator[WarningItem]:
    """Yield what is doubtful about a teacher on these images, of this height and width. A resolved spec gets the same
    words as the one sent."""
    yield from _outputs_warnings(facts, pointer)
    yield from _classes_warnings(teacher, facts, dataset, pointer)
    if isinstance(facts, ProgramFacts) or facts.image_size is None:
        return  # Whether a program takes images of this size is a matter of fit(), not of doubt.
    if teacher.image_size is None and facts.image_size != size:
        own, shown = (" x ".join(map(str, pair)) for pair in (facts.image_size, size))
        yield WarningItem(
            "image_size_differs",
            "/dataset/image_size",
            f"{_who(pointer)} learned from images of {own} pixels, the data set has {shown}",
            "bring the images to that size with dataset.image_size, or compare its accuracy with the one that it had",
        )


def _classes_differ(facts: ModelFacts, dataset: DatasetFacts, pointer: str) -> WarningItem:
    return WarningItem(
        "teacher_classes_differ",
        f"{pointer}/class_map",
        f"{_who(pointer)} has other classes than the data set ({facts.num_classes}, and here {dataset.num_classes}). "
        "The method does not compare them, so it is accepted; its accuracy on these images cannot be measured",
        "nothing to do if that is meant; class_map says which of its outputs answer each class, if some do",
    )


def _classes_warnings(
    teacher: Teacher, facts: ModelFacts, dataset: DatasetFacts, pointer: str
) -> Iterator[WarningItem]:
    """Yield what was found about the classes of a teacher without being told."""
    names = class_names(teacher, facts)
    mapped = class_outputs(teacher, facts, dataset)
    if mapped is not None and mapped.by != "given":
        found = {
            "names": "its outputs were found by the names of the classes",
            "imagenet": "its outputs were found by ImageNet's synonyms and WordNet's numbers, as timm lists them",
            "imagenet's order": "the names of its 1000 classes are not known, and were taken to be ImageNet's in their "
            "usual order, as timm lists them",
        }
        yield WarningItem(
            "class_map_found",
            f"{pointer}/class_map",
            f"{_who(pointer)} has {facts.num_classes} classes, the data set {dataset.num_classes}: {found[mapped.by]}",
            f"nothing to do if these are right: {map_example(as_numbers(mapped.outputs, dataset))}. A strict job needs "
            "them in the spec, as class_map",
        )
    if mapped is None and names and class_order(names, dataset):
        yield WarningItem(
            "class_order_changed",
            f"{pointer}/class_names",
            f"the classes of {_who(pointer)} are the data set's in another order ({_first(names)} and not "
            f"{_first(dataset.class_names)}): its outputs are put into the data set's order",
            "nothing to do if the names are right; a strict job needs a teacher with the data set's order",
        )


def start_warnings(student: Student, facts: StartFacts, dataset: DatasetFacts, pointer: str) -> Iterator[WarningItem]:
    """Yield what is doubtful about a student that starts from a checkpoint.

    A classifier that starts fresh because the numbers of classes differ is no doubt: the answer says it without one.
    """
    summary = start_summary(student, facts, dataset)
    yield from loading_warnings(facts.loading, student.architecture, pointer, f"{pointer}/checkpoint")
    others = [name for name in facts.fresh if name not in facts.classifier]
    renamed = summary["classifier"] == "fresh" and facts.num_classes == dataset.num_classes and facts.classifier_taken
    if others or renamed:
        reasons = []
        if others:
            reasons.append(f"{len(others)} tensors before the classifier are not in it, first {others[0]}")
        if renamed:
            names = list(student.class_names or facts.class_names or ())
            reasons.append(f"its classes have other names ({_first(names)} and not {_first(dataset.class_names)})")
        yield WarningItem(
            "weights_partly_loaded",
            f"{pointer}/checkpoint",
            f"of {facts.parameters:,} parameters {summary['taken']:,} are taken from the checkpoint, and the others "
            f"start from random weights: {'; '.join(reasons)}",
            "give a checkpoint of the same architecture if more should be taken"
            if others
            else "class_names says it if the classes are the same under other names",
        )
    if student.preprocessing is None and (facts.mean is None or facts.std is None):
        yield WarningItem(
            "normalization_guessed",
            f"{pointer}/preprocessing",
            "nothing says how the images of the checkpoint were normalized: the student gets the mean and std of the "
            "data set",
            "give the preprocessing of its training: mean and std for each channel, of pixels in 0..1",
        )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def _who(pointer: str) -> str:
    """Return which model: one of several teachers is named by its place in the spec."""
    return f"the {pointer.removeprefix('/')}" if pointer.count("/") == 1 else f"the teacher {pointer}"
