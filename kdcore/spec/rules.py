"""The rules between the fields of a spec.

Each rule reads only fields that are valid by themselves, so that one bad field hides no other fault.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from base.errors import Fault
from kdcore.catalog import UnknownName, architecture
from kdcore.spec.inputs import Dataset, Student, Teacher, Unlabelled
from kdcore.spec.job import TRAINED_BASELINES
from kdcore.spec.methods import METHODS, Method, scheme_of
from kdcore.spec.methods.options import SchemeKind
from kdcore.spec.recipe import Multistep, RandomResizedCrop, Training
from kdcore.spec.shipping import Quantization, default_aware_epochs

Fields = Mapping[str, Any]
"""The top-level fields of a spec that are valid by themselves."""

T = TypeVar("T")


def each_method(fields: Fields) -> list[tuple[str, Method]]:
    """Return the methods, each with its pointer."""
    return _each("/method", fields.get("method"))


def each_teacher(fields: Fields) -> list[tuple[str, Teacher]]:
    """Return the teachers, each with its pointer."""
    return _each("/teacher", fields.get("teacher"))


def each_student(fields: Fields) -> list[tuple[str, Student]]:
    """Return the students, each with its pointer. The first is the result of the job."""
    return _each("/student", fields.get("student"))


def each_assistant(fields: Fields) -> list[tuple[str, Student]]:
    """Return the assistants, each with its pointer."""
    return _each("/assistants", fields.get("assistants"))


def each_start(fields: Fields) -> list[tuple[str, Student]]:
    """Return the students and assistants that start from a checkpoint, each with its pointer."""
    return [(at, one) for at, one in (*each_student(fields), *each_assistant(fields)) if one.checkpoint is not None]


def _each(pointer: str, given: T | tuple[T, ...] | None) -> list[tuple[str, T]]:
    if isinstance(given, tuple):
        return [(f"{pointer}/{position}", one) for position, one in enumerate(given)]
    return [] if given is None else [(pointer, given)]


def scheme_kind(fields: Fields) -> SchemeKind | None:
    """Return the scheme of the job; None if its methods are not valid."""
    methods = [method for _, method in each_method(fields)]
    return scheme_of(methods).kind if methods else None


def rules(fields: Fields) -> list[Fault]:
    """Return every contradiction between these fields."""
    return [fault for rule in _RULES for fault in rule(fields)]


def tags_without_weights(fields: Fields) -> Iterator[Fault]:
    """Yield the faults of students named with a tag of weights (`timm/resnet18.a1_in1k`) that do not start from them.

    No rule of every spec: earlier versions accepted such a name, built the network of random weights, and wrote the
    name into resolved specs, which must run as they did.
    """
    for pointer, student in (*each_student(fields), *each_assistant(fields)):
        network, dot, _ = student.architecture.partition(".")
        published = f"weights:{student.architecture}"
        if dot and student.checkpoint != published:
            text = (
                f"{student.architecture} names weights, and an architecture alone starts from random ones: give "
                f"'checkpoint': '{published}', too, or leave out the tag"
            )
            allowed = [{"architecture": network, "checkpoint": published}, {"architecture": network}]
            yield Fault(f"{pointer}/architecture", text, "not_allowed", allowed, student.architecture)


def _methods_go_together(fields: Fields) -> Iterator[Fault]:
    named = each_method(fields)
    if len(named) < 2:
        return
    schemes = [method for _, method in named if _is_scheme(method)]
    for pointer, method in named:
        if method.facts.scheme == "alone":
            text = f"{method.name!r} has no distillation loss that could be added"
            yield Fault(pointer, text, "not_allowed", got=method.name)
        elif method in schemes[1:]:
            text = f"a job has one scheme, and {schemes[0].name!r} is already one"
            yield Fault(pointer, text, "not_allowed", got=method.name)
        elif schemes and method is not schemes[0]:
            yield from _added_to(schemes[0], method, pointer, fields)


def _added_to(scheme: Method, method: Method, pointer: str, fields: Fields) -> Iterator[Fault]:
    """Yield the faults of a method beside a scheme. Peers, branches and exits share a loss, which cannot own parameters
    for each pair of them."""
    if scheme.facts.scheme == "generations":
        if "batch_norm" in method.facts.needs:
            text = f"{method.name!r} reads the margins of one teacher, and each generation has another teacher"
            yield Fault(pointer, text, "not_allowed", "another method", method.name)
    elif not method.looks_inside:
        return
    elif scheme.facts.scheme != "mutual":
        text = f"{scheme.name!r} compares parts of one network by their logits; {method.name!r} needs more than logits"
        yield Fault(pointer, text, "not_allowed", "a method on logits", method.name)
    elif method.facts.owns != "nothing":
        text = f"{method.name!r} would need parameters of its own for each pair of students"
        yield Fault(pointer, text, "not_allowed", "a method that owns nothing", method.name)
    elif method.first_stage is not None:
        text = f"{method.name!r} has a first stage, in which the students have no teacher yet"
        yield Fault(pointer, text, "not_allowed", "a method without stages", method.name)
    elif method.compares_taps and len({student.architecture for _, student in each_student(fields)}) > 1:
        text = f"{method.name!r} compares activations: among students of different architectures it has no common taps"
        yield Fault(pointer, text, "not_allowed", "students of one architecture", method.name)


def _is_scheme(method: Method) -> bool:
    return method.facts.scheme not in ("offline", "alone")


def _options_go_together(fields: Fields) -> Iterator[Fault]:
    teachers, scheme = len(each_teacher(fields)) if "teacher" in fields else None, scheme_kind(fields)
    for pointer, method in each_method(fields):
        for fault in method.contradictions(teachers, scheme):
            yield replace(fault, pointer=pointer + fault.pointer)


def _weights_are_for_sums(fields: Fields) -> Iterator[Fault]:
    for pointer, method in each_method(fields):
        if method.weight is None:
            continue
        if method.facts.beta is None:
            text = f"the method {method.name!r} has no distillation loss"
        elif isinstance(fields["method"], tuple):
            continue
        else:
            text = "a method that stands alone is weighed by beta"
        yield Fault(f"{pointer}/weight", text, "unused", "leave it out", method.weight)


def _nothing_is_listed_twice(fields: Fields) -> Iterator[Fault]:
    """Yield the faults of repeated entries. A repetition with its own weight is intended and therefore allowed."""
    for what, named in (("method", each_method(fields)), ("teacher", each_teacher(fields))):
        for position, (pointer, one) in enumerate(named):
            if one.weight is None and any(one == earlier for _, earlier in named[:position]):
                yield Fault(pointer, f"this {what} is already in the list", "not_allowed", "once, with a weight")


def _teacher_is_needed(fields: Fields) -> Iterator[Fault]:
    named = each_method(fields)
    if not named or "teacher" not in fields:
        return
    scheme = scheme_kind(fields)
    if scheme == "offline" and fields["teacher"] is None:
        text = f"the method {_names(named)} needs a teacher"
        yield Fault("/teacher", text, "missing", "an object with a checkpoint, or with a program")
    if scheme not in ("offline", "generations") and fields["teacher"] is not None:
        yield Fault("/teacher", f"the method {_names(named)} takes no teacher", "unused", "leave it out")


def _names(named: list[tuple[str, Method]]) -> str:
    return " + ".join(repr(method.name) for _, method in named)


def _each_teacher_is_one_file(fields: Fields) -> Iterator[Fault]:
    for pointer, teacher in each_teacher(fields):
        files = [name for name in ("checkpoint", "program", "logits") if getattr(teacher, name) is not None]
        if not files:
            text = "a teacher is a checkpoint or a program, or a file of its logits"
            yield Fault(f"{pointer}/checkpoint", text, "missing")
        for name in files[1:]:
            text = f"a teacher is one file, and {files[0]} names one already"
            yield Fault(f"{pointer}/{name}", text, "not_allowed", "one of the two", getattr(teacher, name))
        if teacher.program is not None and teacher.architecture is not None:
            text = "a program holds its own network"
            yield Fault(f"{pointer}/architecture", text, "unused", "leave it out", teacher.architecture)
        if teacher.logits is None:
            yield from _one_network(teacher, pointer, teacher.program is not None)


def _one_network(model: Teacher | Student, pointer: str, is_program: bool = False) -> Iterator[Fault]:
    """Yield the faults of a choice between the networks of a file that holds one."""
    if not is_program and not (model.checkpoint or "").startswith(("weights:", "job:")):
        return
    for name in ("part", "averaged"):
        given = getattr(model, name)
        if given is not None:
            text = "only a checkpoint's file may hold several networks"
            yield Fault(f"{pointer}/{name}", text, "unused", "leave it out", given)


def _several_teachers_are_averaged(fields: Fields) -> Iterator[Fault]:
    given = each_teacher(fields)
    if len(given) == 1 and given[0][1].weight is not None:
        pointer, teacher = given[0]
        yield Fault(f"{pointer}/weight", "there is only one teacher", "unused", "leave it out", teacher.weight)
    if len(given) < 2:
        return
    for _, method in each_method(fields):
        if method.looks_inside:
            text = f"of several teachers only the probabilities are averaged; {method.name!r} looks inside one teacher"
            yield Fault("/teacher", text, "not_allowed", "one teacher", len(given))


def _programs_give_only_logits(fields: Fields) -> Iterator[Fault]:
    for pointer, teacher in each_teacher(fields):
        if teacher.program is not None:
            yield from only_logits(fields, f"{pointer}/program", teacher.program)
        if teacher.logits is not None:
            yield from only_logits(fields, f"{pointer}/logits", teacher.logits, "a file of logits")


def _stored_logits_are_of_known_images(fields: Fields) -> Iterator[Fault]:
    """Yield the faults of logits in a file that are asked for images, or in an order, which the file cannot know."""
    given, training = each_teacher(fields), fields.get("training")
    for pointer, teacher in given:
        if teacher.logits is None:
            continue
        at = f"{pointer}/logits"
        if len(given) > 1:
            text = "a file of logits is a teacher alone; average the logits of several before saving them"
            yield Fault(at, text, "not_allowed", "one teacher", teacher.logits)
        for name in ("architecture", "part", "averaged", "preprocessing", "class_names", "class_map", "image_size"):
            value = getattr(teacher, name)
            if value is not None:
                text = "a file of logits has no network: its rows and columns must be in the data set's order"
                yield Fault(f"{pointer}/{name}", text, "unused", "leave it out")
        if fields.get("unlabelled") is not None:
            text = "a file of logits has rows for the data set's training images only"
            yield Fault("/unlabelled", text, "not_allowed", "null, or a network as the teacher")
        if not isinstance(training, Training):
            continue
        if training.mix is not None:
            text = "mixed images are others in each epoch, and a file of logits cannot have them"
            yield Fault("/training/mix", text, "not_allowed", "null", training.mix.name)
        if isinstance(training.augmentation, RandomResizedCrop):
            text = "random_resized_crop draws other boxes in each epoch, and a file of logits cannot have them"
            allowed = ["none", "crop_flip with logits of all its views"]
            yield Fault("/training/augmentation", text, "not_allowed", allowed, training.augmentation.name)


def only_logits(fields: Fields, pointer: str, file: str | None, what: str = "a program") -> Iterator[Fault]:
    """Yield the faults of methods that look inside a teacher that has only logits; `pointer` is the file's field."""
    for _, method in each_method(fields):
        if method.looks_inside:
            needed = "its gradient at the image" if method.compares_gradients else "its activations"
            text = f"{what} gives only logits; {method.name!r} needs {needed}"
            yield Fault(pointer, text, "not_allowed", "a checkpoint", file)


