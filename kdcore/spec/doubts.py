"""The warnings about a spec and its files that are known before anything runs: at registration, at submit."""

from collections.abc import Iterator, Sequence

from base.warning import WarningItem
from kdcore.catalog import DatasetFacts, ModelFacts, ProgramFacts
from kdcore.spec.fitting import Known, class_names, class_order, images_to_train_on
from kdcore.spec.job import JobSpec, Teacher
from kdcore.spec.rules import each_method, each_teacher

HELPED_SOONER = "nst, feature, ofd and reviewkd"
"""The methods that gained 3.6 to 4.3 points with 216 images per class (docs/methods.md)."""


def model_warnings(facts: ModelFacts) -> Iterator[WarningItem]:
    """Yield what is doubtful about a model that is registered."""
    if facts.mean is None or facts.std is None:
        yield WarningItem(
            "normalization_guessed",
            "/preprocessing",
            "the file does not say how its images were normalized: jobs will use the mean and std of their data set",
            "register it with the preprocessing of its training: mean and std for each channel, of pixels in 0..1",
        )


def dataset_warnings(facts: DatasetFacts, pointer: str = "/blob") -> Iterator[WarningItem]:
    """Yield what is doubtful about a data set; `pointer` is its place in the registration or the spec."""
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
            f"left out: {one.what} ({one.count:,}): {one.why}",
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


def spec_warnings(spec: JobSpec, known: Known) -> list[WarningItem]:
    """Return what is doubtful about a spec as the client sent it, before `resolve` writes out its defaults."""
    warnings: list[WarningItem] = []
    if known.dataset is not None:
        warnings += dataset_warnings(known.dataset, "/dataset")
    for pointer, teacher in each_teacher(vars(spec)):
        facts = known.teachers.get(pointer)
        if facts is not None and known.dataset is not None:
            warnings += teacher_warnings(teacher, facts, known.dataset, pointer)
        if facts is not None and teacher.preprocessing is None and (facts.mean is None or facts.std is None):
            warnings.append(
                WarningItem(
                    "normalization_guessed",
                    f"{pointer}/preprocessing",
                    "nothing says how the teacher's images were normalized: it gets the mean and std of the data set",
                    "give the preprocessing of its training: mean and std for each channel, of pixels in 0..1",
                )
            )
    warnings += budget_warnings(spec, known)
    return warnings


def budget_warnings(spec: JobSpec, known: Known) -> Iterator[WarningItem]:
    """Yield a warning if every method of the spec was measured not to help in a training as short as this one."""
    dataset, training = known.dataset, spec.training
    if dataset is None or (spec.unlabelled is not None and known.unlabelled is None):
        return
    images = images_to_train_on(dataset, known.unlabelled, spec.unlabelled, training)
    seen = training.epochs * images / dataset.num_classes
    budgets = [method.short_budget for method in spec.methods if method.short_budget is not None]
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


def teacher_warnings(teacher: Teacher, facts: ModelFacts, dataset: DatasetFacts, pointer: str) -> Iterator[WarningItem]:
    """Yield what is doubtful about a teacher on these images. A resolved spec gets the same words as the one sent."""
    names = class_names(teacher, facts)
    if names and class_order(names, dataset):
        yield WarningItem(
            "class_order_changed",
            f"{pointer}/class_names",
            f"the classes of {_who(pointer)} are the data set's in another order ({_first(names)} and not "
            f"{_first(dataset.class_names)}): its outputs are put into the data set's order",
            "nothing to do if the names are right; a strict job needs a teacher with the data set's order",
        )
    if isinstance(facts, ProgramFacts) or facts.image_size is None:
        return  # Whether a program takes images of this size is a matter of fit(), not of doubt.
    if facts.image_size != dataset.image_size:
        own, given = (" x ".join(map(str, size)) for size in (facts.image_size, dataset.image_size))
        yield WarningItem(
            "image_size_differs",
            "/dataset/image_size",
            f"{_who(pointer)} learned from images of {own} pixels, the data set has {given}",
            "bring the images to that size with dataset.image_size, or compare its accuracy with the one that it had",
        )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def _who(pointer: str) -> str:
    """Return which model: one of several teachers is told by its place in the spec."""
    return f"the {pointer.removeprefix('/')}" if pointer.count("/") == 1 else f"the teacher {pointer}"
