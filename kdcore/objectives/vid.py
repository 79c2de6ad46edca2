"""Variational information distillation: maximise the information that the student's maps have about the teacher's.

Ahn, Hu, Damianou, Lawrence & Dai, "Variational Information Distillation for Knowledge Transfer", CVPR 2019,
arXiv:1904.05835, section 2: a lower bound on the mutual information I(t; s) = H(t) - H(t|s), where a Gaussian
replaces the unknown p(t|s). H(t) does not depend on the student and is left out, as is ½ log 2π.

    μ  = regressor(s)        three 1x1 convolutions without bias, as wide as the teacher's map, ReLU between
    σ² = softplus(v) + 1e-5  one for each channel of the teacher, learned, the same at all places; 5 at first
    L  = Σ over taps of 1/NCHW Σ_nchw ½ [ (μ - t)² / σ² + log σ² ]

The paper sums over channels and places. CRD's code (RepDistiller), which has it from the authors, takes the mean, and
beta 1 belongs to the mean, so the mean is used here. A student that predicts well has a small σ², and log σ² makes the
loss negative: that is not an error. The lower limit of 1e-5 keeps both terms finite if the prediction is perfect.
If the maps differ in size, the larger one is averaged down first (CRD's code).
Shapes: N batch, C channels of the teacher, H×W places.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from kdcore.lesson import Lesson, Needs
from kdcore.objectives.objective import Objective, Setting
from kdcore.objectives.pairs import maps, same_size
from kdcore.spec.methods import features

FLOOR = 1e-5
"""Lower limit of the variance."""
FIRST_VARIANCE = 5.0


def vid_loss(mean_NCHW: Tensor, variance_C: Tensor, teacher_NCHW: Tensor) -> Tensor:
    """Mean negative log-likelihood of the teacher's map under the student's Gaussian, less ½ log 2π. Returns a scalar
    ≥ ½ mean(log σ²)."""
    variance_CHW = variance_C[:, None, None]
    terms_NCHW = (mean_NCHW - teacher_NCHW.detach()).square() / variance_CHW + variance_CHW.log()
    return terms_NCHW.mean() / 2


class Regressor(nn.Module):
    """Predicts the teacher's map from the student's: a mean at each place and a variance for each channel."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, kernel_size=1, bias=False),
        )
        self.unbounded = nn.Parameter(torch.full((teacher_channels,), math.log(math.expm1(FIRST_VARIANCE - FLOOR))))

    def forward(self, student_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(student_NCHW), softplus(self.unbounded) + FLOOR


class VariationalInformation(Objective):
    """Objective that predicts the teacher's map from the student's at each pair of taps and sums the losses."""

    def __init__(self, options: features.Vid, setting: Setting) -> None:
        super().__init__()
        assert options.taps is not None, "resolve() names the taps"
        self.pairs = options.taps
        self.needs = Needs.at(self.pairs)
        self.guesses = nn.ModuleList()

    def build(self, lesson: Lesson) -> None:
        self.guesses = nn.ModuleList(
            Regressor(student.shape[1], teacher.shape[1]).to(teacher) for student, teacher in maps(lesson, self.pairs)
        )

    def forward(self, lesson: Lesson) -> Tensor:
        losses = []
        for regressor, pair in zip(self.guesses, maps(lesson, self.pairs), strict=True):
            student_NCHW, teacher_NCHW = same_size(*pair)
            mean_NCHW, variance_C = regressor(student_NCHW)
            losses.append(vid_loss(mean_NCHW, variance_C, teacher_NCHW))
        return torch.stack(losses).sum()
