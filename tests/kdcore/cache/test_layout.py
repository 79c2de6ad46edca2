import numpy as np
import pytest
import torch

from kdcore.cache.layout import MOST_BYTES, Layout, same_bits
from kdcore.lesson import Reduced, View

MAP = Reduced(("layer",), "map", lambda tap: tap)


def view(n=3, bf16=True):
    generator = torch.Generator().manual_seed(0)
    logits, tap, maps = (torch.randn(n, *shape, generator=generator) for shape in ((5,), (2, 2, 2), (4,)))
    logits[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    tap = tap.contiguous(memory_format=torch.channels_last)
    return View(logits.bfloat16().float() if bf16 else logits, {"layer@in": tap}, reduced={MAP: maps})


@pytest.mark.parametrize("bf16", [False, True])
def test_layout_returns_the_bits_that_it_got(bf16):
    given = view(bf16=bf16)
    layout = Layout.of(given)
    assert isinstance(layout, Layout) and layout.width == 5 + 8 + 4
    values = layout.flat(given)
    stored, exact = layout.encoded(values)
    assert exact.all() and stored.shape == (3, layout.size)
    assert layout.size == (2 if bf16 else 4) * 5 + 4 * 12
    assert same_bits(layout.decoded(stored), values)
    again = layout.view(layout.decoded(stored))
    assert again.taps.keys() == {"layer@in"} and again.reduced.keys() == {MAP}
    for one, other in ((again.logits, given.logits), (again.taps["layer@in"], given.taps["layer@in"]),
                       (again.reduced[MAP], given.reduced[MAP])):  # fmt: skip
        assert one.shape == other.shape and one.is_contiguous()
        assert torch.equal(one.view(torch.int32), other.contiguous().view(torch.int32))


def test_layout_of_logits_alone():
    for logits in (torch.ones(2, 3), torch.full((2, 3), 0.1)):
        layout = Layout.of(View(logits))
        assert isinstance(layout, Layout)
        values = layout.flat(View(logits))
        assert same_bits(layout.decoded(layout.encoded(values)[0]), values)


def test_layout_tells_records_that_two_bytes_cannot_hold():
    layout = Layout.of(View(torch.ones(2, 3)))
    assert isinstance(layout, Layout) and layout.size == 6
    assert layout.encoded(np.array([[1, 2, 3], [1, 2, 0.1]], dtype=np.float32))[1].tolist() == [True, False]


def test_layout_differs_by_what_is_in_it():
    described = [Layout.of(one).described() for one in (view(), view(bf16=False), View(torch.ones(2, 5)))]
    assert len({str(one) for one in described}) == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (View(torch.ones(1, 3), {"a": torch.ones(1, MOST_BYTES // 4)}), "the most is"),
        (View(torch.ones(1, 3), {"a": torch.ones(1, 3, dtype=torch.float64)}), "another type"),
        (View(torch.ones(1, 3), {"a": torch.ones(2, 3)}), "another type"),
    ],
)
def test_layout_says_why_views_are_not_kept(given, said):
    assert said in Layout.of(given)
