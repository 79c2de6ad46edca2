"""One library of the kernels for all tests of this folder: compiling takes seconds of a core."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kdcore import kernels
from kdcore.kernels import building


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that has the library; skips where there is no compiler."""
    cache = tmp_path_factory.mktemp("kernels")
    try:
        building.load(cache)
    except building.NotBuilt as error:
        pytest.skip(str(error))
    return cache


@pytest.fixture
def own_convolutions(compiled: Path) -> Iterator[None]:
    """The kernels are enabled, with the convolutions; skips where the CPU has none."""
    support = kernels.enable(compiled)
    if torch.bfloat16 not in support.convolutions:
        pytest.skip(f"no convolutions in bfloat16 here: {support.note}")
    yield
    kernels.disable()
