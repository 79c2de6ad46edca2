"""Contrastive representation distillation: separate the teacher's embedding of an image from those of other classes.

Tian, Krishnan & Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699, eq. 18, in the form of
their code (RepDistiller, crd/), with which the published numbers were made.

    e = W f + b, at length 1                     embeddings of both sides, `width` (128) wide; W and b are trained
    m_i                                          memory: a stored embedding of each of the M training images
    P_nj = exp(e_n · m_j / τ) / Z                τ = 0.07; e of one side, m of the other; j = 0 is image n itself,
                                                 j = 1..K (16384) are drawn from the images of other classes
    L = -1/N Σ_n [log P_n0 / (P_n0 + K/M + ε) + Σ_{j=1..K} log (K/M) / (P_nj + K/M + ε)]           ε = 1e-7
    objective = L of the student's e and the teacher's memory + L of the teacher's e and the student's memory

The loss of a step uses the memory from before the step. Then m ← 0.5 m + 0.5 e for the images of the batch, scaled to
length 1 again. The memory starts uniform in ±1/sqrt(width/3). The Z of each direction is M times the mean of its exp(…)
in the first batch, and stays constant.

Negatives are drawn anew for each sample, with replacement; the authors draw without replacement while there are enough.
The expectation is the same. M counts the rows that are trained on; held-out rows have no memory. An image whose label
is unknown has all other images as negatives. If all images have one class, negatives are drawn from all of them. If an
image occurs twice in a batch, the mean of its embeddings is stored. In eval mode the memory does not change.
Shapes: N batch, D width, M memory, K negatives; N1K is N × (1 + K), the image itself first.
"""

import math

import torch
from torch import Tensor, nn

from kdcore.lesson import Lesson, Needs
from kdcore.objectives.objective import Objective, Setting
from kdcore.objectives.pairs import embeddings, unit
from kdcore.spec.methods.relations import Crd

_EPSILON = 1e-7
_PRODUCT_PAYS = 32
"""Fetching one row of the memory costs about 32 times its share of a matrix product (CPU, forward and backward)."""


def crd_nce_loss(scores_N1K: Tensor, *, data_size: int) -> Tensor:
    """Noise-contrastive loss of the scores P. Returns a scalar ≥ 0. The first score of a row is the positive one."""
    noise = (scores_N1K.shape[1] - 1) / data_size
    true_N, false_NK = scores_N1K[:, 0], scores_N1K[:, 1:]
    true_N = true_N.clamp(
        min=torch.finfo(true_N.dtype).tiny
    )  # A score may round to 0, but its logarithm must not be -inf.
    positive = ((true_N + noise + _EPSILON).log() - true_N.log()).sum()
    negative = ((false_NK + _EPSILON) / noise).log1p().sum()
    return (positive + negative) / len(scores_N1K)


def crd_scores(embedding_ND: Tensor, memory_MD: Tensor, rows_N1K: Tensor, *, temperature: float) -> Tensor:
    """exp(e · m / τ) of each sample with its rows of the memory, N × (1 + K). Divided by Z it is P."""
    return (_products(embedding_ND, memory_MD, rows_N1K) / temperature).exp()


def _products(embedding_ND: Tensor, memory_MD: Tensor, rows_N1K: Tensor) -> Tensor:
    """Inner products, the cheaper of two ways: with all of the memory, or with a copy of the rows for each sample."""
    if len(memory_MD) <= _PRODUCT_PAYS * rows_N1K.shape[1]:
        # A copy, because the memory changes before the backward pass, which needs its present values.
        return (embedding_ND @ memory_MD.clone().T).gather(1, rows_N1K)
    fetched_N1KD = memory_MD[rows_N1K]
    return torch.bmm(fetched_N1KD, embedding_ND[:, :, None]).squeeze(2)


