"""Knowledge review: the student's shallow maps, fused with its deeper ones, learn to predict the teacher's maps.

Chen, Liu, Zhao & Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv:2104.09044, section 3. From the
deepest tap to the shallowest, an attention-based fusion (ABF) mixes the student's map with the result of the deeper
taps:

    x = BN(1x1 conv(s))                              mid channels
    x = a · x + b · enlarged(carried)                a, b = sigmoid(1x1 conv([x, carried])), one map each; not at the
                                                     deepest tap, which has nothing deeper
    x is repeated or thinned out to the size of the teacher's map and carried on;
    r = BN(3x3 conv(x))                              the teacher's channels

    hcl(r, t) = Σ_l w_l · mean (pool_l(r) - pool_l(t))² / Σ_l w_l       l = the whole map, 4x4, 2x2, 1x1; w = 1, ½, ¼, ⅛
    L = min(epoch / warm-up, 1) · Σ over taps of hcl(r, t)

The means run over batch, channels and places. A level that is not smaller than the map is left out, and the next level
takes its weight (the authors' code, which compares heights; here the shorter side counts). Also from that code: mid =
min(512, width of the student's embedding), 20 warm-up epochs, nearest neighbours to resize, the teacher's maps before
their ReLU and the student's after it. mdistiller has the same and counts epochs from 1, as here.
The last tap is the embedding, a map of one place.
Shapes: N batch, C channels of the teacher, M mid channels, H×W places.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from kdcore.lesson import Lesson, Needs
from kdcore.objectives.objective import Objective, Setting
from kdcore.objectives.pairs import BatchNorm, map_or_embedding
from kdcore.spec.methods import features


def hcl_loss(student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
    """Hierarchical context loss: weighted mean of the squared differences at up to four sizes. Returns a scalar ≥ 0."""
    difference_NCHW = student_NCHW - teacher_NCHW.detach()
    sizes = [size for size in (4, 2, 1) if size < min(difference_NCHW.shape[2:])]
    levels = [difference_NCHW, *(adaptive_avg_pool2d(difference_NCHW, size) for size in sizes)]
    weights = [0.5**i for i in range(len(levels))]
    weighted = [weight * level.square().mean() for weight, level in zip(weights, levels, strict=True)]
    return torch.stack(weighted).sum() / sum(weights)


class Fusion(nn.Module):
    """One ABF block: fuses the student's map of one tap with the result of the deeper taps."""

    def __init__(self, student_channels: int, mid_channels: int, teacher_channels: int, *, deepest: bool) -> None:
        super().__init__()
        self.enter = _convolution(student_channels, mid_channels, 1)
        self.attend = None if deepest else nn.Sequential(nn.Conv2d(2 * mid_channels, 2, kernel_size=1), nn.Sigmoid())
        self.leave = _convolution(mid_channels, teacher_channels, 3)

    def forward(self, student_NCHW: Tensor, carried: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The prediction of the teacher's map, in its size, and the map that is carried on to the next tap."""
        x_NMHW = self.enter(student_NCHW)
        if self.attend is not None:
            assert carried is not None, "only the deepest tap has nothing deeper"
            deeper_NMHW = _resized(carried, x_NMHW.shape[2:])
            weights_N2HW = self.attend(torch.cat([x_NMHW, deeper_NMHW], dim=1))
            x_NMHW = weights_N2HW[:, :1] * x_NMHW + weights_N2HW[:, 1:] * deeper_NMHW
        x_NMHW = _resized(x_NMHW, size)
        return self.leave(x_NMHW), x_NMHW


class KnowledgeReview(Objective):
    """Objective that compares the student's fused maps with the teacher's maps."""

    def __init__(self, options: features.ReviewKd, setting: Setting) -> None:
        super().__init__()
        assert options.taps is not None and options.warmup_epochs is not None, "resolve() names the taps and epochs"
        self.pairs = options.taps
        self.needs = Needs.at(self.pairs)
        self.mid_channels = options.mid_channels
        self.warmup_epochs = options.warmup_epochs
        self.blocks = nn.ModuleList()
        """Deepest first."""

    def build(self, lesson: Lesson) -> None:
        pairs = self._deepest_first(lesson)
        mid_channels = min(self.mid_channels, pairs[0][0].shape[1])
        self.blocks = nn.ModuleList(
            Fusion(student.shape[1], mid_channels, teacher.shape[1], deepest=depth == 0).to(teacher)
            for depth, (student, teacher) in enumerate(pairs)
        )

    def forward(self, lesson: Lesson) -> Tensor:
        losses, carried = [], None
        for block, (student_NCHW, teacher_NCHW) in zip(self.blocks, self._deepest_first(lesson), strict=True):
            review_NCHW, carried = block(student_NCHW, carried, teacher_NCHW.shape[2:])
            losses.append(hcl_loss(review_NCHW, teacher_NCHW))
        return lesson.batch.warmed_up(self.warmup_epochs) * torch.stack(losses).sum()

    def _deepest_first(self, lesson: Lesson) -> list[tuple[Tensor, Tensor]]:
        return [map_or_embedding(lesson, pair) for pair in reversed(self.pairs)]


def _convolution(before: int, after: int, kernel_size: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, BatchNorm(after))


def _resized(maps_NMHW: Tensor, size: Sequence[int]) -> Tensor:
    return maps_NMHW if list(maps_NMHW.shape[2:]) == list(size) else interpolate(maps_NMHW, tuple(size))
