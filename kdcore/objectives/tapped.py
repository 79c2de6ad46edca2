"""What objectives on activations share: the two sides of a tap, checked, and brought to one size.

Shapes: N batch, C channels, H × W places, D width of an embedding.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from kdcore.errors import SpecInvalid
from kdcore.lesson import Lesson
from kdcore.spec import Pair


def maps(lesson: Lesson, pairs: Sequence[Pair]) -> list[tuple[Tensor, Tensor]]:
    """Student's and teacher's N × C × H × W at each pair of taps. Raises SpecInvalid for any other shape."""
    return [
        (_map(lesson.student.taps[pair.student], pair.student), _map(lesson.teacher.taps[pair.teacher], pair.teacher))
        for pair in pairs
    ]


def embeddings(lesson: Lesson, pair: Pair) -> tuple[Tensor, Tensor]:
    """Student's and teacher's N × D at a pair of taps; whatever follows the batch is laid in one row."""
    return lesson.student.taps[pair.student].flatten(1), lesson.teacher.taps[pair.teacher].flatten(1)


def same_size(student_NCHW: Tensor, teacher_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Both averaged down to the smaller height and the smaller width of the two."""
    size = [min(pair) for pair in zip(student_NCHW.shape[2:], teacher_NCHW.shape[2:], strict=True)]
    return _pooled(student_NCHW, size), _pooled(teacher_NCHW, size)


def _pooled(maps_NCHW: Tensor, size: list[int]) -> Tensor:
    return maps_NCHW if list(maps_NCHW.shape[2:]) == size else adaptive_avg_pool2d(maps_NCHW, size)


def _map(activation: Tensor, path: str) -> Tensor:
    if activation.dim() != 4:
        shape = " x ".join(map(str, activation.shape[1:]))
        raise SpecInvalid(
            f"tap {path!r} gives {shape} for each image, where a map of channels x height x width is needed"
        )
    return activation
