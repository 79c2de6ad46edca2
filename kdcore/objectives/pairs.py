"""The pairs of tensors that an objective compares: read from a lesson, checked, and brought to one size.

Also the layers and functions that several objectives share.
Shapes: N batch, K classes, C channels, H × W places, D width of an embedding.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, batch_norm

from base.errors import SpecInvalid
from kdcore.lesson import Lesson, equal_shapes
from kdcore.spec import Pair


def input_gradients(lesson: Lesson) -> tuple[Tensor, Tensor]:
    """Student's and teacher's gradients at the images, N × C × H × W. Raises TeacherMismatch if their shapes differ."""
    student_NCHW, teacher_NCHW = lesson.student.input_gradient, lesson.teacher.input_gradient
    assert student_NCHW is not None and teacher_NCHW is not None, "the objective's needs name the input gradient"
    return equal_shapes("input gradients", student_NCHW, teacher_NCHW)


def maps(lesson: Lesson, pairs: Sequence[Pair]) -> list[tuple[Tensor, Tensor]]:
    """Student's and teacher's N × C × H × W at each pair of taps.

    Raises SpecInvalid for any other shape, and if the taps do not all have the same N.
    """
    return [
        (_map(student, pair.student), _map(teacher, pair.teacher)) for student, teacher, pair in _read(lesson, pairs)
    ]


def map_or_embedding(lesson: Lesson, pair: Pair) -> tuple[Tensor, Tensor]:
    """Student's and teacher's N × C × H × W at a pair of taps; an embedding is a map of one place."""
    ((student, teacher, _),) = _read(lesson, [pair])
    return _one_place(student, pair.student), _one_place(teacher, pair.teacher)


def embeddings(lesson: Lesson, pair: Pair) -> tuple[Tensor, Tensor]:
    """Student's and teacher's N × D at a pair of taps; all dimensions after N are flattened."""
    ((student, teacher, _),) = _read(lesson, [pair])
    return student.flatten(1), teacher.flatten(1)


def same_size(student_NCHW: Tensor, teacher_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return both maps averaged down to the smaller height and the smaller width of the two."""
    size = smaller_size(student_NCHW, teacher_NCHW)
    return averaged_to(student_NCHW, size), averaged_to(teacher_NCHW, size)


def smaller_size(student_NCHW: Tensor, teacher_NCHW: Tensor) -> tuple[int, ...]:
    """Return the smaller height and the smaller width of two maps; () for embeddings."""
    return tuple(map(min, student_NCHW.shape[2:], teacher_NCHW.shape[2:]))


def averaged_to(maps_NCHW: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps averaged down to a height and width."""
    own = maps_NCHW.shape[2:]
    if tuple(own) == tuple(size):
        return maps_NCHW
    if not any(whole % part for whole, part in zip(own, size, strict=True)):
        # The averages are the same, but on a GPU adaptive pooling sums its gradient in no fixed order.
        return avg_pool2d(maps_NCHW, [whole // part for whole, part in zip(own, size, strict=True)])
    return adaptive_avg_pool2d(maps_NCHW, (size[0], size[1]))


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that also accepts a single value for each channel: one image with one place.

    One value has no variance: the running statistics normalise it and do not change; nn.BatchNorm2d raises an error.
    No training has such a batch (every batch is whole, batch_size is at least 2), but the objectives accept one.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == input.shape[1]:
            return batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def connector(student_channels: int, teacher_channels: int) -> nn.Sequential:
    """1x1 convolution and batch norm that map a student's channels to the teacher's number of channels."""
    convolution = nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
    return nn.Sequential(convolution, BatchNorm(teacher_channels))


def unit(vectors: Tensor, dim: int) -> Tensor:
    """Vectors along `dim`, scaled to length 1. A vector of zeros stays zero and gets no gradient.

    F.normalize would give it a gradient of 1e12.
    """
    length: Tensor = vector_norm(vectors, dim=dim, keepdim=True)
    return vectors / length.masked_fill(length < 1e-12, math.inf)


def _read(lesson: Lesson, pairs: Sequence[Pair]) -> list[tuple[Tensor, Tensor, Pair]]:
    """The activations at each pair of taps, and the pair. Raises SpecInvalid if they do not all have the same N."""
    read = [(lesson.student.taps[pair.student], lesson.teacher.taps[pair.teacher], pair) for pair in pairs]
    if len({len(side) for student, teacher, _ in read for side in (student, teacher)}) > 1:
        lengths = "; ".join(
            f"student's {pair.student!r} {len(student)}, teacher's {pair.teacher!r} {len(teacher)}"
            for student, teacher, pair in read
        )
        raise SpecInvalid(
            f"taps give different numbers of rows for one batch: {lengths}",
            hint="tap modules that give one row for each image",
        )
    return read


def _one_place(activation: Tensor, path: str) -> Tensor:
    return activation[:, :, None, None] if activation.dim() == 2 else _map(activation, path)


def _map(activation: Tensor, path: str) -> Tensor:
    if activation.dim() != 4:
        shape = _text(activation.shape[1:])
        raise SpecInvalid(
            f"tap {path!r} gives {shape} for each image, where a map of channels x height x width is needed"
        )
    return activation


def _text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
