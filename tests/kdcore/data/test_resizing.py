import numpy as np
import pytest
import torch
from PIL import Image

from kdcore.data.resizing import Boxes, resized, resized_crop


def noise(n: int, side: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (n, channels, side, side), generator=generator, dtype=torch.uint8)


def box(top: int, left: int, tall: int, wide: int) -> Boxes:
    return Boxes(*(torch.tensor([value]) for value in (top, left, tall, wide)))


ZERO = torch.zeros(1, dtype=torch.int64)


def test_resized_crop_a_box_of_the_whole_image_changes_nothing():
    pixels = noise(6, 9)
    zero, nine = torch.zeros(6, dtype=torch.long), torch.full((6,), 9)
    whole = Boxes(zero, zero, nine, nine)
    assert torch.equal(resized_crop(pixels, whole, zero), pixels)
    assert torch.equal(resized_crop(pixels, whole, zero + 1), pixels.flip(-1))


def test_resized_crop_is_torchs_bilinear_to_within_rounding():
    pixels = noise(20, 16)
    generator = torch.Generator().manual_seed(2)
    tall, wide = torch.randint(1, 17, (2, 20), generator=generator)
    top = (torch.rand(20, generator=generator) * (17 - tall)).long()
    left = (torch.rand(20, generator=generator) * (17 - wide)).long()
    cut = resized_crop(pixels, Boxes(top, left, tall, wide), torch.zeros(20, dtype=torch.long))
    for n in range(20):
        box = pixels[n : n + 1, :, top[n] : top[n] + tall[n], left[n] : left[n] + wide[n]].float()
        expected = torch.nn.functional.interpolate(box, (16, 16), mode="bilinear")[0]
        assert (cut[n].float() - expected).abs().max() < 3


def test_resized_crop_of_a_box_in_a_frame_worked_out_by_hand():
    """The right half of 0, 10, 20, 30, given as pixel 1 of 2, in 4 pixels: their middles are at 1.75, 2.25, 2.75, 3.25
    of the stored ones, and what is outside of the box is not used. The two rows are 0 and 100 more."""
    pixels = torch.tensor([[0, 10, 20, 30], [100, 110, 120, 130]], dtype=torch.uint8).repeat_interleave(2, 0)[
        None, None
    ]
    across = resized_crop(pixels, box(0, 1, 2, 1), ZERO, frame=(2, 2))
    assert across[0, 0, 0].tolist() == [20, 23, 28, 30] and across[0, 0, 3].tolist() == [120, 123, 128, 130]
    mirrored = resized_crop(pixels, box(0, 1, 2, 1), ZERO + 1, frame=(2, 2))
    assert torch.equal(mirrored, across.flip(-1))


def test_resized_crop_shrinks_by_a_mean_worked_out_by_hand():
    """4 pixels to 2: the middles are at 0.5 and 2.5, the weights 3, 3, 1 of 0, 10, 20, and 1, 3, 3 of 10, 20, 30."""
    row = torch.tensor([0, 10, 20, 30], dtype=torch.uint8).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert resized(row, (2, 2))[0, 0, 0].tolist() == [round(50 / 7), round(160 / 7)]


@pytest.mark.parametrize("size", [(5, 5), (16, 7), (10, 16), (15, 15)])
def test_resized_shrinks_as_pillow_does(size):
    pixels = noise(4, 16)
    ours = resized(pixels, size)
    for picture, one in zip(pixels, ours, strict=True):
        theirs = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(theirs).astype(int) - one.permute(1, 2, 0).numpy().astype(int)).max() <= 2


def test_resized_crop_boxes_that_grow_and_shrink_in_one_batch_are_pillows():
    pixels = noise(3, 16)
    boxes = Boxes(*(torch.tensor(values) for values in ([0, 2, 9], [0, 4, 3], [16, 6, 2], [16, 11, 13])))
    ours = resized_crop(pixels, boxes, torch.tensor([0, 1, 0]), size=(8, 8))
    for n, (top, left, tall, wide) in enumerate(zip(*(x.tolist() for x in boxes), strict=True)):
        cut = Image.fromarray(pixels[n].permute(1, 2, 0).numpy()).crop((left, top, left + wide, top + tall))
        expected = np.asarray(cut.resize((8, 8), Image.Resampling.BILINEAR)).astype(int)
        one = ours[n].flip(-1) if n == 1 else ours[n]
        assert np.abs(expected - one.permute(1, 2, 0).numpy().astype(int)).max() <= 2


@pytest.mark.parametrize("size", [4, 12, 24, 40])
def test_resized_crop_even_pictures_stay_even_for_every_box(size):
    """Also for boxes of a few hundredths of the picture, and at its edges: all weights of a pixel have the sum 1."""
    pixels = torch.full((60, 1, 12, 12), 200, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(3)
    tall, wide = torch.randint(1, 31, (2, 60), generator=generator)
    top, left = (torch.randint(0, 30, (60,), generator=generator) % (31 - side) for side in (tall, wide))
    cut = resized_crop(pixels, Boxes(top, left, tall, wide), torch.arange(60) % 2, frame=(30, 30), size=(size, size))
    assert cut.shape == (60, 1, size, size) and (cut == 200).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("size", [8, 24])
def test_resized_a_gpu_gives_the_same_bytes(size):
    pixels = noise(20, 16)
    assert torch.equal(resized(pixels, (size, size)), resized(pixels.to("cuda"), (size, size)).cpu())
