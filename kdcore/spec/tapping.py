"""Where a method looks, if a spec does not say: the ends of the stages, matched from the deepest back."""

from collections.abc import Callable

from kdcore.catalog import METHODS, ArchitectureFacts
from kdcore.spec.methods import Attention, Method, Pair


def takes_taps(method: Method) -> bool:
    """Whether a method looks at activations of a teacher."""
    return METHODS[method.name].taps != "none" and not by_gradient(method)


def by_gradient(method: Method) -> bool:
    """Whether a method looks at a teacher's gradient at the image."""
    return isinstance(method, Attention) and method.mapping == "gradient"


def looks_inside(method: Method) -> bool:
    """Whether a method looks at more of a teacher than its logits."""
    return takes_taps(method) or by_gradient(method)


def choose(method: Method, student: ArchitectureFacts, teacher: ArchitectureFacts) -> tuple[Pair, ...]:
    """The taps of a method that names none; none where a network has no such place that we know of."""
    kind = METHODS[method.name].taps
    return _CHOICES[kind](student, teacher) if kind != "none" else ()


def margins(pairs: tuple[Pair, ...], teacher: ArchitectureFacts) -> tuple[str, ...]:
    """The teacher's batch norms that feed the chosen taps."""
    return tuple(teacher.margins[-len(pairs) :])


def _paired(student: list[str], teacher: list[str]) -> tuple[Pair, ...]:
    """A network of fewer stages is held against the deepest ones of the other: there the maps are alike in size."""
    count = min(len(student), len(teacher))
    pairs = zip(student[len(student) - count :], teacher[len(teacher) - count :], strict=True)
    return tuple(Pair(student=one, teacher=other) for one, other in pairs)


def _embeddings(student: ArchitectureFacts, teacher: ArchitectureFacts) -> tuple[Pair, ...]:
    if student.embedding is None or teacher.embedding is None:
        return ()
    return (Pair(student=student.embedding, teacher=teacher.embedding),)


def _stages(student: ArchitectureFacts, teacher: ArchitectureFacts) -> tuple[Pair, ...]:
    return _paired(student.taps, teacher.taps)


def _middle_stage(student: ArchitectureFacts, teacher: ArchitectureFacts) -> tuple[Pair, ...]:
    pairs = _stages(student, teacher)
    return pairs[len(pairs) // 2 :][:1]


def _last_stage(student: ArchitectureFacts, teacher: ArchitectureFacts) -> tuple[Pair, ...]:
    return _stages(student, teacher)[-1:]


def _flows(student: ArchitectureFacts, teacher: ArchitectureFacts) -> tuple[Pair, ...]:
    """The first flow runs from what enters the first stage to its end."""
    pairs = _stages(student, teacher)
    plain = [pair for pair in pairs[:1] if "@" not in pair.student + pair.teacher]
    return (*(Pair(student=f"{pair.student}@in", teacher=f"{pair.teacher}@in") for pair in plain), *pairs)


def _preactivations(student: ArchitectureFacts, teacher: ArchitectureFacts) -> tuple[Pair, ...]:
    """The student's connector can make up for a ReLU; what the teacher's neurons were about to do cannot be guessed."""
    return _paired(student.preactivations or student.taps, teacher.preactivations)


def _margins(student: ArchitectureFacts, teacher: ArchitectureFacts) -> tuple[Pair, ...]:
    return _preactivations(student, teacher) if teacher.margins else ()


def _review(student: ArchitectureFacts, teacher: ArchitectureFacts) -> tuple[Pair, ...]:
    stages = _paired(student.taps, teacher.preactivations or teacher.taps)
    embeddings = _embeddings(student, teacher)
    return (*stages, *embeddings) if stages and embeddings else ()


_CHOICES: dict[str, Callable[[ArchitectureFacts, ArchitectureFacts], tuple[Pair, ...]]] = {
    "embedding": _embeddings,
    "last_stage": _last_stage,
    "middle_stage": _middle_stage,
    "stages": _stages,
    "flows": _flows,
    "preactivations": _preactivations,
    "margins": _margins,
    "review": _review,
}
