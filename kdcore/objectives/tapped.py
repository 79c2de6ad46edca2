"""What objectives on activations share: the two sides of a tap, checked, and brought to one size.

Shapes: N batch, C channels, H × W places, D width of an embedding.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, batch_norm

from base.errors import SpecInvalid
from kdcore.lesson import Lesson
from kdcore.spec import Pair


def maps(lesson: Lesson, pairs: Sequence[Pair]) -> list[tuple[Tensor, Tensor]]:
    """Student's and teacher's N × C × H × W at each pair of taps. Raises SpecInvalid for any other shape."""
    return [
        (_map(lesson.student.taps[pair.student], pair.student), _map(lesson.teacher.taps[pair.teacher], pair.teacher))
        for pair in pairs
    ]


def map_or_embedding(lesson: Lesson, pair: Pair) -> tuple[Tensor, Tensor]:
    """Student's and teacher's N × C × H × W at a pair of taps; an embedding counts as a map of one place."""
    student, teacher = lesson.student.taps[pair.student], lesson.teacher.taps[pair.teacher]
    return _one_place(student, pair.student), _one_place(teacher, pair.teacher)


def embeddings(lesson: Lesson, pair: Pair) -> tuple[Tensor, Tensor]:
    """Student's and teacher's N × D at a pair of taps; whatever follows the batch is laid in one row."""
    return lesson.student.taps[pair.student].flatten(1), lesson.teacher.taps[pair.teacher].flatten(1)


def same_size(student_NCHW: Tensor, teacher_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Both averaged down to the smaller height and the smaller width of the two."""
    size = [min(pair) for pair in zip(student_NCHW.shape[2:], teacher_NCHW.shape[2:], strict=True)]
    return _pooled(student_NCHW, size), _pooled(teacher_NCHW, size)


class BatchNorm(nn.BatchNorm2d):
    """A batch norm that takes one value a channel too, as a last batch of one image may leave; torch refuses it.

    One value has no variance, so it is normalised by the running statistics, which it leaves as they are.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == input.shape[1]:
            return batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def connector(student_channels: int, teacher_channels: int) -> nn.Sequential:
    """1x1 convolution and batch norm: brings a student's map to the teacher's width, place by place."""
    convolution = nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
    return nn.Sequential(convolution, BatchNorm(teacher_channels))


def unit(vectors: Tensor, dim: int) -> Tensor:
    """Vectors along `dim` at length 1. One of zeros points nowhere: it stays zero and gets no gradient, where
    F.normalize would give it one of 1e12."""
    length: Tensor = vector_norm(vectors, dim=dim, keepdim=True)
    return vectors / length.masked_fill(length < 1e-12, math.inf)


def _pooled(maps_NCHW: Tensor, size: list[int]) -> Tensor:
    own = maps_NCHW.shape[2:]
    if list(own) == size:
        return maps_NCHW
    if not any(whole % part for whole, part in zip(own, size, strict=True)):
        # The same averages, but a GPU adds up the gradient of adaptive pooling in any order, and of this one in one.
        return avg_pool2d(maps_NCHW, [whole // part for whole, part in zip(own, size, strict=True)])
    return adaptive_avg_pool2d(maps_NCHW, (size[0], size[1]))


def _one_place(activation: Tensor, path: str) -> Tensor:
    return activation[:, :, None, None] if activation.dim() == 2 else _map(activation, path)


def _map(activation: Tensor, path: str) -> Tensor:
    if activation.dim() != 4:
        shape = " x ".join(map(str, activation.shape[1:]))
        raise SpecInvalid(
            f"tap {path!r} gives {shape} for each image, where a map of channels x height x width is needed"
        )
    return activation