def _students_fit_the_scheme(fields: Fields) -> Iterator[Fault]:
    named, scheme = each_student(fields), scheme_kind(fields)
    if not named or scheme is None:
        return
    mutual = " and ".join(repr(name) for name, method in METHODS.items() if method.facts.scheme == "mutual")
    if scheme == "mutual" and len(named) < 2:
        yield Fault("/student", f"{mutual} trains several students", "too_short", "a list of two or more", len(named))
    if scheme != "mutual" and len(named) > 1:
        yield Fault("/student", f"only {mutual} trains several students", "not_allowed", "one student", len(named))
    pointer, first = named[0]
    try:
        facts = architecture(first.architecture)
    except UnknownName:
        return
    if scheme == "ensemble" and facts.source != "kdcore":
        branched = next(method.name for _, method in each_method(fields) if _is_scheme(method))
        text = f"{branched!r} branches the student before its last stage, and that place in {facts.name} is not known"
        yield Fault(f"{pointer}/architecture", text, "not_allowed", "one of kdcore's own networks", facts.name)


def _only_a_checkpoint_is_taken_over(fields: Fields) -> Iterator[Fault]:
    for pointer, student in (*each_student(fields), *each_assistant(fields)):
        if student.checkpoint is not None:
            yield from _one_network(student, pointer)
            continue
        for name, why in (
            ("freeze", "frozen modules would keep random weights"),
            ("head_lr", "all parameters are fresh"),
            ("class_names", "there is no classifier to compare them with"),
            ("part", "there is no file to choose from"),
            ("averaged", "there is no file to choose from"),
        ):
            given = getattr(student, name)
            if given not in (None, ()):
                text = f"without a checkpoint {why}"
                got = list(given) if isinstance(given, tuple) else given
                yield Fault(f"{pointer}/{name}", text, "unused", "leave it out, or give a checkpoint", got)


