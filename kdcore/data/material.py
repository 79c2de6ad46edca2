"""What a training learns from, and what it holds back to choose its best epoch by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdcore.data.resident import Images, joined
from kdcore.data.stratified import split
from kdcore.spec import Recipe, Unlabelled


@dataclass(frozen=True)
class Material:
    images: Images
    rows: Tensor
    """int64, on the images' device: those that are trained on. Views are drawn by row, so the images stay whole."""
    held_out: Images

    def to(self, device: torch.device) -> Material:
        return Material(self.images.to(device), self.rows.to(device), self.held_out.to(device))


def material(train: Images, recipe: Recipe) -> Material:
    """The labelled training images, but for a stratified part that is held out."""
    rows, held_out = split(train, recipe.validation_fraction, recipe.seed)
    return Material(train, rows.to(train.labels.device), train.take(held_out))


def with_unlabelled(labelled: Material, pool: Images, asked: Unlabelled) -> Material:
    """Images of unknown labels too, or instead; the same labelled ones are held out."""
    count = len(labelled.images)
    pooled = torch.arange(count, count + len(pool), device=labelled.rows.device)
    rows = torch.cat([labelled.rows, pooled]) if asked.labelled_too else pooled
    return Material(joined(labelled.images, pool), rows, labelled.held_out)
