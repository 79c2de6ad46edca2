import torch

from kdcore.catalog import named_facts
from kdcore.data import Data, Images, joined


def images(n: int = 4) -> Images:
    return Images(torch.arange(n * 12, dtype=torch.uint8).view(n, 3, 2, 2), torch.arange(n))


def test_length_and_rows():
    taken = images().take(torch.tensor([2, 0, 2]))
    assert len(images()) == 4 and len(taken) == 3
    assert taken.labels.tolist() == [2, 0, 2]
    assert torch.equal(taken.pixels[0], images().pixels[2])


def test_no_rows():
    assert len(images().take(torch.tensor([], dtype=torch.int64))) == 0


def test_moving_a_data_set_keeps_what_is_known_of_it():
    data = Data(images(), images(2), ("a", "b"), named_facts("digits"))
    moved = data.to("meta")
    assert moved.train.pixels.device.type == "meta" and moved.test.labels.device.type == "meta"
    assert moved.facts == data.facts and moved.class_names == data.class_names


def test_joined_rows_stand_one_after_the_other():
    pool = Images(images(3).pixels + 100, torch.full((3,), -1))
    both = joined(images(), pool)
    whole = torch.cat([images().pixels, pool.pixels])
    assert len(both) == 7 and both.labels.tolist() == [0, 1, 2, 3, -1, -1, -1]
    for index in ([6, 0, 4, 3, 3], [1, 2], [5], []):
        rows = torch.tensor(index, dtype=torch.int64)
        assert torch.equal(both.take(rows).pixels, whole[rows])
    assert torch.equal(both.pixels[2:6], whole[2:6]) and torch.equal(both.pixels[5:99], whole[5:])


def test_three_may_be_joined():
    thrice = joined(joined(images(2), images(3)), images(1))
    assert torch.equal(thrice.pixels[:], torch.cat([images(2).pixels, images(3).pixels, images(1).pixels]))


def test_joining_copies_no_pixels():
    one, other = images(), images(3)
    both = joined(one, other)
    other.pixels[1] = 7
    assert (both.take(torch.tensor([5])).pixels == 7).all()
    assert both.to("cpu").pixels is both.pixels


def test_on_another_device_joined_images_are_one_tensor():
    moved = joined(images(), images(3)).to("meta")
    assert isinstance(moved.pixels, torch.Tensor) and moved.pixels.shape == (7, 3, 2, 2)
    assert moved.pixels.device.type == moved.labels.device.type == "meta"