def _assistants_have_a_teacher(fields: Fields) -> Iterator[Fault]:
    if not fields.get("assistants"):
        return
    scheme = scheme_kind(fields)
    if scheme is not None and scheme != "offline":
        text = "assistants need a trained teacher and one student"
        yield Fault("/assistants", text, "unused", "leave it out")
    for pointer, method in each_method(fields):
        if method.compares_taps:
            text = (
                f"a chain of assistants compares logits: the taps of {method.name!r} would differ between the networks"
            )
            yield Fault(pointer, text, "not_allowed", "a method on logits", method.name)


def _unlabelled_images_have_a_teacher(fields: Fields) -> Iterator[Fault]:
    unlabelled, training, dataset = fields.get("unlabelled"), fields.get("training"), fields.get("dataset")
    scheme, named = scheme_kind(fields), each_method(fields)
    if not isinstance(unlabelled, Unlabelled):
        return
    if isinstance(dataset, Dataset) and dataset.source == unlabelled.source:
        yield not_the_own_images(unlabelled)
    if isinstance(training, Training) and training.mix is not None:
        text = "images without labels cannot be mixed"
        yield Fault("/training/mix", text, "not_allowed", "null", training.mix.name)
    if scheme is None:
        return
    if scheme != "offline":
        text = f"unlabelled images need a trained teacher during the whole job; {_names(named)} has none"
        yield Fault("/unlabelled", text, "unused", "leave it out")
    if unlabelled.labels == "teacher":
        return
    for _, method in named:
        if method.compares_at_label and method.facts.scheme != "alone":
            text = f"{method.name!r} needs a label for each image; let the teacher's answers be the labels"
            yield Fault("/unlabelled/labels", text, "not_allowed", ["teacher"], unlabelled.labels)
    taught = fields.get("beta") != 0 and not all(_adds_nothing_to_labels(method) for _, method in named)
    if not unlabelled.labelled_too and not taught:
        text = "without labels and without a distillation loss nothing is learned"
        yield Fault("/unlabelled/labels", text, "not_allowed", ["teacher"], unlabelled.labels)


