"""What the fields of a spec say about each other.

Each rule looks only at fields that could be read, so that one bad field hides no other fault.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from base.errors import Fault
from kdcore.catalog import METHODS, UnknownName, architecture
from kdcore.spec.methods import BornAgain, Dist, Dkd, FitNet, Kd, Method, Ofd, OnLogits, Options, Rkd
from kdcore.spec.tapping import by_gradient, looks_inside, takes_taps
from kdcore.spec.vocabulary import Dataset, Multistep, Student, Teacher, Training, Unlabelled
from kdcore.spec.weights import is_staged, leaves_labels_alone, uses_temperature

Fields = Mapping[str, Any]

T = TypeVar("T")


@dataclass(frozen=True)
class Named:
    """Something that a spec refers to by name: where it stands, what kind of thing it is, and the name."""

    pointer: str
    kind: Literal["dataset", "teacher", "baseline"]
    text: str


def references(fields: Fields) -> list[Named]:
    """What must be looked up before the spec can be accepted."""
    found = []
    dataset, unlabelled, baseline = fields.get("dataset"), fields.get("unlabelled"), fields.get("baseline")
    if isinstance(dataset, Dataset):
        found.append(Named("/dataset", "dataset", dataset.source))
    if isinstance(unlabelled, Unlabelled):
        found.append(Named("/unlabelled", "dataset", unlabelled.source))
    for pointer, teacher in each_teacher(fields):
        files = {"checkpoint": teacher.checkpoint, "program": teacher.program}
        found += [Named(f"{pointer}/{name}", "teacher", text) for name, text in files.items() if text is not None]
    if isinstance(baseline, str) and baseline.startswith("job:"):
        found.append(Named("/baseline", "baseline", baseline))
    return found


def each_method(fields: Fields) -> list[tuple[str, Method]]:
    """Each method with its pointer."""
    return _each("/method", fields.get("method"))


def each_teacher(fields: Fields) -> list[tuple[str, Teacher]]:
    """Each teacher with its pointer."""
    return _each("/teacher", fields.get("teacher"))


def each_student(fields: Fields) -> list[tuple[str, Student]]:
    """Each student with its pointer; the first is the one that the job is about."""
    return _each("/student", fields.get("student"))


def each_assistant(fields: Fields) -> list[tuple[str, Student]]:
    """Each assistant with its pointer."""
    return _each("/assistants", fields.get("assistants"))


def _each(pointer: str, given: T | tuple[T, ...] | None) -> list[tuple[str, T]]:
    if isinstance(given, tuple):
        return [(f"{pointer}/{position}", one) for position, one in enumerate(given)]
    return [] if given is None else [(pointer, given)]


def scheme_of(fields: Fields) -> str | None:
    """Who teaches whom: what the one method that is more than an objective says."""
    schemes: list[str] = [METHODS[method.name].scheme for _, method in each_method(fields)]
    # Of "alone" beside others, which is refused, the others still say what the client is after.
    found = [scheme for scheme in schemes if scheme not in ("offline", "alone")] or sorted(schemes, reverse=True)
    return found[0] if found else None


def rules(fields: Fields) -> list[Fault]:
    """Every contradiction between the fields that could be read."""
    return [fault for rule in _RULES for fault in rule(fields)]


def _methods_go_together(fields: Fields) -> Iterator[Fault]:
    named = each_method(fields)
    if len(named) < 2:
        return
    schemes = [method for _, method in named if METHODS[method.name].scheme not in ("offline", "alone")]
    for pointer, method in named:
        if METHODS[method.name].scheme == "alone":
            yield Fault(pointer, f"{method.name!r} teaches nothing that could be added", "not_allowed", got=method.name)
        elif method in schemes[1:]:
            text = f"a job has one scheme, and {schemes[0].name!r} is one already"
            yield Fault(pointer, text, "not_allowed", got=method.name)
        elif schemes and method is not schemes[0]:
            yield from _added_to(schemes[0], method, pointer, fields)


def _added_to(scheme: Method, method: Method, pointer: str, fields: Fields) -> Iterator[Fault]:
    """Peers, branches and exits teach each other by one loss, which can own no parameters for each pair of them."""
    if isinstance(scheme, BornAgain) and isinstance(method, Ofd):
        text = "'ofd' reads the margins of one teacher, and each generation has another"
        yield Fault(pointer, text, "not_allowed", "another method", method.name)
    if isinstance(method, OnLogits) or isinstance(scheme, BornAgain):
        return
    if scheme.name != "dml":
        text = f"{scheme.name!r} compares parts of one network by their logits; {method.name!r} looks at more of them"
        yield Fault(pointer, text, "not_allowed", "a method on logits", method.name)
    elif METHODS[method.name].owns != "nothing":
        text = f"{method.name!r} would need parts of its own for each pair of students"
        yield Fault(pointer, text, "not_allowed", "a method that owns nothing", method.name)
    elif is_staged(method):
        text = f"{method.name!r} begins with a stage of its own, in which students have no teacher yet"
        yield Fault(pointer, text, "not_allowed", "a method without stages", method.name)
    elif by_gradient(method):
        text = "students show each other logits and activations, not gradients"
        yield Fault(f"{pointer}/mapping", text, "not_allowed", ["sum", "sum_p", "max_p"], "gradient")
    elif len({student.architecture for _, student in each_student(fields)}) > 1:
        text = f"{method.name!r} compares activations: among students of different architectures it has no common taps"
        yield Fault(pointer, text, "not_allowed", "students of one architecture", method.name)


def _weights_are_for_sums(fields: Fields) -> Iterator[Fault]:
    for pointer, method in each_method(fields):
        if method.weight is None:
            continue
        if METHODS[method.name].beta is None:
            text = f"the method {method.name!r} has no distillation loss"
        elif isinstance(fields["method"], tuple):
            continue
        else:
            text = "a method that stands alone is weighed by beta"
        yield Fault(f"{pointer}/weight", text, "unused", "leave it out", method.weight)


def _nothing_stands_twice(fields: Fields) -> Iterator[Fault]:
    """Whoever gives each a weight of its own means it."""
    for what, named in (("method", each_method(fields)), ("teacher", each_teacher(fields))):
        for position, (pointer, one) in enumerate(named):
            if one.weight is None and any(one == earlier for _, earlier in named[:position]):
                yield Fault(pointer, f"this {what} stands in the list already", "not_allowed", "once, with a weight")


def _teacher_is_needed(fields: Fields) -> Iterator[Fault]:
    named = each_method(fields)
    if not named or "teacher" not in fields:
        return
    scheme = scheme_of(fields)
    if scheme == "offline" and fields["teacher"] is None:
        text = f"the method {_names(named)} needs a teacher"
        yield Fault("/teacher", text, "missing", "an object with a checkpoint, or with a program")
    if scheme not in ("offline", "generations") and fields["teacher"] is not None:
        yield Fault("/teacher", f"the method {_names(named)} has no use for a teacher", "unused", "leave it out")


def _names(named: list[tuple[str, Method]]) -> str:
    return " + ".join(repr(method.name) for _, method in named)


def _each_teacher_is_one_file(fields: Fields) -> Iterator[Fault]:
    for pointer, teacher in each_teacher(fields):
        if teacher.checkpoint is None and teacher.program is None:
            yield Fault(f"{pointer}/checkpoint", "a teacher is a checkpoint or a program", "missing")
        if teacher.checkpoint is not None and teacher.program is not None:
            text = "a teacher is a checkpoint or a program, not both"
            yield Fault(f"{pointer}/program", text, "not_allowed", "one of the two", teacher.program)
        if teacher.program is not None and teacher.architecture is not None:
            text = "a program holds its own network"
            yield Fault(f"{pointer}/architecture", text, "unused", "leave it out", teacher.architecture)
        bare = teacher.checkpoint is not None and teacher.checkpoint.startswith("blob:")
        if bare and teacher.architecture is None:
            yield Fault(f"{pointer}/architecture", "a bare file does not say which network it belongs to", "missing")


def _several_teachers_teach_by_probabilities(fields: Fields) -> Iterator[Fault]:
    given = each_teacher(fields)
    if len(given) == 1 and given[0][1].weight is not None:
        pointer, teacher = given[0]
        yield Fault(f"{pointer}/weight", "there is only one teacher", "unused", "leave it out", teacher.weight)
    if len(given) < 2:
        return
    for pointer, method in each_method(fields):
        if looks_inside(method):
            text = f"several teachers are one in their probabilities alone; {method.name!r} looks inside of one teacher"
            yield Fault("/teacher", text, "not_allowed", "one teacher", len(given))
        elif isinstance(method, Kd) and method.form == "logits_l2":
            text = "of several teachers the probabilities are averaged, which leaves no logits to match"
            yield Fault(
                f"{pointer}/form", text, "not_allowed", ["kl", "cross_entropy", "probabilities_l2"], method.form
            )


def _programs_teach_by_their_logits(fields: Fields) -> Iterator[Fault]:
    for pointer, teacher in each_teacher(fields):
        for _, method in each_method(fields):
            if teacher.program is not None and looks_inside(method):
                what = "its gradient at the image" if by_gradient(method) else "its activations"
                text = f"a program teaches by its logits alone; {method.name!r} needs {what}"
                yield Fault(f"{pointer}/program", text, "not_allowed", "a checkpoint", teacher.program)


def _students_fit_the_scheme(fields: Fields) -> Iterator[Fault]:
    named, scheme = each_student(fields), scheme_of(fields)
    if not named or scheme is None:
        return
    if scheme == "mutual" and len(named) < 2:
        yield Fault("/student", "'dml' trains several students", "too_short", "a list of two or more", len(named))
    if scheme != "mutual" and len(named) > 1:
        yield Fault("/student", "only 'dml' trains several students", "not_allowed", "one student", len(named))
    pointer, first = named[0]
    try:
        facts = architecture(first.architecture)
    except UnknownName:
        return
    if scheme == "ensemble" and facts.source != "kdcore":
        text = f"'one' cuts the student before its last stage; {facts.name} has no known cut"
        yield Fault(f"{pointer}/architecture", text, "not_allowed", "one of the field's networks", facts.name)


def _generations_learn_from_each_other(fields: Fields) -> Iterator[Fault]:
    for pointer, method in each_method(fields):
        if not isinstance(method, BornAgain) or method.generations > 1:
            continue
        if "teacher" in fields and fields["teacher"] is None:
            text = "one generation without a teacher is a student alone: that is the method 'supervised'"
            yield Fault(f"{pointer}/generations", text, "not_allowed", "≥ 2, or a teacher", method.generations)
        if method.answer == "ensemble":
            text = "one generation makes no ensemble"
            yield Fault(f"{pointer}/answer", text, "unused", ["last"], method.answer)


def _assistants_stand_between(fields: Fields) -> Iterator[Fault]:
    if not fields.get("assistants"):
        return
    scheme = scheme_of(fields)
    if scheme is not None and scheme != "offline":
        text = "assistants stand between a trained teacher and one student"
        yield Fault("/assistants", text, "unused", "leave it out")
    for pointer, method in each_method(fields):
        if takes_taps(method):
            text = f"a chain teaches by logits: the taps of {method.name!r} would differ from link to link"
            yield Fault(pointer, text, "not_allowed", "a method on logits", method.name)


def _unlabelled_images_are_taught(fields: Fields) -> Iterator[Fault]:
    unlabelled, training, dataset = fields.get("unlabelled"), fields.get("training"), fields.get("dataset")
    scheme, named = scheme_of(fields), each_method(fields)
    if not isinstance(unlabelled, Unlabelled):
        return
    if isinstance(dataset, Dataset) and dataset.source == unlabelled.source:
        yield not_the_own_images(unlabelled)
    if isinstance(training, Training) and training.mix is not None:
        text = "images of unknown labels cannot be mixed with others"
        yield Fault("/training/mix", text, "not_allowed", "null", training.mix.name)
    if scheme is None:
        return
    if scheme != "offline":
        text = f"{_names(named)} has no trained teacher throughout, who alone can say what is in unlabelled images"
        yield Fault("/unlabelled", text, "unused", "leave it out")
    if unlabelled.labels == "teacher":
        return
    for _, method in named:
        if compares_at_a_label(method) and METHODS[method.name].scheme != "alone":
            text = f"{method.name!r} compares at a label; let the teacher's answers stand in"
            yield Fault("/unlabelled/labels", text, "not_allowed", ["teacher"], unlabelled.labels)
    taught = fields.get("beta") != 0 and not all(leaves_labels_alone(method) for _, method in named)
    if not unlabelled.labelled_too and not taught:
        text = "without labels and without distillation beside them nothing is learned"
        yield Fault("/unlabelled/labels", text, "not_allowed", ["teacher"], unlabelled.labels)


def not_the_own_images(unlabelled: Unlabelled) -> Fault:
    """Where the pool turns out to be the data set itself."""
    text = "these are the data set's own training images, those that are held out to choose the best epoch among them"
    return Fault("/unlabelled/source", text, "not_allowed", "other images", unlabelled.source)


def _mixed_images_have_no_one_label(fields: Fields) -> Iterator[Fault]:
    training = fields.get("training")
    if not isinstance(training, Training) or training.mix is None:
        return
    for _, method in each_method(fields):
        if METHODS[method.name].scheme == "alone":
            continue
        if compares_at_a_label(method):
            text = f"{method.name!r} compares at the one label of an image; mixed images have two"
            yield Fault("/training/mix", text, "not_allowed", "null", training.mix.name)
        elif "sample_index" in METHODS[method.name].needs:
            text = f"{method.name!r} remembers each training image; mixed images are none of them"
            yield Fault("/training/mix", text, "not_allowed", "null", training.mix.name)


def compares_at_a_label(method: Method) -> bool:
    return by_gradient(method) or "labels" in METHODS[method.name].needs


def _temperature_is_used(fields: Fields) -> Iterator[Fault]:
    named, temperature = each_method(fields), fields.get("temperature")
    if not named or temperature is None or any(uses_temperature(method) for _, method in named):
        return
    text = f"the method {_names(named)} has no temperature"
    if len(named) == 1 and isinstance(named[0][1], Kd):
        text = f"the form {named[0][1].form!r} has no temperature"
    if len(named) == 1 and isinstance(named[0][1], FitNet):
        text = "'fitnet' has a temperature only in two stages, the second of which is kd"
    yield Fault("/temperature", text, "unused", "leave it out", temperature)


def _stages_are_used(fields: Fields) -> Iterator[Fault]:
    for pointer, method in each_method(fields):
        epochs = getattr(method, "pretraining_epochs", None)
        if isinstance(method, FitNet) and method.stages == "joint" and epochs is not None:
            text = "a joint training has no stage of its own"
            yield Fault(f"{pointer}/pretraining_epochs", text, "unused", "leave it out", epochs)


def _taps_are_used(fields: Fields) -> Iterator[Fault]:
    for pointer, method in each_method(fields):
        if by_gradient(method) and method.pairs:
            yield Fault(f"{pointer}/taps", "the gradient is taken at the image", "unused", "leave it out")
        if not isinstance(method, Ofd):
            continue
        taps, margins = len(method.taps or ()), len(method.margins or ())
        if taps and not margins:
            text = "taps that are named need the teacher's batch norms, one each"
            yield Fault(f"{pointer}/margins", text, "missing", f"{taps} paths")
        elif margins and not taps:
            text = "margins belong to taps: name both, or neither"
            yield Fault(f"{pointer}/taps", text, "missing", f"{margins} taps")
        elif margins != taps:
            yield Fault(f"{pointer}/margins", "one batch norm for each tap", "not_allowed", f"{taps} paths", margins)


def _weights_mean_something(fields: Fields) -> Iterator[Fault]:
    named, alpha, beta = each_method(fields), fields.get("alpha"), fields.get("beta")
    if not named:
        return
    scheme, names = scheme_of(fields), _names(named)
    if scheme == "alone" and beta is not None:
        yield Fault("/beta", f"the method {names} has no distillation loss", "unused", "leave it out", beta)
    if alpha == 0 and scheme == "alone":
        yield Fault("/alpha", "with alpha 0 there is nothing to learn from", "not_allowed", "> 0", alpha)
    elif alpha == 0 and scheme in ("mutual", "ensemble", "exits"):
        text = f"{names} has no trained teacher: with alpha 0 nobody knows what is right"
        yield Fault("/alpha", text, "not_allowed", "> 0", alpha)
    elif alpha == 0 and all(leaves_labels_alone(method) for _, method in named):
        text = f"after the first stage of {names} there are labels alone: with alpha 0 nothing is learned from them"
        yield Fault("/alpha", text, "not_allowed", "> 0", alpha)
    elif alpha == 0 and beta == 0:
        yield Fault("/beta", "with alpha and beta both 0 there is nothing to learn from", "not_allowed", "> 0", beta)
    if beta == 0:
        for _, method in named:
            if leaves_labels_alone(method):
                text = (
                    f"the first stage of {method.name!r} minimises beta times its loss: with beta 0 it learns nothing"
                )
                yield Fault("/beta", text, "not_allowed", "> 0", beta)


def _parts_of_a_loss_are_not_all_zero(fields: Fields) -> Iterator[Fault]:
    for pointer, method in each_method(fields):
        for kind, names in _PARTS.items():
            if isinstance(method, kind) and not any(getattr(method, name) for name in names):
                text = f"with {' and '.join(names)} both 0 {method.name!r} teaches nothing"
                yield Fault(f"{pointer}/{names[-1]}", text, "not_allowed", "> 0", 0)


_PARTS: dict[type[Options], tuple[str, str]] = {
    Dkd: ("target_weight", "non_target_weight"),
    Dist: ("between_weight", "within_weight"),
    Rkd: ("distance_weight", "angle_weight"),
}


def _baseline_means_something(fields: Fields) -> Iterator[Fault]:
    baseline = fields.get("baseline")
    if baseline not in (None, "none") and scheme_of(fields) == "alone":
        yield Fault("/baseline", "without a teacher the student is its own baseline", "unused", ["none"], baseline)


def _schedule_fits_epochs(fields: Fields) -> Iterator[Fault]:
    training = fields.get("training")
    if not isinstance(training, Training):
        return
    schedule = training.schedule
    if schedule.warmup_epochs >= training.epochs:
        yield Fault(
            "/training/schedule/warmup_epochs", "the warm-up must end before the training", "not_allowed",
            f"< {training.epochs}", schedule.warmup_epochs,
        )  # fmt: skip
    if isinstance(schedule, Multistep) and schedule.milestones:
        rising = all(a < b for a, b in zip(schedule.milestones, schedule.milestones[1:], strict=False))
        if not rising or schedule.milestones[-1] >= training.epochs:
            yield Fault(
                "/training/schedule/milestones", "milestones must rise and lie before the last epoch", "not_allowed",
                f"< {training.epochs}", list(schedule.milestones),
            )  # fmt: skip


def _crop_ranges_rise(fields: Fields) -> Iterator[Fault]:
    training = fields.get("training")
    augmentation = training.augmentation if isinstance(training, Training) else None
    for name in ("scale", "ratio"):
        low, high = getattr(augmentation, name, (0, 0))
        if low > high:
            pointer = f"/training/augmentation/{name}"
            yield Fault(pointer, "the smaller number comes first", "not_allowed", [high, low], [low, high])


_RULES: tuple[Callable[[Fields], Iterator[Fault]], ...] = (
    _methods_go_together,
    _weights_are_for_sums,
    _nothing_stands_twice,
    _teacher_is_needed,
    _each_teacher_is_one_file,
    _several_teachers_teach_by_probabilities,
    _programs_teach_by_their_logits,
    _students_fit_the_scheme,
    _generations_learn_from_each_other,
    _assistants_stand_between,
    _unlabelled_images_are_taught,
    _mixed_images_have_no_one_label,
    _temperature_is_used,
    _stages_are_used,
    _taps_are_used,
    _weights_mean_something,
    _parts_of_a_loss_are_not_all_zero,
    _baseline_means_something,
    _schedule_fits_epochs,
    _crop_ranges_rise,
)
