"""Frozen teachers: they look, they never learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from kdcore.classifier import Classifier
from kdcore.lesson import NOTHING, Batch, Needs, View


class FrozenTeacher(nn.Module):
    """A classifier in eval mode for good: `train()` does not reach it, and no gradient flows out of it."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False)
        self.needs = NOTHING
        self.train(False)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in eval mode whatever is asked: batch norm in train mode would teach something else."""
        return super().train(False)

    def show(self, needs: Needs) -> None:
        """What its views hold from now on. Raises SpecInvalid for a path that its network has not."""
        self.needs = needs
        self.classifier.watch(needs.teacher_taps)

    @torch.no_grad()
    def forward(self, batch: Batch) -> View:
        needs = self.needs
        seen: View = self.classifier(batch.inputs, batch.labels if needs.input_gradient else None)
        taps = {path: tap.detach() for path, tap in seen.taps.items()}
        layers = {path: self.classifier.network.get_submodule(path) for path in needs.teacher_layers}
        return View(seen.logits.detach(), taps, seen.input_gradient, layers)


class TeacherEnsemble(nn.Module):
    """Several frozen teachers as one: their probabilities are averaged, by weight.

    p = Σ_k w_k softmax(z_k / T), Σ w = 1: the arithmetic mean. The mean of logits is another, geometric ensemble. The
    view's logits are T · log p, so that whoever softens them by T finds p.
    """

    def __init__(self, teachers: Sequence[FrozenTeacher], weights: Sequence[float], temperature: float) -> None:
        super().__init__()
        self.members = list(teachers)
        self.teachers = nn.ModuleList(teachers)
        self.log_weights = [float(torch.tensor(weight / sum(weights), dtype=torch.float64).log()) for weight in weights]
        self.temperature = temperature

    def show(self, needs: Needs) -> None:
        """Only logits: the teachers' activations have no common places."""
        assert not needs.teacher_taps, "rules refuse several teachers where activations are compared"

    @torch.no_grad()
    def forward(self, batch: Batch) -> View:
        return View(self.combined([member(batch).logits for member in self.members]))

    def combined(self, logits_kNK: Sequence[Tensor]) -> Tensor:
        """T · log of the averaged probabilities: N × K."""
        logs = zip(self.log_weights, logits_kNK, strict=True)
        terms = [log_weight + log_softmax(z_NK / self.temperature, dim=1) for log_weight, z_NK in logs]
        return self.temperature * torch.stack(terms).logsumexp(0)


Teacher = FrozenTeacher | TeacherEnsemble
