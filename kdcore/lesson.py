"""The classes of one training step.

    Batch → scheme → StepOutput: views, which are compared with labels, and lessons, which are compared by an objective

A scheme runs the models on a Batch. Each model makes a View of it; a Lesson is a student's view beside a teacher's.

Shapes: N batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from base.errors import TeacherMismatch

if TYPE_CHECKING:
    from kdcore.classifier import Classifier
    from kdcore.data.views import Batches
    from kdcore.spec import Pair

EMBEDDING = "embedding"
"""The tap name of an embedding that a scheme computes itself."""


@dataclass(frozen=True)
class Batch:
    """The images and labels of one step."""

    inputs: Tensor
    """Pixels in 0..255, N × C × H × W; uint8, or float32 if images are mixed. Each model normalises for itself."""
    labels: Tensor
    """int64 N, or float32 N × K if labels are mixed; -1 is an unknown label."""
    index: Tensor
    """int64 N: the samples' rows in the training set."""
    epoch: int | Tensor = 0
    """The epoch of this step, from 0: warm-ups and ramps depend on it. In a captured step it is a scalar on the device,
    because a number would stay that of the first replay."""
    view_ids: Tensor | None = None
    """int64 N: the number of each sample's view. Equal rows and view ids are equal inputs, so a frozen
    teacher's outputs can be cached under both. None if views are not numbered."""
    sized: Mapping[int, Tensor] = field(default_factory=dict)
    """The same views as squares of other sides, for teachers with image sizes of their own."""

    def at(self, side: int | None) -> Tensor:
        """Return the views for a network with this image size: `inputs` for None, the data's own."""
        return self.inputs if side is None else self.sized[side]

    def take(self, places: Tensor) -> Batch:
        """Return the samples at some places of this batch."""
        return replace(
            self,
            inputs=self.inputs[places],
            labels=self.labels[places],
            index=self.index[places],
            view_ids=None if self.view_ids is None else self.view_ids[places],
            sized={side: views[places] for side, views in self.sized.items()},
        )

    def warmed_up(self, epochs: int) -> float | Tensor:
        """Return the weight of a loss that rises linearly in its first epochs: (epoch + 1) / epochs, at most 1."""
        weight = (self.epoch + 1) / max(epochs, 1)
        return weight.clamp(max=1) if isinstance(weight, Tensor) else min(weight, 1.0)


