import torch

from kdcore.models.resnet import ResNet, ZeroPad


def test_resnet_keys_are_those_of_published_checkpoints():
    keys = list(ResNet(8, 10, 3).state_dict())
    assert keys[:2] == ["conv1.weight", "bn1.weight"] and keys[-2:] == ["fc.weight", "fc.bias"]
    assert "layer2.0.downsample.0.weight" in keys and "layer2.0.downsample.1.running_mean" in keys
    assert "layer1.0.downsample.0.weight" not in keys


def test_zero_pad_a_zero_padded_shortcut_keeps_every_other_pixel_between_zeros():
    maps = torch.arange(16.0).reshape(1, 1, 4, 4)
    shortcut = ZeroPad(more_channels=2, stride=2)(maps)
    assert torch.equal(shortcut[0, 1], torch.tensor([[0.0, 2.0], [8.0, 10.0]]))
    assert shortcut.shape == (1, 3, 2, 2) and shortcut[0, 0].sum() == shortcut[0, 2].sum() == 0


def test_resnet_option_a_has_no_weights_in_its_shortcuts():
    assert not any("downsample" in key for key in ResNet(8, 10, 3, option_a=True).state_dict())


def test_resnet_he_initialisation_keeps_the_fan_out():
    """Variance 2 / (3 * 3 * 64) over the 36,864 weights of a last-stage convolution."""
    torch.manual_seed(0)
    weight = ResNet(20, 10, 3).layer3[2].conv2.weight
    assert abs(weight.var().item() * 9 * 64 / 2 - 1) < 0.05
