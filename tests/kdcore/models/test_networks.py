import importlib.util
import subprocess
import sys

import pytest
import torch

from base.errors import SpecInvalid
from kdcore import models, vision
from kdcore.models.networks import skeleton


def test_skeleton_big_tensors_have_a_shape_and_nothing_inside():
    network = skeleton("resnet8", 10, 1)
    assert network.conv1.weight.device.type == "meta" and network.conv1.weight.shape == (16, 1, 3, 3)


def test_skeleton_networks_that_compute_their_widths_need_no_memory_either():
    assert skeleton("torchvision/regnet_y_128gf", 10).fc.weight.shape == (10, 7392)


def test_skeleton_the_random_state_is_untouched():
    before = torch.get_rng_state()
    skeleton("resnet8", 10)
    assert torch.equal(before, torch.get_rng_state())


def test_skeleton_the_compiler_stays_out():
    """Random numbers on the meta device would import it, which takes seconds."""
    program = "import sys; from kdcore.models.networks import skeleton; skeleton('resnet8', 2); "
    program += "sys.exit('torch._dynamo' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="the extra distillery[timm] is absent")


@needs_timm
def test_build_timm_builds_for_any_channels():
    network = models.build("timm/mobilenetv3_small_050", 4, channels=1).eval()
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 4)


@needs_timm
def test_build_an_unknown_timm_name_hears_the_nearest_ones():
    with pytest.raises(SpecInvalid) as caught:
        models.build("timm/resnet19", 4)
    assert "resnet" in str(caught.value.hint)


@needs_timm
def test_build_refuses_a_tag_that_timm_does_not_have():
    with pytest.raises(SpecInvalid, match="no weights with the tag 'nope' of resnet18"):
        models.build("timm/resnet18.nope", 4)


def test_build_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vision, "find_spec", lambda name: None)
    vision.timm.cache_clear()
    with pytest.raises(SpecInvalid) as caught:
        models.build("timm/resnet18", 4)
    assert caught.value.hint == "pip install 'distillery[timm]'"


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_build_a_named_last_relu_changes_neither_weights_nor_answers(name: str):
    theirs = vision.torchvision().models.get_model(name, num_classes=4)
    ours = models.build(f"torchvision/{name}", 4)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for train in (True, False):
        assert torch.equal(ours.train(train)(images), theirs.train(train)(images))


@needs_timm
@pytest.mark.parametrize("name", ["torchvision/vgg11", "timm/resnet10t"])
def test_build_no_relu_works_in_place(name: str):
    relus = [module for module in models.build(name, 4).modules() if isinstance(module, torch.nn.ReLU)]
    assert relus and not any(relu.inplace for relu in relus)


def test_build_auxiliary_heads_are_left_out():
    """In training too, a classifier answers with one tensor."""
    with torch.no_grad():
        assert models.build("torchvision/googlenet", 4)(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
