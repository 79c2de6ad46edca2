"""The four nouns of one training step.

A scheme looks at a Batch and answers with a Round: the views that are graded on labels, and the lessons in which a
student's view is compared with a teacher's.

Shapes: N batch, C channels, H × W places, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

EMBEDDING = "embedding"
"""The tap under which a scheme that makes embeddings of its own hands them over."""


@dataclass(frozen=True)
class Batch:
    """What one step trains on."""

    inputs: Tensor
    """Pixels in 0..255, N × C × H × W; uint8, or float32 where images were mixed. Each model normalises for itself."""
    labels: Tensor
    """int64 N, or float32 N × K where labels were mixed; -1 where nobody knows the label."""
    index: Tensor
    """int64 N: the samples' rows in the training set."""
    epoch: int = 1
    """The epoch that this step belongs to, from 1: warm-ups and ramps go by it."""


@dataclass(frozen=True)
class Needs:
    """What an objective has to see beyond logits: a scheme asks its models for it."""

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()
    """Modules of the teacher that are read before the first step."""
    input_gradient: bool = False


NOTHING = Needs()
"""Of an objective on logits alone."""


@dataclass(frozen=True)
class View:
    """What one model makes of a batch."""

    logits: Tensor
    """N × K, at least float32."""
    taps: Mapping[str, Tensor] = field(default_factory=dict)
    """Activations by tap, at least float32."""
    input_gradient: Tensor | None = None
    """N × C × H × W: gradient of the batch's summed cross-entropy at the normalised images; only where it was asked
    for. A student's can be differentiated once more."""
    layers: Mapping[str, nn.Module] = field(default_factory=dict)
    """The model's own modules by path, those that were asked for: margins are read from a teacher's batch norms."""


@dataclass(frozen=True)
class Lesson:
    """A student's view beside its teacher's. The teacher's is detached; `share` weighs the lesson in its round."""

    student: View
    teacher: View
    batch: Batch
    share: float = 1.0


@dataclass(frozen=True)
class Round:
    """All that one step learns from."""

    views: tuple[View, ...]
    """Graded on the labels; the student's comes first."""
    labels: Tensor
    """What the views are graded on: the batch's labels, or what a teacher says where those are unknown."""
    lessons: tuple[Lesson, ...] = ()
