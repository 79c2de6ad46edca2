"""Factor transfer: an autoencoder compresses the teacher's last map, and the student learns the compressed form.

Kim, Park & Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018,
arXiv:1802.04977, section 3.

    1. paraphraser   L = mean |P(t) - t|              P reconstructs the teacher's map from k·C channels; no student
    2. transfer      F_t = encoder of P(t), frozen    F_s = translator(s), trained with the student
                     L = mean over N·CHW of | F_s/‖F_s‖₂ - F_t/‖F_t‖₂ |^p       a factor is one row CHW for each image

Both follow the authors' code (Jangho-Kim/Factor-Transfer-pytorch), whose beta 500 belongs to p = 1 and to the mean over
all elements; the paper has the norm itself. Also from the code: the L1 reconstruction (the paper's is squared; CRD's
code squares too, and has to lower the learning rate), 3x3 convolutions with bias and without batch norm, LeakyReLU 0.1
after each, the last included. The authors train the paraphraser for 5 of about 160 epochs, CRD's code for 30 of 240.
CRD's code (RepDistiller) transfers another factor, the mean of squares over channels, with beta 200. That one is close
to attention transfer and is not offered here.
The translator's output is averaged down, or repeated up, to the size of the teacher's map.
A factor of zeros has no direction: it stays zero and gets no gradient.
Shapes: N batch, C channels, H×W places.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, l1_loss, mse_loss

from kdcore.lesson import Lesson, Needs
from kdcore.objectives.objective import Objective, Setting, TwoStages
from kdcore.objectives.pairs import maps, unit
from kdcore.spec import Pair
from kdcore.spec.methods import features


def factor_loss(student_factor_NCHW: Tensor, teacher_factor_NCHW: Tensor, *, p: Literal[1, 2] = 1) -> Tensor:
    """Mean |difference|^p of the two factors, scaled to length 1 for each image. Returns a scalar ≥ 0."""
    student_ND = unit(student_factor_NCHW.flatten(1), dim=1)
    teacher_ND = unit(teacher_factor_NCHW.detach().flatten(1), dim=1)
    return l1_loss(student_ND, teacher_ND) if p == 1 else mse_loss(student_ND, teacher_ND)


class Paraphraser(nn.Module):
    """Autoencoder of the teacher's map; the factor is its encoder's output. Only the first `build` has an effect."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.encoder = nn.Sequential()
        self.decoder = nn.Sequential()

    def build(self, teacher_NCHW: Tensor) -> None:
        if len(self.encoder) > 0:
            return
        wide = teacher_NCHW.shape[1]
        narrow = max(round(self.rate * wide), 1)
        self.encoder = _convolutions(nn.Conv2d, wide, wide, narrow, narrow).to(teacher_NCHW)
        self.decoder = _convolutions(nn.ConvTranspose2d, narrow, narrow, wide, wide).to(teacher_NCHW)

    def forward(self, teacher_NCHW: Tensor) -> Tensor:
        reconstruction: Tensor = self.decoder(self.encoder(teacher_NCHW))
        return reconstruction


class Paraphrasing(Objective):
    """Objective of the first stage: the paraphraser reconstructs the teacher's map, without a student."""

    def __init__(self, tap: Pair, paraphraser: Paraphraser) -> None:
        super().__init__()
        self.tap = Pair(student=tap.teacher, teacher=tap.teacher)
        self.needs = Needs(teacher_taps=(tap.teacher,))
        self.paraphraser = paraphraser

    def build(self, lesson: Lesson) -> None:
        self.paraphraser.build(self._map(lesson))

    def forward(self, lesson: Lesson) -> Tensor:
        teacher_NCHW = self._map(lesson)
        return l1_loss(self.paraphraser(teacher_NCHW), teacher_NCHW)

    def _map(self, lesson: Lesson) -> Tensor:
        ((_, teacher_NCHW),) = maps(replace(lesson, student=lesson.teacher), [self.tap])
        return teacher_NCHW.detach()


class FactorTransfer(Objective):
    """Objective of the second stage: compares the student's translated map with the paraphraser's factor.

    The paraphraser is frozen and always in eval mode. It is part of the state, so that a resumed job has the one that
    its first stage made.
    """

    def __init__(self, tap: Pair, paraphraser: Paraphraser, *, p: Literal[1, 2]) -> None:
        super().__init__()
        self.tap = tap
        self.needs = Needs.at([tap])
        self.p = p
        self.paraphraser = paraphraser
        self.translator = nn.Sequential()

    def build(self, lesson: Lesson) -> None:
        ((student_NCHW, teacher_NCHW),) = maps(lesson, [self.tap])
        self.paraphraser.build(teacher_NCHW)
        self.paraphraser.requires_grad_(False).eval()
        wide, narrow = student_NCHW.shape[1], self.factor(teacher_NCHW).shape[1]
        self.translator = _convolutions(nn.Conv2d, wide, wide, narrow, narrow).to(student_NCHW)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.paraphraser.eval()
        return self

    def forward(self, lesson: Lesson) -> Tensor:
        ((student_NCHW, teacher_NCHW),) = maps(lesson, [self.tap])
        teacher_factor_NCHW, student_factor_NCHW = self.factor(teacher_NCHW), self.translator(student_NCHW)
        height, width = teacher_factor_NCHW.shape[2:]
        if student_factor_NCHW.shape[2:] != (height, width):
            student_factor_NCHW = adaptive_avg_pool2d(student_factor_NCHW, (height, width))
        return factor_loss(student_factor_NCHW, teacher_factor_NCHW, p=self.p)

    @torch.no_grad()
    def factor(self, teacher_NCHW: Tensor) -> Tensor:
        factor_NCHW: Tensor = self.paraphraser.encoder(teacher_NCHW)
        return factor_NCHW


def from_options(options: features.FactorTransfer, setting: Setting) -> TwoStages:
    """Two stages that share one paraphraser: it is trained without the student, then the student beside the labels."""
    assert options.tap is not None, "resolve() names the tap"
    paraphraser = Paraphraser(options.rate)
    return TwoStages(
        first=Paraphrasing(options.tap, paraphraser),
        then=FactorTransfer(options.tap, paraphraser, p=options.p),
    )


def _convolutions(layer: type[nn.Conv2d | nn.ConvTranspose2d], *channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [layer(before, after, kernel_size=3, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)
