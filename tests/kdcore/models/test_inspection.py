import importlib.util

import pytest

from kdcore import models
from kdcore.catalog.architectures import architecture
from kdcore.errors import SpecInvalid

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="the extra distillery[timm] is absent")


def test_ours_are_as_the_catalogue_says():
    assert models.inspect("resnet8", 10, 1, (8, 8)) == architecture("resnet8")


@pytest.mark.parametrize(("size", "works"), [((8, 8), True), ((4, 4), False), ((12, 9), True)])
def test_images_too_small_are_refused(size: tuple[int, int], works: bool):
    if works:
        models.inspect("vgg8", 10, 3, size)
        return
    with pytest.raises(SpecInvalid, match="cannot take images of 4 x 4 pixels"):
        models.inspect("vgg8", 10, 3, size)


def test_attention_refuses_another_size_than_its_own():
    with pytest.raises(SpecInvalid, match="cannot take images of 32 x 32 pixels"):
        models.inspect("torchvision/vit_b_32", 10, 3, (32, 32))


@needs_timm
def test_timms_networks_are_counted():
    facts = models.inspect("timm/resnet18", 10, 3, (32, 32))
    assert (facts.parameters(1000, 3), facts.embedding, facts.embedding_width) == (11_689_512, "fc@in", 512)
