"""The default taps of a method, by kind: ends of blocks or embeddings, paired from the deepest backwards."""

from collections.abc import Callable
from typing import Literal

from kdcore.catalog import ArchitectureFacts
from kdcore.spec.vocabulary import Pair

TapKind = Literal[
    "none", "embedding", "last_stage", "middle_stage", "stages", "flows", "preactivations", "margins", "review"
]
Pairs = tuple[Pair, ...]


def choose(kind: TapKind, student: ArchitectureFacts, teacher: ArchitectureFacts) -> Pairs:
    """Return the default pairs of a kind; none if one of the networks has no such place, or no known one."""
    return _CHOICES[kind](student, teacher)


def _none(student: ArchitectureFacts, teacher: ArchitectureFacts) -> Pairs:
    return ()


def _paired(student: list[str], teacher: list[str]) -> Pairs:
    """Pair from the deepest place backwards, because the deepest maps of two networks are most similar in size."""
    count = min(len(student), len(teacher))
    pairs = zip(student[len(student) - count :], teacher[len(teacher) - count :], strict=True)
    return tuple(Pair(student=one, teacher=other) for one, other in pairs)


def _embedding(student: ArchitectureFacts, teacher: ArchitectureFacts) -> Pairs:
    if student.embedding is None or teacher.embedding is None:
        return ()
    return (Pair(student=student.embedding, teacher=teacher.embedding),)


def _stages(student: ArchitectureFacts, teacher: ArchitectureFacts) -> Pairs:
    return _paired(student.taps, teacher.taps)


def _middle_stage(student: ArchitectureFacts, teacher: ArchitectureFacts) -> Pairs:
    pairs = _stages(student, teacher)
    return pairs[len(pairs) // 2 :][:1]


def _last_stage(student: ArchitectureFacts, teacher: ArchitectureFacts) -> Pairs:
    return _stages(student, teacher)[-1:]


def _flows(student: ArchitectureFacts, teacher: ArchitectureFacts) -> Pairs:
    """Pair the first stage's input, then the end of each. An input cannot be rearranged, so `@` paths have none."""
    pairs = _stages(student, teacher)
    plain = [pair for pair in pairs[:1] if "@" not in pair.student + pair.teacher]
    return (*(Pair(student=f"{pair.student}@in", teacher=f"{pair.teacher}@in") for pair in plain), *pairs)


def _preactivations(student: ArchitectureFacts, teacher: ArchitectureFacts) -> Pairs:
    """Pair the places before a ReLU, which the teacher must have. A student without them is tapped after it, because
    its connector can produce negative values."""
    return _paired(student.preactivations or student.taps, teacher.preactivations)


def _margins(student: ArchitectureFacts, teacher: ArchitectureFacts) -> Pairs:
    return _preactivations(student, teacher) if teacher.margins else ()


def _review(student: ArchitectureFacts, teacher: ArchitectureFacts) -> Pairs:
    stages = _paired(student.taps, teacher.preactivations or teacher.taps)
    embedding = _embedding(student, teacher)
    return (*stages, *embedding) if stages and embedding else ()


_CHOICES: dict[TapKind, Callable[[ArchitectureFacts, ArchitectureFacts], Pairs]] = {
    "none": _none,
    "embedding": _embedding,
    "last_stage": _last_stage,
    "middle_stage": _middle_stage,
    "stages": _stages,
    "flows": _flows,
    "preactivations": _preactivations,
    "margins": _margins,
    "review": _review,
}
