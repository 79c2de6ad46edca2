"""Names of libraries' networks, read without importing them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdcore.catalog import ARCHITECTURES, libraries

SOURCE = """
@register_model
def made_up_18(pretrained=False): ...

@register_model()
@handle_legacy_interface(
    weights=("pretrained", Made_Up_Weights.DEFAULT),
)
def made_up_34(*, weights=None): ...

class Made_Up_Weights(WeightsEnum):
    DEFAULT = 1

def no_network(): ...

register_model_deprecations(__name__, {
    'former_18': 'made_up_18.tag',
})
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    models = tmp_path / "models" / "deep"
    models.mkdir(parents=True)
    (models / "one.py").write_text(SOURCE)
    found = {"timm": SimpleNamespace(origin=str(tmp_path / "__init__.py")), "torchvision": None}
    monkeypatch.setattr(libraries, "find_spec", found.__getitem__)
    libraries.names.cache_clear()
    yield
    libraries.names.cache_clear()


@pytest.mark.usefixtures("library")
def test_names_and_missing() -> None:
    assert libraries.names("timm") == {"made_up_18", "made_up_34", "Made_Up_Weights", "former_18"}
    for name in ("timm/made_up_18", "timm/made_up_34.tag", "timm/former_18"):
        assert libraries.missing(name) is None
    assert libraries.missing("timm/made_up_19") == (
        "timm has no model 'made_up_19' (did you mean made_up_18, made_up_34?)"
    )
    assert libraries.missing("timm/no_network.tag") == "timm has no model 'no_network'"
    assert libraries.missing("torchvision/anything") is None, "it is not installed: the child says so"


def test_names_of_the_installed_torchvision() -> None:
    """Every network of the catalogue is found in the text."""
    if not libraries.names("torchvision"):
        pytest.skip("torchvision is not installed")
    ours = [name for name in ARCHITECTURES if name.startswith("torchvision/")]
    assert ours and not any(libraries.missing(name) for name in ours)
    assert libraries.missing("ResNet50_Weights.IMAGENET1K_V2") is None
    assert libraries.missing("ResNet51_Weights.IMAGENET1K_V2") is not None


def test_names_of_the_installed_timm() -> None:
    if not libraries.names("timm"):
        pytest.skip("timm is not installed")
    assert len(libraries.names("timm")) > 1000
    assert libraries.missing("timm/resnet18.a1_in1k") is None and libraries.missing("timm/resnet_18") is not None
