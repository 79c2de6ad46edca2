"""The nouns of one training step.

    Batch → scheme → StepOutput: views, which are compared with labels, and lessons, which are compared by an objective

A scheme runs the models on a Batch. Each model makes a View of it; a Lesson is a student's view beside a teacher's.

Shapes: N batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from kdcore.classifier import Classifier
    from kdcore.spec import Pair

EMBEDDING = "embedding"
"""The tap name for an embedding that a scheme computes itself."""


@dataclass(frozen=True)
class Batch:
    """What one step trains on."""

    inputs: Tensor
    """Pixels in 0..255, N × C × H × W; uint8, or float32 where images were mixed. Each model normalises for itself."""
    labels: Tensor
    """int64 N, or float32 N × K where labels were mixed; -1 where the label is unknown."""
    index: Tensor
    """int64 N: the samples' rows in the training set."""
    epoch: int = 1
    """The epoch of this step, from 1: warm-ups and ramps depend on it."""
    view_ids: Tensor | None = None
    """int64 N: which of its numbered views each sample shows. Equal rows and view ids are equal inputs, so a frozen
    teacher's outputs can be cached under both. None where views are not numbered."""


@dataclass(frozen=True)
class Needs:
    """What an objective reads beyond logits."""

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()
    """Modules of the teacher that `Objective.build` reads."""
    input_gradient: bool = False

    @classmethod
    def at(cls, pairs: Iterable[Pair], teacher_layers: Sequence[str] = ()) -> Needs:
        """The needs of a comparison at pairs of taps."""
        pairs = tuple(pairs)
        return cls(tuple(pair.student for pair in pairs), tuple(pair.teacher for pair in pairs), tuple(teacher_layers))

    def __or__(self, other: Needs) -> Needs:
        """The needs of both, each path once, in order."""
        return Needs(
            tuple(dict.fromkeys((*self.student_taps, *other.student_taps))),
            tuple(dict.fromkeys((*self.teacher_taps, *other.teacher_taps))),
            tuple(dict.fromkeys((*self.teacher_layers, *other.teacher_layers))),
            self.input_gradient or other.input_gradient,
        )


NOTHING = Needs()
"""The needs of an objective on logits alone."""


@dataclass(frozen=True)
class View:
    """What one model computes from a batch."""

    logits: Tensor
    """N × K, at least float32."""
    taps: Mapping[str, Tensor] = field(default_factory=dict)
    """Activations by tap, at least float32."""
    input_gradient: Tensor | None = None
    """N × C × H × W: gradient of the batch's summed cross-entropy with respect to the normalised images, if needed. A
    student's can be differentiated once more."""
    layers: Mapping[str, nn.Module] = field(default_factory=dict)
    """The model's own modules by path, if needed: margins are read from a teacher's batch norms."""


@dataclass(frozen=True)
class Lesson:
    """A student's view beside its teacher's, which is detached. `share` weighs the lesson within its step."""

    student: View
    teacher: View
    batch: Batch
    share: float = 1.0


@dataclass(frozen=True)
class StepOutput:
    """All that the loss of one step is computed from."""

    views: tuple[View, ...]
    """Compared with `labels`; the student's comes first."""
    labels: Tensor
    """The batch's labels, or a teacher's classes where those are unknown."""
    lessons: tuple[Lesson, ...] = ()


class Teacher(Protocol):
    """A trained model, or several as one, that never changes. A scheme sees no more of it than this, so a view may come
    from networks, from an exported program, or from outputs that were stored by row and view id.
    """

    @property
    def members(self) -> Sequence[Classifier]:
        """The networks behind the teacher. The report measures each of them, and `combined` of their logits."""

    def show(self, needs: Needs) -> None:
        """Set what the views hold from now on. Raises SpecInvalid for a path that the network does not have."""

    def __call__(self, batch: Batch) -> View:
        """The detached view of a batch, the same one whenever the batch holds the same inputs."""

    def combined(self, logits_kNK: Sequence[Tensor]) -> Tensor:
        """The teacher's N × K logits, given those of each member."""


class Scheme(Protocol):
    """Which model teaches which. A scheme alone runs models."""

    @property
    def models(self) -> Mapping[str, Classifier]:
        """What the stage delivers, the student first: each is validated, averaged and kept at its best."""

    def learners(self) -> Sequence[nn.Module]:
        """What is trained, each by an optimizer of its own."""

    def run(self, batch: Batch) -> StepOutput:
        """Run the models on one batch."""
