import subprocess
import sys

import torch

from kdcore.models.skeleton import skeleton


def test_big_tensors_have_a_shape_and_nothing_inside():
    network = skeleton("resnet8", 10, 1)
    assert network.conv1.weight.device.type == "meta" and network.conv1.weight.shape == (16, 1, 3, 3)


def test_networks_that_compute_their_widths_need_no_memory_either():
    assert skeleton("torchvision/regnet_y_128gf", 10).fc.weight.shape == (10, 7392)


def test_the_random_state_is_untouched():
    before = torch.get_rng_state()
    skeleton("resnet8", 10)
    assert torch.equal(before, torch.get_rng_state())


def test_the_compiler_stays_out():
    """Random numbers on the meta device would import it, which takes seconds."""
    program = "import sys; from kdcore.models.skeleton import skeleton; skeleton('resnet8', 2); "
    program += "sys.exit('torch._dynamo' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
