from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from bench import convolutions
from kdcore import kernels


@pytest.fixture(params=convolutions.PRECISIONS.values(), ids=convolutions.PRECISIONS)
def precision(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[torch.dtype]:
    support = kernels.enable(tmp_path)
    if request.param not in support.convolutions:
        pytest.skip(f"no convolutions here: {support.note}")
    yield request.param
    kernels.disable()


@pytest.mark.parametrize("part", convolutions.PARTS)
def test_each_part_is_computed_by_both_sides(part: str, precision: torch.dtype) -> None:
    assert convolutions.ratio(part, (16, 16, 8, 1), batch=4, turns=2, precision=precision) > 0


@pytest.mark.parametrize("part", convolutions.PARTS[:2])
def test_both_sides_compute_the_same(part: str, precision: torch.dtype) -> None:
    for run in islice(convolutions._runs(part, (16, 32, 8, 1), 4, precision), 2):
        own = run()
        with kernels.paused():
            other = run()
        assert own is not other and torch.allclose(own.float(), other.float(), atol=0.05, rtol=0.02)


def test_errors_are_those_of_rounding(precision: torch.dtype) -> None:
    own, other = convolutions.errors((16, 32, 8, 1), 4, precision)
    step = 2.0**-8 if precision == torch.bfloat16 else 2.0**-23
    assert 0 < own < 20 * step and 0 < other < 20 * step and own != other
