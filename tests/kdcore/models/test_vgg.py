import pytest
import torch

from kdcore.models.vgg import VGG


@pytest.mark.parametrize(("image", "last_map"), [(8, 1), (32, 4), (64, 4)])
def test_vgg_the_fourth_pooling_spares_small_images(image: int, last_map: int):
    network = VGG(8, 10, 3).eval()
    maps = torch.zeros(1, 3, image, image)
    for part in network.trunk():
        maps = part(maps)
    assert maps.shape[2:] == (last_map, last_map)
