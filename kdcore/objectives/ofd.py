"""Overhaul of feature distillation: match maps before their ReLU, and ignore differences that the ReLU would remove.

Heo, Kim, Yun, Park, Kwak & Choi, "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, arXiv:1904.01866,
section 3. s = connector(student's map), a 1x1 convolution and a batch norm, also if the widths are equal:

    m_c    = E[x | x < 0] of x ~ N(β_c, γ_c²), the affine part of the teacher's batch norm
    target = max(t, m_c)                                               margin ReLU
    d_p    = 1/N Σ_nchw (s - target)², but 0 where s ≤ target ≤ 0      partial L2 distance
    L      = Σ_i 2^-(L-i-1) · d_p at tap i = 0 … L-1, shallow to deep; the deepest has weight 1

The weights are the authors' code; so is m_c = -3|γ_c| where P(x < 0) ≤ 0.001 leaves almost nothing to average. That
code multiplies L by 1e-3 for CIFAR, 1e-4 for ImageNet, 1e-5 for segmentation. That factor is the job's beta here.

The margin is exact where the batch norm feeds the ReLU. After a residual sum it is that of the last batch norm in the
sum, as in the authors' code. The authors keep the teacher's batch norms in train mode during distillation, on purpose,
and found it better (table 8; clovaai/overhaul-distillation#37). Here a teacher stays in eval mode, as for every other
method: its output for an image does not depend on the rest of the batch, and a job does not change its teacher.
If the maps differ in size, the larger one is averaged down first.
Shapes: N batch, C channels of the teacher, H×W places.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.special import ndtr

from base.errors import SpecInvalid
from kdcore.lesson import Lesson, Needs
from kdcore.objectives.objective import Objective, Setting
from kdcore.objectives.pairs import connector, maps, same_size
from kdcore.spec.methods import features


def margin(weight_C: Tensor, bias_C: Tensor) -> Tensor:
    """Mean of the part below zero of N(bias, weight²), ≤ 0; -3 |weight| where that part is almost empty.

    A weight of 0 makes the channel constant: the margin is its bias, or 0 where that is not negative.
    """
    scale_C = weight_C.abs().clamp(min=torch.finfo(weight_C.dtype).tiny)
    z_C = bias_C / scale_C
    below_C = ndtr(-z_C)
    density_C = torch.exp(-z_C.square() / 2) / (2 * torch.pi) ** 0.5
    return torch.where(below_C > 0.001, bias_C - scale_C * density_C / below_C.clamp(min=0.001), -3 * scale_C)


def partial_l2_loss(student_NCHW: Tensor, teacher_NCHW: Tensor, margin_C: Tensor) -> Tensor:
    """Squared distance to the teacher's margin ReLU, one-sided where that is negative.

    Summed over channels and places, averaged over the batch. Returns a scalar ≥ 0.
    """
    target_NCHW = torch.maximum(teacher_NCHW, margin_C[:, None, None]).detach()
    difference_NCHW = student_NCHW - target_NCHW
    counted_NCHW = torch.where(target_NCHW > 0, difference_NCHW, relu(difference_NCHW))
    return counted_NCHW.square().sum() / len(student_NCHW)


class Layer(nn.Module):
    """One pair of taps: the student's connector and the teacher's margins."""

    margin_C: Tensor

    def __init__(self, student_channels: int, margin_C: Tensor) -> None:
        super().__init__()
        self.connect = connector(student_channels, len(margin_C))
        self.register_buffer("margin_C", margin_C)

    def forward(self, student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
        student_NCHW, teacher_NCHW = same_size(student_NCHW, teacher_NCHW)
        return partial_l2_loss(self.connect(student_NCHW), teacher_NCHW, self.margin_C)


class Overhaul(Objective):
    """Objective on pre-ReLU maps at each pair of taps. One of the teacher's batch norms gives each pair its margins."""

    def __init__(self, options: features.Ofd, setting: Setting) -> None:
        super().__init__()
        assert options.taps is not None and options.margins is not None, "resolve() names the taps and the batch norms"
        if len(options.margins) != len(options.taps):
            raise SpecInvalid(f"{len(options.margins)} margins for {len(options.taps)} taps: each tap needs one")
        self.pairs = options.taps
        self.needs = Needs.at(self.pairs, teacher_layers=options.margins)
        self.layers = nn.ModuleList()

    def build(self, lesson: Lesson) -> None:
        self.layers = nn.ModuleList(
            Layer(student.shape[1], _margin(lesson.teacher.layers[path], path, teacher, tap)).to(teacher)
            for (student, teacher), path, tap in zip(
                maps(lesson, self.pairs), self.needs.teacher_layers, self.needs.teacher_taps, strict=True
            )
        )

    def forward(self, lesson: Lesson) -> Tensor:
        losses = [layer(*pair) for layer, pair in zip(self.layers, maps(lesson, self.pairs), strict=True)]
        weighted = [loss / 2 ** (len(losses) - i - 1) for i, loss in enumerate(losses)]
        return torch.stack(weighted).sum()


def _margin(norm: nn.Module, path: str, teacher_NCHW: Tensor, tap: str) -> Tensor:
    if not isinstance(norm, nn.BatchNorm2d) or not norm.affine:
        raise SpecInvalid(
            f"margin {path!r} is a {type(norm).__name__}, where a batch norm with weight and bias is needed",
            hint="ofd needs a teacher with a batch norm before each ReLU; other methods do not",
        )
    if norm.num_features != teacher_NCHW.shape[1]:
        raise SpecInvalid(
            f"margin {path!r} has {norm.num_features} channels, the teacher's tap {tap!r} has {teacher_NCHW.shape[1]}"
        )
    return margin(norm.weight.detach(), norm.bias.detach())
