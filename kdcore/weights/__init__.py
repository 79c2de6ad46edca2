"""Weights from any source: a checkpoint's tensors under the network's names, published weights, starts of students."""

from kdcore.weights.loading import (
    Start,
    TeacherFile,
    chosen,
    inspect,
    load_into,
    open_teacher,
    opened_start,
)
from kdcore.weights.names import ANY, Choice

__all__ = [
    "ANY",
    "Choice",
    "Start",
    "TeacherFile",
    "chosen",
    "inspect",
    "load_into",
    "open_teacher",
    "opened_start",
]
