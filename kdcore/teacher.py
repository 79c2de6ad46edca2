"""The frozen teacher: it looks, it never learns."""

from __future__ import annotations

import torch
from torch import nn

from kdcore.classifier import Classifier
from kdcore.lesson import Batch, View


class FrozenTeacher(nn.Module):
    """A classifier in eval mode for good: `train()` does not reach it, and no gradient flows out of it."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in eval mode whatever is asked: batch norm in train mode would teach something else."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> View:
        view: View = self.classifier(batch.inputs)
        return view