@dataclass(frozen=True)
class Reduced:
    """What an objective needs of a teacher's taps, where that is less than these: a map of attention, say. It is
    computed where the teacher runs, so that it can be stored in their place."""

    taps: tuple[str, ...]
    name: str
    """Tells the function and its options from others: equal names and taps are equal values."""
    of: Callable[..., Tensor] = field(compare=False)
    """Maps the taps to the value. A row of its result depends on that row of the taps alone."""

    def read(self, view: View) -> Tensor:
        """Return the value in a view that has it, or has the taps."""
        return view.reduced[self] if self in view.reduced else self.from_taps(view.taps)

    def from_taps(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Return the value, given the taps."""
        return self.of(*(taps[tap] for tap in self.taps)).detach()


@dataclass(frozen=True)
class Needs:
    """The inputs of an objective beyond logits."""

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()
    """Modules of the teacher that `Objective.build` reads."""
    input_gradient: bool = False
    reduced: tuple[Reduced, ...] = ()

    @classmethod
    def at(cls, pairs: Iterable[Pair], teacher_layers: Sequence[str] = ()) -> Needs:
        """Return the needs of a comparison at pairs of taps."""
        pairs = tuple(pairs)
        return cls(tuple(pair.student for pair in pairs), tuple(pair.teacher for pair in pairs), tuple(teacher_layers))

    def __or__(self, other: Needs) -> Needs:
        """Return the needs of both, each path once, in order."""
        return Needs(
            tuple(dict.fromkeys((*self.student_taps, *other.student_taps))),
            tuple(dict.fromkeys((*self.teacher_taps, *other.teacher_taps))),
            tuple(dict.fromkeys((*self.teacher_layers, *other.teacher_layers))),
            self.input_gradient or other.input_gradient,
            tuple(dict.fromkeys((*self.reduced, *other.reduced))),
        )


NOTHING = Needs()
"""The needs of an objective on logits alone."""


@dataclass(frozen=True)
class View:
    """The outputs of one model for a batch."""

    logits: Tensor
    """N × K, at least float32."""
    taps: Mapping[str, Tensor] = field(default_factory=dict)
    """Activations by tap, at least float32."""
    input_gradient: Tensor | None = None
    """N × C × H × W: gradient of the batch's summed cross-entropy with respect to the normalised images, if needed. A
    student's can be differentiated once more."""
    layers: Mapping[str, nn.Module] = field(default_factory=dict)
    """The model's own modules by path, if needed: margins are read from a teacher's batch norms."""
    reduced: Mapping[Reduced, Tensor] = field(default_factory=dict)
    """Of a teacher: what is needed of taps in their place, at least float32."""


@dataclass(frozen=True)
class Lesson:
    """A student's view beside its teacher's, which is detached. `share` weighs the lesson within its step."""

    student: View
    teacher: View
    batch: Batch
    share: float | Tensor = 1.0

    @property
    def logits(self) -> tuple[Tensor, Tensor]:
        """Student's and teacher's logits, N × K. Raises TeacherMismatch if their shapes differ."""
        return equal_shapes("logits", self.student.logits, self.teacher.logits)


@dataclass(frozen=True)
class StepOutput:
    """The inputs of the loss of one step."""

    views: tuple[View, ...]
    """The views that are compared with `labels`; the student's is the first."""
    labels: Tensor
    """The batch's labels; a teacher's class may replace an unknown one."""
    lessons: tuple[Lesson, ...] = ()


class Teacher(Protocol):
    """A trained model, or several as one, that never changes. A scheme uses only this interface, so a view may come
    from networks, from an exported program, or from outputs that were stored by row and view id.
    """

    members: Sequence[Classifier]
    """The teacher's networks. The report measures each of them, and `combined` of their logits."""

    def show(self, needs: Needs) -> None:
        """Set the content of the following views. Raises SpecInvalid for a path that the network does not have."""

    def __call__(self, batch: Batch) -> View:
        """Return the detached view of a batch. Equal inputs give equal views."""

    def through(self, batches: Batches) -> Iterable[Batch]:
        """Return an epoch's batches, for all of which it will be asked in this order: so it can prepare for them."""
        return batches

    def combined(self, logits_kNK: Sequence[Tensor]) -> Tensor:
        """Return the teacher's N × K logits, given those of each member."""

    def soft_targets(self, logits_kNK: Sequence[Tensor], temperature: float) -> Tensor:
        """Return the teacher's N × K probabilities at a temperature, given the logits of each member."""


class Scheme(Protocol):
    """The rule of which model teaches which. Only a scheme runs models."""

    @property
    def models(self) -> Mapping[str, Classifier]:
        """Return the models that the stage delivers, the student first. The best epoch of each is delivered."""

    @property
    def teacher(self) -> Teacher | None:
        """Return the frozen teacher, if it has one."""

    def learners(self) -> Sequence[nn.Module]:
        """Return the modules that are trained, each by its own optimizer."""

    def run(self, batch: Batch) -> StepOutput:
        """Run the models on one batch."""


def equal_shapes(name: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both tensors. Raises TeacherMismatch if their shapes differ."""
    if student.shape != teacher.shape:
        shapes = [" x ".join(map(str, shape)) for shape in (student.shape, teacher.shape)]
        raise TeacherMismatch(f"the student's {name} are {shapes[0]}, the teacher's {shapes[1]}")
    return student, teacher