def not_the_own_images(unlabelled: Unlabelled) -> Fault:
    """Return the fault of unlabelled images that are the data set itself."""
    text = "these are the data set's own training images, and some of them are held out to choose the best epoch"
    return Fault("/unlabelled/source", text, "not_allowed", "other images", unlabelled.source)


def _graphs_are_for_gpus(fields: Fields) -> Iterator[Fault]:
    training = fields.get("training")
    if isinstance(training, Training) and training.step == "graph" and training.device == "cpu":
        text = "a step is captured as a graph on a GPU only, and device is 'cpu'"
        yield Fault("/training/step", text, "not_allowed", ["eager"], training.step)


def _mixed_images_have_no_one_label(fields: Fields) -> Iterator[Fault]:
    training = fields.get("training")
    if not isinstance(training, Training) or training.mix is None:
        return
    for _, method in each_method(fields):
        if method.facts.scheme == "alone":
            continue
        if method.compares_at_label:
            text = f"{method.name!r} needs one label for each image; mixed images have two"
            yield Fault("/training/mix", text, "not_allowed", "null", training.mix.name)
        elif "sample_index" in method.facts.needs:
            text = (
                f"{method.name!r} stores an embedding of each training image, but a mixed image is not a training image"
            )
            yield Fault("/training/mix", text, "not_allowed", "null", training.mix.name)


