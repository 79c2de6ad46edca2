"""Where a method looks, if a spec does not say: the ends of the stages, matched from the deepest back."""

from kdcore.catalog import METHODS, ArchitectureFacts
from kdcore.spec.methods import Attention, Method, Pair


def takes_taps(method: Method) -> bool:
    """Whether a method looks at activations of a teacher."""
    by_gradient = isinstance(method, Attention) and method.mapping == "gradient"
    return METHODS[method.name].taps != "none" and not by_gradient


def choose(method: Method, student: ArchitectureFacts, teacher: ArchitectureFacts) -> tuple[Pair, ...]:
    """The taps of a method that names none; none where a network has no such place that we know of."""
    match METHODS[method.name].taps:
        case "embedding":
            return _embeddings(student, teacher)
        case "stages":
            return _paired(student.taps, teacher.taps)
        case "middle_stage":
            pairs = _paired(student.taps, teacher.taps)
            return pairs[len(pairs) // 2 :][:1]
        case "last_stage":
            return _paired(student.taps, teacher.taps)[-1:]
        case "preactivations":
            return _paired(student.preactivations or student.taps, teacher.preactivations)
        case "margins":
            fed_by_norm = teacher.preactivations if teacher.margins else []
            return _paired(student.preactivations or student.taps, fed_by_norm)
        case "review":
            stages, embeddings = (
                _paired(student.taps, teacher.preactivations or teacher.taps),
                _embeddings(student, teacher),
            )
            return (*stages, *embeddings) if stages and embeddings else ()
        case _:
            return ()


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
