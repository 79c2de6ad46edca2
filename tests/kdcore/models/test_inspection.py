import importlib.util

import pytest
import torch

from base.errors import SpecInvalid
from kdcore import models
from kdcore.catalog.architectures import architecture
from kdcore.models.networks import skeleton
from kdcore.models.taps import Taps

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="the extra distillery[timm] is absent")


def test_inspect_ours_are_as_the_catalogue_says():
    assert models.inspect("resnet8", 10, 1, (8, 8)) == architecture("resnet8")


@pytest.mark.parametrize(("size", "works"), [((8, 8), True), ((4, 4), False), ((12, 9), True)])
def test_inspect_images_too_small_are_refused(size: tuple[int, int], works: bool):
    if works:
        models.inspect("vgg8", 10, 3, size)
        return
    with pytest.raises(SpecInvalid, match="cannot take images of 4 x 4 pixels"):
        models.inspect("vgg8", 10, 3, size)


def test_inspect_attention_refuses_another_size_than_its_own():
    with pytest.raises(SpecInvalid, match="cannot take images of 32 x 32 pixels"):
        models.inspect("torchvision/vit_b_32", 10, 3, (32, 32))


@needs_timm
def test_inspect_timms_networks_are_counted():
    facts = models.inspect("timm/test_resnet", 10, 3, (32, 32))
    parameters = sum(parameter.numel() for parameter in models.build("timm/test_resnet", 100, 4).parameters())
    assert (facts.parameters(100, 4), facts.embedding, facts.embedding_width) == (parameters, "fc@in", 96)


@needs_timm
def test_inspect_timms_residual_networks_are_tapped_at_and_before_the_ends_of_their_stages():
    facts = models.inspect("timm/test_resnet", 10, 3, (32, 32))
    assert (facts.taps, facts.tap_widths) == (["layer1", "layer2", "layer3", "layer4"], [32, 48, 192, 96])
    assert facts.preactivations == ["layer1.0.act2@in", "layer2.0.act2@in", "layer3.0.act3@in", "layer4.0.act2@in"]
    assert facts.margins == ["layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn3", "layer4.0.bn2"]


@needs_timm
def test_inspect_timms_transformers_are_tapped_at_each_quarter_of_their_depth():
    facts = models.inspect("timm/test_vit", 10, 3, (160, 160))
    assert facts.taps == ["blocks.1@tokens", "blocks.2@tokens", "blocks.4@tokens", "blocks.5@tokens"]
    assert (facts.tap_widths, facts.embedding, facts.preactivations) == ([64] * 4, "head@in", [])


@needs_timm
def test_inspect_channels_that_come_last_are_seen():
    facts = models.inspect("timm/test_mambaout", 10, 3, (160, 160))
    assert facts.taps == [f"stages.{stage}@nhwc" for stage in range(4)]


FAMILIES = {
    # name: (image size, taps at least)
    "resnet10t": (32, 4),
    "resnetv2_50": (32, 4),
    "regnety_002": (32, 4),
    "mobilenetv3_small_050": (32, 4),
    "efficientnet_lite0": (32, 4),
    "convnext_atto": (32, 4),
    "edgenext_xx_small": (32, 4),
    "densenet121": (32, 4),
    "hrnet_w18_small": (64, 4),
    "vit_tiny_patch16_224": (224, 4),
    "vit_tiny_r_s16_p8_224": (224, 4),
    "deit_tiny_distilled_patch16_224": (224, 4),
    "swin_tiny_patch4_window7_224": (224, 4),
    "mixer_s32_224": (224, 4),
    "levit_128s": (224, 3),
    "pit_xs_224": (224, 3),
    "twins_svt_small": (224, 4),
    "volo_d1_224": (224, 2),
    "tnt_s_patch16_224": (224, 1),
}


@needs_timm
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_inspect_every_family_of_timm_has_taps_that_work_in_training_too(name: str):
    size, least = FAMILIES[name]
    facts = models.inspect(f"timm/{name}", 10, 3, (size, size))
    assert len(facts.taps) >= least
    # Without memory, and in training: `read` refuses what an operation in place behind a tap has overwritten.
    network = skeleton(f"timm/{name}", 10).to("meta").train()
    taps = Taps(network, [*facts.taps, *facts.preactivations, *([facts.embedding] if facts.embedding else [])])
    network(torch.empty(2, 3, size, size, device="meta"))
    seen = taps.read()
    maps = [seen[path] for path in facts.taps]
    assert [tap.shape[1] for tap in maps] == facts.tap_widths and {tap.dim() for tap in maps} == {4}
    sizes = [tap.shape[2:] for tap in maps]
    assert sizes == sorted(sizes, reverse=True)
    assert facts.embedding is None or seen[facts.embedding].shape[1] == facts.embedding_width


@needs_timm
@pytest.mark.slow
def test_inspect_tokens_in_another_order_than_the_images_are_no_map():
    """Hiera sorts its tokens by what it will pool; only in the last stage each stands in its place."""
    assert models.inspect("timm/hiera_tiny_224", 10, 3, (224, 224)).taps == ["blocks.11@tokens"]


@needs_timm
def test_inspect_looking_draws_no_random_numbers_and_says_the_same_twice():
    before = torch.get_rng_state()
    assert models.inspect("timm/test_resnet", 3, 1, (32, 32)) == models.inspect("timm/test_resnet", 3, 1, (32, 32))
    assert torch.equal(before, torch.get_rng_state())


def test_inspect_taps_taps_tell_what_they_give_for_one_image():
    seen = models.inspect_taps("resnet8", 10, 1, (16, 12), ["layer2", "layer2.0.relu@in", "fc@in"])
    assert seen.shapes == {"layer2": [32, 8, 6], "layer2.0.relu@in": [32, 8, 6], "fc@in": [64]}


@pytest.mark.parametrize(
    ("path", "reason"),
    [("layer4", "no such module"), ("layer2@tokens", "gives 2 x 32 x 8 x 6, not N x L x D")],
)
def test_inspect_taps_a_tap_that_cannot_be_read_says_why(path: str, reason: str):
    with pytest.raises(SpecInvalid, match=reason):
        models.inspect_taps("resnet8", 10, 1, (16, 12), [path])