def _temperature_is_used(fields: Fields) -> Iterator[Fault]:
    named, temperature = each_method(fields), fields.get("temperature")
    if not named or temperature is None or any(method.own_temperature is not None for _, method in named):
        return
    text = named[0][1].no_temperature if len(named) == 1 else f"the method {_names(named)} has no temperature"
    yield Fault("/temperature", text, "unused", "leave it out", temperature)


def _weights_mean_something(fields: Fields) -> Iterator[Fault]:
    named, alpha, beta = each_method(fields), fields.get("alpha"), fields.get("beta")
    if not named:
        return
    scheme, names = scheme_kind(fields), _names(named)
    if scheme == "alone" and beta is not None:
        yield Fault("/beta", f"the method {names} has no distillation loss", "unused", "leave it out", beta)
    if alpha == 0 and scheme == "alone":
        yield Fault("/alpha", "with alpha 0 there is nothing to learn from", "not_allowed", "> 0", alpha)
    elif alpha == 0 and scheme in ("mutual", "ensemble", "exits"):
        text = f"{names} has no trained teacher: with alpha 0 nothing is learned from the labels"
        yield Fault("/alpha", text, "not_allowed", "> 0", alpha)
    elif alpha == 0 and all(_adds_nothing_to_labels(method) for _, method in named):
        text = f"after its first stage {names} learns from the labels alone: with alpha 0 it learns nothing"
        yield Fault("/alpha", text, "not_allowed", "> 0", alpha)
    elif alpha == 0 and beta == 0:
        yield Fault("/beta", "with alpha and beta both 0 there is nothing to learn from", "not_allowed", "> 0", beta)
    if beta == 0:
        for _, method in named:
            if _adds_nothing_to_labels(method):
                stage = f"the first stage of {method.name!r}"
                text = f"{stage} minimises beta times its loss: with beta 0 it learns nothing"
                yield Fault("/beta", text, "not_allowed", "> 0", beta)


def _adds_nothing_to_labels(method: Method) -> bool:
    return method.first_stage is not None and method.first_stage.then_labels_alone


def _parts_of_a_loss_are_not_all_zero(fields: Fields) -> Iterator[Fault]:
    for pointer, method in each_method(fields):
        parts = method.loss_parts
        if parts and not any(getattr(method, part) for part in parts):
            text = f"with {' and '.join(parts)} both 0 {method.name!r} teaches nothing"
            yield Fault(f"{pointer}/{parts[-1]}", text, "not_allowed", "> 0", 0)


