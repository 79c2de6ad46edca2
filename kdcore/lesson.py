"""The four nouns of one training step.

A scheme looks at a Batch and answers with a Round: the views that are graded on labels, and the lessons in which a
student's view is compared with a teacher's.

Shapes: N batch, C channels, H × W places, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What one step trains on."""

    inputs: Tensor
    """Pixels in 0..255, N × C × H × W; uint8, or float32 where images were mixed. Each model normalises for itself."""
    labels: Tensor
    """int64 N, or float32 N × K where labels were mixed."""
    index: Tensor
    """int64 N: the samples' rows in the training set."""


@dataclass(frozen=True)
class View:
    """What one model makes of a batch."""

    logits: Tensor
    """N × K, at least float32."""
    taps: Mapping[str, Tensor] = field(default_factory=dict)
    """Activations by tap, at least float32."""


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
    lessons: tuple[Lesson, ...] = ()
