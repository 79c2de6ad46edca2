import subprocess
import sys
from pathlib import Path

from kdcore import vision

ROOT = Path(__file__).parents[2]


def test_torchvision_imports_beside_this_torch():
    library = vision.torchvision()
    assert library.models.resnet18 and library.datasets.CIFAR10
    assert vision.torchvision() is library


def test_vision_it_is_not_imported_on_start():
    program = "import sys, kdcore.vision, kdcore.models, kdcore.weights; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_nobody_else_imports_torchvision_or_timm():
    imports = ("import torchvision", "from torchvision", "import timm", "from timm")
    others = [path for path in ROOT.glob("kdcore/**/*.py") if path.name != "vision.py"]
    lines = [line.strip() for path in others for line in path.read_text(encoding="utf-8").splitlines()]
    assert others and not [line for line in lines if line.startswith(imports)]