def _baseline_means_something(fields: Fields) -> Iterator[Fault]:
    baseline = fields.get("baseline")
    if baseline not in (None, "none") and scheme_kind(fields) == "alone":
        yield Fault("/baseline", "a student without a teacher is its own baseline", "unused", ["none"], baseline)


def _seeds_are_of_whole_runs(fields: Fields) -> Iterator[Fault]:
    if (seeds := fields.get("seeds", 1)) == 1:
        return
    if scheme_kind(fields) == "generations":
        text = "each generation has a seed of its own already, and the last one depends on all"
        yield Fault("/seeds", text, "not_allowed", 1, seeds)
    training = fields.get("training")
    if isinstance(training, Training) and training.seed + seeds > 2**63:
        text = "the seeds are training.seed and those after it, of which the last is at most 2**63 - 1"
        yield Fault("/training/seed", text, "not_allowed", f"<= {2**63 - seeds}", training.seed)
    baseline = fields.get("baseline", "none")
    if baseline not in ("none", *TRAINED_BASELINES):
        text = "another job trained one student alone, with one seed: with several seeds, each needs its own"
        yield Fault("/baseline", text, "not_allowed", list(TRAINED_BASELINES), baseline)


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
                "/training/schedule/milestones", "milestones must rise and be before the last epoch", "not_allowed",
                f"< {training.epochs}", list(schedule.milestones),
            )  # fmt: skip


def _int8_is_trained_after_float(fields: Fields) -> Iterator[Fault]:
    """Yield the faults of training for int8: it goes on from a network that is trained already, and one network is
    rounded as it will be exported."""
    asked, training = fields.get("quantization"), fields.get("training")
    if not isinstance(asked, Quantization):
        return
    if not asked.aware:
        if asked.epochs is not None:
            text = "without aware no epoch trains for int8"
            yield Fault("/quantization/epochs", text, "unused", "leave it out", asked.epochs)
        return
    schemes = [method for _, method in each_method(fields) if _is_scheme(method)]
    for method in schemes[:1]:
        if method.facts.scheme == "ensemble":
            text = f"{method.name!r} trains branches on one trunk together, and int8 is trained for one network alone"
            yield Fault("/quantization", text, "not_allowed", "leave it out, or another method", method.name)
        elif scheme_of((method,)).ensemble_is_result:
            text = f"{method.name!r} delivers an ensemble of all generations, and int8 is trained for one network alone"
            yield Fault("/quantization", text, "not_allowed", "leave it out, or without the ensemble", method.name)
    if not isinstance(training, Training):
        return
    epochs = asked.epochs if asked.epochs is not None else default_aware_epochs(training.epochs)
    if epochs > training.epochs:
        text = "epochs that train for int8 are among those of the training"
        yield Fault("/quantization/epochs", text, "not_allowed", f"<= {training.epochs}", epochs)
    elif epochs == training.epochs and not all(student.checkpoint for _, student in each_student(fields)):
        text = "a student of random weights trains in float first: training for int8 keeps its batch-norm statistics"
        allowed = (
            f"< {training.epochs}" if training.epochs > 1 else "more training.epochs, or a student with a checkpoint"
        )
        yield Fault("/quantization/epochs", text, "not_allowed", allowed, epochs)


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
    _options_go_together,
    _weights_are_for_sums,
    _nothing_is_listed_twice,
    _teacher_is_needed,
    _each_teacher_is_one_file,
    _several_teachers_are_averaged,
    _programs_give_only_logits,
    _stored_logits_are_of_known_images,
    _students_fit_the_scheme,
    _only_a_checkpoint_is_taken_over,
    _assistants_have_a_teacher,
    _unlabelled_images_have_a_teacher,
    _graphs_are_for_gpus,
    _mixed_images_have_no_one_label,
    _temperature_is_used,
    _weights_mean_something,
    _parts_of_a_loss_are_not_all_zero,
    _baseline_means_something,
    _seeds_are_of_whole_runs,
    _schedule_fits_epochs,
    _int8_is_trained_after_float,
    _crop_ranges_rise,
)
