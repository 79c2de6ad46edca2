"""The base class of objectives: a comparison of a student's view with a teacher's."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from kdcore.lesson import NOTHING, Lesson, Needs


@dataclass(frozen=True)
class Setting:
    """The facts of a trial that its objectives may use."""

    temperature: float | None
    """None for a method without one."""
    num_classes: int
    epochs: int
    labels: Tensor
    """int64: the label of every image of the training set, by row; -1 where it is unknown."""
    rows: Tensor
    """int64: the rows that are trained on; the others are held out."""


class Objective(nn.Module, ABC):
    """A scalar to be minimised, averaged over the batch; its gradient reaches the student and its own parameters.

    Parameters (regressors, connectors) are made by `build`, from the shapes of a first lesson. They are trained and
    checkpointed with the student, and never exported. The same holds for every buffer (memories, frozen parts).
    """

    needs: Needs = NOTHING
    """The objective's inputs beyond logits; a scheme makes its models provide them. `build` may replace teacher's taps
    by what is needed of them (`Reduced`), which it makes from a first lesson with the whole taps."""

    def __init__(self) -> None:
        super().__init__()
        self.observed: dict[str, Tensor] = {}
        """Values of the last lesson that are reported but not minimised, by name; detached scalars."""

    def build(self, lesson: Lesson) -> None:  # Most objectives have no modules.
        """Make the objective's own modules, from a first lesson in eval mode and without gradients."""

    @abstractmethod
    def forward(self, lesson: Lesson) -> Tensor: ...


@dataclass(frozen=True)
class TwoStages:
    """A method of two stages: `first` is minimised alone, without labels; `then` beside them (None: labels alone)."""

    first: Objective
    then: Objective | None
