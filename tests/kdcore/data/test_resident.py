import torch

from kdcore.catalog import named_facts
from kdcore.data import Data, Images


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
