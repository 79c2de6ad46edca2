"""Branches on a shared trunk, and a gate that weighs them: their ensemble teaches every branch.

Lan, Zhu & Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018, arXiv:1806.04606, section 3.

    g   = softmax(ReLU(BN(W · average(shared maps))))       the gate, one weight a branch: N × M
    z_e = Σ_i g_i z_i                                       eq. 5
    loss = Σ_i CE_i + CE_e + w(epoch) · T² Σ_i KL(p_e ‖ p_i)   eqs. 6 to 8; p_e is detached in the divergence
    w(epoch) = exp(-5 (1 - epoch / ramp)²), 1 from `ramp` on   the authors' code

A branch is the student's last block group with its classifier; the part before it is the shared trunk. The first branch
on the trunk is exactly the student and is delivered; the whole ensemble is measured beside it.
Shapes: N batch, M branches, K classes.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from kdcore.classifier import Classifier
from kdcore.lesson import Batch, Lesson, StepOutput, View
from kdcore.models.layers import Network


class NativeEnsemble:
    """The scheme. `students` are fresh, one for each branch; the trunk is the first one's."""

    teacher = None

    def __init__(self, students: list[Classifier], image_size: tuple[int, int], rampup_epochs: int) -> None:
        first = students[0]
        networks = [student.network for student in students]
        branched = Branched(networks, (first.mean.numel(), *image_size))
        self.branches = [f"branches.{number}" for number in range(len(networks))]
        self.ensemble = first.like(branched)
        self.ensemble.watch(self.branches)
        self.rampup_epochs = rampup_epochs
        self.models = {"student": first, "ensemble": self.ensemble}

    def learners(self) -> list[nn.Module]:
        return [self.ensemble]

    def run(self, batch: Batch) -> StepOutput:
        ensemble = self.ensemble(batch.inputs)
        branches = [View(ensemble.taps[path]) for path in self.branches]
        teacher = View(ensemble.logits.detach())
        share = rampup(batch.epoch + 1, self.rampup_epochs)
        lessons = tuple(Lesson(branch, teacher, batch, share) for branch in branches)
        return StepOutput((*branches, View(ensemble.logits)), batch.labels, lessons)


def rampup(epoch: int | Tensor, epochs: int) -> float | Tensor:
    """exp(-5 (1 - epoch / epochs)²) up to `epochs`, 1 after it. Epochs count from 1, as in the authors' code."""
    if isinstance(epoch, Tensor):
        return (-5 * (1 - epoch / max(epochs, 1)).clamp(min=0).square()).exp()
    return 1.0 if epoch >= epochs else math.exp(-5 * (1 - epoch / epochs) ** 2)


class Branched(nn.Module):
    """The shared trunk, the branches and the gate: images in, z_e out."""

    def __init__(self, networks: list[nn.Module], image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.trunk = Trunk(networks[0])
        self.branches = nn.ModuleList(Branch(network, self.trunk) for network in networks)
        width = _width(self.trunk, image_shape)
        self.gate = nn.Sequential(nn.Linear(width, len(networks)), nn.BatchNorm1d(len(networks)), nn.ReLU())

    def forward(self, images_NCHW: Tensor) -> Tensor:
        maps_NCHW = self.trunk(images_NCHW)
        logits_NMK = torch.stack([branch(maps_NCHW) for branch in self.branches], dim=1)
        gate_NM = self.gate(adaptive_avg_pool2d(maps_NCHW, 1).flatten(1)).softmax(1)
        ensemble_NK: Tensor = (gate_NM.unsqueeze(2) * logits_NMK).sum(1)
        return ensemble_NK


class Trunk(nn.Module):
    """A network up to its last block group."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        assert isinstance(network, Network), "rules allow this scheme only for kdcore's own networks"
        self.network = network
        self.parts = _last_group(network)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        maps_NCHW = self.network.stem(images_NCHW)
        for part in self.network.trunk()[: self.parts]:
            maps_NCHW = part(maps_NCHW)
        return maps_NCHW


class Branch(nn.Module):
    """A network from its last block group. The modules before it are the trunk's, so that none is trained twice."""

    def __init__(self, network: nn.Module, trunk: Trunk) -> None:
        super().__init__()
        assert isinstance(network, Network), "rules allow this scheme only for kdcore's own networks"
        _share(network, trunk.network, before=network.trunk()[trunk.parts])
        self.network, self.parts = network, trunk.parts

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        for part in self.network.trunk()[self.parts :]:
            maps_NCHW = part(maps_NCHW)
        return self.network.head(maps_NCHW)


def _share(network: nn.Module, trunk: nn.Module, before: nn.Module) -> None:
    """Replace the network's modules by the trunk's, up to `before`. Modules are registered in the order they run."""
    for name, child in network.named_children():
        if any(module is before for module in child.modules()):
            if child is not before:
                _share(child, getattr(trunk, name), before)
            return
        setattr(network, name, getattr(trunk, name))


def _last_group(network: Network) -> int:
    """The position in the trunk of the last part with parameters."""
    return [at for at, part in enumerate(network.trunk()) if any(True for _ in part.parameters())][-1]


@torch.no_grad()
def _width(trunk: Trunk, image_shape: tuple[int, int, int]) -> int:
    """Return the channels of the trunk's maps, from a pass in eval mode, which changes no statistics."""
    device = next(trunk.parameters()).device
    width: int = trunk.eval()(torch.zeros(1, *image_shape, device=device)).shape[1]
    trunk.train()
    return width
