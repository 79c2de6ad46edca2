"""One student with exits at its shallower blocks: its own deepest classifier teaches them.

Zhang et al., "Be Your Own Teacher: Improve the Performance of CNNs via Self Distillation", ICCV 2019,
arXiv:1905.08094, section 3.

An exit is a bottleneck (1×1 to a quarter of the width, k×k of stride k, 1×1, each with batch norm and ReLU), averaged
to an embedding as wide as the deepest one, and a linear classifier. k halves the map once for each exit place after
it. The deepest logits and features are detached as targets; the exits' gradients reach the blocks below
them. The delivered student is the plain network without exits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from base.errors import SpecInvalid
from kdcore.classifier import Classifier
from kdcore.lesson import EMBEDDING, Batch, Lesson, StepOutput, View


class Exits:
    """The scheme. `paths` are the exit places, shallow to deep; `embedding` is the tap of the deepest features."""

    teacher = None

    def __init__(
        self, student: Classifier, paths: Sequence[str], embedding: str, num_classes: int, image_size: tuple[int, int]
    ) -> None:  # fmt: skip
        self.student, self.paths, self.embedding = student, list(paths), embedding
        student.watch([*self.paths, embedding])
        shapes = _shapes(student, image_size)
        width = shapes[embedding].numel()
        self.exits = nn.ModuleList(
            Exit(_channels(path, shapes[path]), width, num_classes, len(self.paths) - number, shapes[path][1:])
            for number, path in enumerate(self.paths)
        ).to(student.mean.device)
        self.models = {"student": student} | {
            f"exit-{number}": student.like(Early(student, path, module))
            for number, (path, module) in enumerate(zip(self.paths, self.exits, strict=True), 1)
        }

    def learners(self) -> list[nn.Module]:
        return [nn.ModuleList([self.student, self.exits])]

    def run(self, batch: Batch) -> StepOutput:
        deepest: View = self.student(batch.inputs)
        early = [module(deepest.taps[path]) for path, module in zip(self.paths, self.exits, strict=True)]
        teacher = View(deepest.logits.detach(), {EMBEDDING: deepest.taps[self.embedding].flatten(1).detach()})
        lessons = tuple(Lesson(view, teacher, batch) for view in early)
        return StepOutput((deepest, *early), batch.labels, lessons)


class Exit(nn.Module):
    """An exit from a map to a view. `halvings` counts the exit places from here to the end."""

    def __init__(self, channels: int, width: int, num_classes: int, halvings: int, size: Sequence[int]) -> None:
        super().__init__()
        stride = min(2**halvings, *size)
        inside = max(width // 4, 1)
        self.bottleneck = nn.Sequential(
            *_layer(channels, inside, 1), *_layer(inside, inside, stride), *_layer(inside, width, 1)
        )
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, maps_NCHW: Tensor) -> View:
        embedding_ND = adaptive_avg_pool2d(self.bottleneck(maps_NCHW), 1).flatten(1)
        return View(self.classifier(embedding_ND), {EMBEDDING: embedding_ND})


class Early(nn.Module):
    """A student that ends at one of its exits: images in, logits out. It is only measured, not delivered."""

    def __init__(self, student: Classifier, path: str, module: nn.Module) -> None:
        super().__init__()
        self.network, self.exit, self.path = student.network, module, path
        self._view = student.view

    def forward(self, images_NCHW: Tensor) -> Tensor:
        logits: Tensor = self.exit(self._view(images_NCHW).taps[self.path]).logits
        return logits


def _layer(width_in: int, width_out: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(width_in, width_out, stride, stride, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()


@torch.no_grad()
def _shapes(student: Classifier, image_size: tuple[int, int]) -> dict[str, torch.Size]:
    """Return the shape of each tap for one image, from a pass in eval mode, which changes no statistics."""
    student.eval()
    taps = student(torch.zeros(1, student.mean.numel(), *image_size, device=student.mean.device)).taps
    student.train()
    return {path: tap.shape[1:] for path, tap in taps.items()}


def _channels(path: str, shape: torch.Size) -> int:
    if len(shape) != 3:
        given = " x ".join(map(str, shape))
        raise SpecInvalid(
            f"exit {path!r} gives {given} for each image, where a map of channels x height x width is needed"
        )
    return shape[0]
