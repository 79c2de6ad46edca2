"""One program, exported once."""

from pathlib import Path

import pytest
import torch
from torch import nn

from kdcore import models
from tests.kdcore.programs.making import exported


@pytest.fixture(scope="session")
def network() -> nn.Module:
    """A small network with batch norm: 1 x 8 x 8 images, 10 classes."""
    torch.manual_seed(0)
    return models.build("convnet4", 10, channels=1).eval()


@pytest.fixture(scope="session")
def program(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(network, tmp_path_factory.mktemp("program") / "teacher.pt2", torch.zeros(2, 1, 8, 8))
