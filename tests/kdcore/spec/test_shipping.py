import pytest

from base.errors import Fault
from kdcore.spec.shipping import LIBRARIES, missing, not_installed


@pytest.fixture
def bare(monkeypatch):
    """An installation without any extra."""
    monkeypatch.setattr("kdcore.spec.shipping.find_spec", lambda _name: None)


def test_missing_names_what_a_format_needs_beside_torch(bare):
    assert {name: missing(name) for name in LIBRARIES} == {
        "safetensors": [],
        "onnx": ["onnx", "onnxscript", "onnxruntime"],
        "onnx_int8": ["onnx", "onnxscript", "onnxruntime"],
        "torch_export": [],
        "openvino": ["onnx", "onnxscript", "onnxruntime", "openvino"],
    }


def test_not_installed_is_a_fault_at_its_place_with_the_extra_and_what_would_work(bare):
    text = "'openvino' needs onnx and onnxscript and onnxruntime and openvino, not installed here: "
    text += "pip install 'distillery[onnx,openvino]'"
    possible = ["safetensors", "torch_export"]
    assert list(not_installed(("safetensors", "openvino"))) == [
        Fault("/export/1", text, "not_allowed", possible, "openvino")
    ]
    assert not list(not_installed(("safetensors", "torch_export")))


def test_not_installed_one_package_names_its_own_extra(monkeypatch):
    monkeypatch.setattr("kdcore.spec.shipping.find_spec", lambda name: None if name == "openvino" else name)
    [fault] = not_installed(("onnx", "openvino"))
    assert fault.message.endswith("needs openvino, not installed here: pip install 'distillery[openvino]'")