class ContrastiveRepresentation(Objective):
    """Objective that embeds both sides, contrasts each with the other's memory, and updates the memories.

    The memories are sorted by class, so that the images of other classes are all rows except one block.
    """

    place: Tensor
    """The memories' row of each training image, by its row in the training set; M for held-out images."""
    block_start: Tensor
    block_size: Tensor
    """The block of rows that are not negatives, by place."""
    student_memory: Tensor
    teacher_memory: Tensor
    student_Z: Tensor
    teacher_Z: Tensor
    """Z of the student's and of the teacher's embedding; 0 before the first batch."""

    def __init__(self, options: Crd, setting: Setting) -> None:
        super().__init__()
        assert options.tap is not None, "resolve() names the layers"
        self.options, self.setting = options, setting
        self.tap = options.tap
        self.needs = Needs.at([self.tap])

    def build(self, lesson: Lesson) -> None:
        student_ND, teacher_ND = embeddings(lesson, self.tap)
        blocks = _blocks(self.setting.labels, self.setting.rows)
        for name, buffer in zip(("place", "block_start", "block_size"), blocks, strict=True):
            self.register_buffer(name, buffer.to(student_ND.device), persistent=False)
        width, memories = self.options.width, len(self.block_size)
        self.student_embedding = nn.Linear(student_ND.shape[1], width).to(student_ND)
        self.teacher_embedding = nn.Linear(teacher_ND.shape[1], width).to(teacher_ND)
        self.register_buffer("student_memory", _random(student_ND.new_empty(memories, width)))
        self.register_buffer("teacher_memory", _random(teacher_ND.new_empty(memories, width)))
        self.register_buffer("student_Z", student_ND.new_zeros(()))
        self.register_buffer("teacher_Z", teacher_ND.new_zeros(()))

    def forward(self, lesson: Lesson) -> Tensor:
        student_ND, teacher_ND = embeddings(lesson, self.tap)
        student_ND = unit(self.student_embedding(student_ND), dim=1)
        teacher_ND = unit(self.teacher_embedding(teacher_ND.detach()), dim=1)
        place_N = self.place[lesson.batch.index]
        rows_N1K = torch.cat([place_N[:, None], self._negatives(place_N)], dim=1)
        of_student = self._contrast(student_ND, self.teacher_memory, rows_N1K, self.student_Z)
        of_teacher = self._contrast(teacher_ND, self.student_memory, rows_N1K, self.teacher_Z)
        if self.training:
            self._update(self.student_memory, place_N, student_ND)
            self._update(self.teacher_memory, place_N, teacher_ND)
        self.observed["crd/student"], self.observed["crd/teacher"] = of_student.detach(), of_teacher.detach()
        return of_student + of_teacher

    def _negatives(self, place_N: Tensor) -> Tensor:
        """Places of other classes, N × K. A draw in the image's own block or after it is moved by the block's size."""
        start_N1, size_N1 = self.block_start[place_N][:, None], self.block_size[place_N][:, None]
        shape = (len(place_N), self.options.negatives)
        draw_NK = torch.randint(2**62, shape, device=place_N.device) % (len(self.block_size) - size_N1)
        return draw_NK + size_N1 * (draw_NK >= start_N1)

    def _contrast(self, embedding_ND: Tensor, memory_MD: Tensor, rows_N1K: Tensor, constant: Tensor) -> Tensor:
        scores_N1K = crd_scores(embedding_ND, memory_MD, rows_N1K, temperature=self.options.temperature)
        first = scores_N1K.detach().mean() * len(memory_MD)
        normalizer = torch.where(
            constant > 0, constant, first
        )  # Without an `if`, for which the host would wait for the device.
        if self.training:
            constant.copy_(normalizer)
        return crd_nce_loss(scores_N1K / normalizer, data_size=len(memory_MD))

    def _update(self, memory_MD: Tensor, place_N: Tensor, embedding_ND: Tensor) -> None:
        with torch.no_grad():
            same_NN = (place_N[:, None] == place_N).to(embedding_ND.dtype)
            mean_ND = same_NN @ embedding_ND / same_NN.sum(1, keepdim=True)
            momentum = self.options.momentum
            updated_ND = momentum * memory_MD[place_N] + (1 - momentum) * mean_ND
            memory_MD.index_copy_(0, place_N, unit(updated_ND, dim=1))


def _random(memory_MD: Tensor) -> Tensor:
    return memory_MD.uniform_(-1, 1) / math.sqrt(memory_MD.shape[1] / 3)


def _blocks(labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The place of each row, and for each place the start and size of the block without negatives."""
    rows = rows.to(labels.device)
    sorted_M, order_M = labels[rows].sort(stable=True)
    here_M = torch.arange(len(rows), device=labels.device)
    place = torch.full_like(labels, len(rows)).index_copy(0, rows[order_M], here_M)
    start_M = torch.searchsorted(sorted_M, sorted_M)
    size_M = torch.searchsorted(sorted_M, sorted_M, right=True) - start_M
    unknown_M = sorted_M < 0
    start_M, size_M = torch.where(unknown_M, here_M, start_M), torch.where(unknown_M, 1, size_M)
    return place, start_M, torch.where(size_M == len(rows), 0, size_M)
