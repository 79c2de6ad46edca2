"""What the fields of a spec say about each other.

Each rule looks only at fields that could be read, so that one bad field hides no other fault.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from kdcore.catalog import METHODS, UnknownName, architecture
from kdcore.errors import Fault
from kdcore.spec.methods import Attention, BornAgain, FitNet, Kd, Method, Ofd, OnLogits
from kdcore.spec.tapping import takes_taps
from kdcore.spec.vocabulary import Dataset, Multistep, Student, Teacher, Training, Unlabelled
from kdcore.spec.weights import is_staged, uses_temperature

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


def rules(fields: Fields) -> list[Fault]:
    """Every contradiction between the fields that could be read."""
    return [fault for rule in _RULES for fault in rule(fields)]


def _lists_are_not_empty(fields: Fields) -> Iterator[Fault]:
    for name in ("method", "teacher", "student"):
        if fields.get(name) == ():
            yield Fault(f"/{name}", "a list names one or more", "too_short", "at least 1 long", 0)


def _methods_go_together(fields: Fields) -> Iterator[Fault]:
    named = each_method(fields)
    if len(named) == 1 and named[0][1].weight is not None:
        pointer, method = named[0]
        yield Fault(
            f"{pointer}/weight",
            "a method that stands alone is weighed by beta",
            "unused",
            "leave it out",
            method.weight,
        )
    if len(named) < 2:
        return
    schemes = [method for _, method in named if METHODS[method.name].scheme != "offline"]
    for pointer, method in named:
        facts = METHODS[method.name]
        if facts.scheme == "alone":
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
        text = f"{scheme.name!r} compares parts of one network by their logits; {method.name!r} looks at activations"
        yield Fault(pointer, text, "not_allowed", "a method on logits", method.name)
    elif METHODS[method.name].owns != "nothing" or is_staged(method) or not takes_taps(method):
        text = f"{method.name!r} would need parts or stages of its own for each pair of students"
        yield Fault(pointer, text, "not_allowed", "a method that owns nothing", method.name)
    elif len({student.architecture for _, student in each_student(fields)}) > 1:
        text = f"{method.name!r} compares activations: among students of different architectures it has no common taps"
        yield Fault(pointer, text, "not_allowed", "students of one architecture", method.name)


def _teacher_is_needed(fields: Fields) -> Iterator[Fault]:
    named = each_method(fields)
    if not named or "teacher" not in fields or fields["teacher"] == ():
        return
    scheme = scheme_of(fields)
    names = " + ".join(repr(method.name) for _, method in named)
    if scheme in ("offline", "generations"):
        required = [method.name for _, method in named if METHODS[method.name].teacher == "required"]
        if fields["teacher"] is None and required:
            text = f"the method {required[0]!r} needs a teacher"
            yield Fault("/teacher", text, "missing", "an object with a checkpoint")
    elif fields["teacher"] is not None:
        yield Fault("/teacher", f"the method {names} has no use for a teacher", "unused", "leave it out")


def _each_teacher_is_one_file(fields: Fields) -> Iterator[Fault]:
    for pointer, teacher in each_teacher(fields):
        if teacher.checkpoint is None and teacher.program is None:
            yield Fault(f"{pointer}/checkpoint", "a teacher is a checkpoint or a program", "missing")
        if teacher.checkpoint is not None and teacher.program is not None:
            yield Fault(f"{pointer}/program", "a teacher is a checkpoint or a program, not both", "unused")
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
        if not isinstance(method, OnLogits):
            text = f"several teachers have no common activations; {method.name!r} needs one teacher"
            yield Fault("/teacher", text, "not_allowed", "one teacher", len(given))
        elif isinstance(method, Kd) and method.form == "logits_l2":
            text = "of several teachers the probabilities are averaged, which leaves no logits to match"
            yield Fault(
                f"{pointer}/form", text, "not_allowed", ["kl", "cross_entropy", "probabilities_l2"], method.form
            )


def _programs_have_no_taps(fields: Fields) -> Iterator[Fault]:
    for pointer, teacher in each_teacher(fields):
        for _, method in each_method(fields):
            if teacher.program is not None and takes_taps(method):
                text = f"a program teaches by its logits alone; {method.name!r} needs its activations"
                yield Fault(f"{pointer}/program", text, "not_allowed", "a checkpoint")


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
    unlabelled, training = fields.get("unlabelled"), fields.get("training")
    scheme, named = scheme_of(fields), each_method(fields)
    if not isinstance(unlabelled, Unlabelled) or scheme is None:
        return
    if scheme != "offline":
        yield Fault("/unlabelled", "only a trained teacher can say what is in unlabelled images", "unused")
    if isinstance(training, Training) and training.mix is not None:
        text = "images of unknown labels cannot be mixed with others"
        yield Fault("/training/mix", text, "not_allowed", "null", training.mix.name)
    if unlabelled.labels == "teacher":
        return
    for _, method in named:
        if _needs_labels(method):
            text = f"{method.name!r} compares at a label; let the teacher's answers stand in"
            yield Fault("/unlabelled/labels", text, "not_allowed", ["teacher"], unlabelled.labels)
    if not unlabelled.labelled_too and (fields.get("beta") == 0 or all(is_staged(method) for _, method in named)):
        yield Fault(
            "/unlabelled/labels", "without labels and distillation nothing is learned", "not_allowed", ["teacher"]
        )


def _mixed_images_have_no_one_label(fields: Fields) -> Iterator[Fault]:
    training = fields.get("training")
    if not isinstance(training, Training) or training.mix is None:
        return
    for _, method in each_method(fields):
        if _needs_labels(method) and METHODS[method.name].scheme != "alone":
            text = f"{method.name!r} looks at one label (or one row) for each image; mixed images have two"
            yield Fault("/training/mix", text, "not_allowed", "null", training.mix.name)


def _needs_labels(method: Method) -> bool:
    by_gradient = isinstance(method, Attention) and method.mapping == "gradient"
    return by_gradient or "labels" in METHODS[method.name].needs


def _temperature_is_used(fields: Fields) -> Iterator[Fault]:
    named, temperature = each_method(fields), fields.get("temperature")
    if not named or temperature is None or any(uses_temperature(method) for _, method in named):
        return
    method = named[0][1]
    text = f"the method {method.name!r} has no temperature"
    if isinstance(method, Kd):
        text = f"the form {method.form!r} has no temperature"
    yield Fault("/temperature", text, "unused", "leave it out", temperature)


def _stages_are_used(fields: Fields) -> Iterator[Fault]:
    for pointer, method in each_method(fields):
        epochs = getattr(method, "pretraining_epochs", None)
        if isinstance(method, FitNet) and method.stages == "joint" and epochs is not None:
            text = "a joint training has no stage of its own"
            yield Fault(f"{pointer}/pretraining_epochs", text, "unused", "leave it out", epochs)


def _taps_are_used(fields: Fields) -> Iterator[Fault]:
    for pointer, method in each_method(fields):
        if isinstance(method, Attention) and method.mapping == "gradient" and method.taps is not None:
            yield Fault(f"{pointer}/taps", "the gradient is taken at the image", "unused", "leave it out")
        if isinstance(method, Ofd) and method.taps is not None and method.margins is None:
            text = "taps that are named need the teacher's batch norms, one each"
            yield Fault(f"{pointer}/margins", text, "missing", f"{len(method.taps)} paths")
        if isinstance(method, Ofd) and method.margins is not None and len(method.margins) != len(method.taps or ()):
            text = "one batch norm for each tap"
            yield Fault(f"{pointer}/margins", text, "not_allowed", len(method.taps or ()), len(method.margins))


def _weights_mean_something(fields: Fields) -> Iterator[Fault]:
    named, alpha, beta = each_method(fields), fields.get("alpha"), fields.get("beta")
    if not named:
        return
    name = named[0][1].name
    if scheme_of(fields) == "alone":
        if beta is not None:
            yield Fault("/beta", f"the method {name!r} has no distillation loss", "unused", "leave it out", beta)
        if alpha == 0:
            yield Fault("/alpha", "with alpha 0 there is nothing to learn from", "not_allowed", "> 0", alpha)
    elif alpha == 0 and beta == 0:
        yield Fault("/beta", "with alpha and beta both 0 there is nothing to learn from", "not_allowed", "> 0", beta)


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
    _lists_are_not_empty,
    _methods_go_together,
    _teacher_is_needed,
    _each_teacher_is_one_file,
    _several_teachers_teach_by_probabilities,
    _programs_have_no_taps,
    _students_fit_the_scheme,
    _assistants_stand_between,
    _unlabelled_images_are_taught,
    _mixed_images_have_no_one_label,
    _temperature_is_used,
    _stages_are_used,
    _taps_are_used,
    _weights_mean_something,
    _baseline_means_something,
    _schedule_fits_epochs,
    _crop_ranges_rise,
)


def scheme_of(fields: Fields) -> str | None:
    """Who teaches whom: what the one method that is more than an objective says."""
    schemes = [METHODS[method.name].scheme for _, method in each_method(fields)]
    return next((scheme for scheme in schemes if scheme != "offline"), schemes[0] if schemes else None)
