"""What every objective is: a comparison of a student's view with a teacher's, that says what it has to see."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from kdcore.lesson import Lesson, Needs


@dataclass(frozen=True)
class Setting:
    """What an objective may know of the training that it serves."""

    temperature: float | None
    """None where the method has none."""
    num_classes: int
    epochs: int
    labels: Tensor
    """int64: the label of every image of the training set, by row; -1 where nobody knows it."""
    rows: Tensor
    """int64: the rows that are trained on; the others are held out."""


class Objective(nn.Module, ABC):
    """A scalar to be minimised, averaged over the batch; its gradient reaches the student and its own parameters.

    Parameters (regressors, connectors) are made by `build`, once a first lesson has shown the shapes. They are
    trained and checkpointed with the student, and never exported. So is every buffer (memories, frozen parts).
    """

    student_taps: tuple[str, ...] = ()
    """Paths that a student's view must hold."""
    teacher_taps: tuple[str, ...] = ()
    """Paths that a teacher's view must hold."""
    teacher_layers: tuple[str, ...] = ()
    """Paths of modules of the teacher that `build` reads."""
    needs_input_gradient: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.observed: dict[str, Tensor] = {}
        """Figures about the last lesson that are worth a curve but are not minimised, by name; detached scalars."""

    def build(self, lesson: Lesson) -> None:  # Most objectives own nothing.
        """Make what the objective owns to the measure of a first lesson, seen in eval mode and without gradients."""

    @property
    def needs(self) -> Needs:
        return Needs(self.student_taps, self.teacher_taps, self.teacher_layers, self.needs_input_gradient)

    @abstractmethod
    def forward(self, lesson: Lesson) -> Tensor: ...


@dataclass(frozen=True)
class Staged:
    """A method in two stages: `first` is minimised alone, without labels; `then` beside them (None: labels alone)."""

    first: Objective
    then: Objective | None
