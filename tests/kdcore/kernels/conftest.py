"""One library for all tests of this folder: compiling takes two seconds of a core."""

from pathlib import Path

import pytest

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
