"""Notes beside the weights become stand-ins that can do nothing; everything else is refused."""

import argparse
import pickle
import sys
from collections import defaultdict, deque
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from base.errors import TeacherMismatch
from kdcore.weights.content import NOTES, Unread, read_content

WEIGHTS = {"fc.weight": torch.ones(2, 3)}


def of(content: Any, path: Path) -> Any:
    torch.save(content, path)
    return read_content(path).value


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch):
    """Makes a class of a library that is not installed, as a pickle names it."""

    def make(full_name: str, base: type = object) -> Any:
        module, _, name = full_name.rpartition(".")
        kind = type(name, (base,), {"__module__": module, "__qualname__": name})
        for depth in range(1, module.count(".") + 2):
            path = ".".join(module.split(".")[:depth])
            monkeypatch.setitem(sys.modules, path, sys.modules.get(path) or ModuleType(path))
        monkeypatch.setattr(sys.modules[module], name, kind, raising=False)
        return kind

    return make


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("omegaconf.dictconfig.DictConfig", object),
        ("omegaconf.base.ContainerMetadata", object),
        ("yacs.config.CfgNode", dict),
        ("mmengine.config.config.ConfigDict", dict),
        ("lightning.fabric.utilities.data.AttributeDict", dict),
        ("easydict.EasyDict", dict),
        ("my_project.training.TrainConfig", object),
        ("__main_of_a_script__.Args", object),
    ],
)
def test_read_content_replaces_options_by_stand_ins(tmp_path: Path, made, name: str, base: type):
    note = made(name, base)()
    note.__dict__.update(lr=0.1)
    if base is dict:
        note["epochs"] = 3
    value = of({"model": WEIGHTS, "cfg": note}, tmp_path / "t.pth")
    assert type(value["cfg"]).__module__ in ("collections", "kdcore.weights.content")
    assert torch.equal(value["model"]["fc.weight"], WEIGHTS["fc.weight"])


def test_read_content_keeps_weights_in_special_dicts(tmp_path: Path):
    value = of({"model": defaultdict(list, WEIGHTS), "queue": deque([1])}, tmp_path / "t.pth")
    assert torch.equal(value["model"]["fc.weight"], WEIGHTS["fc.weight"])


def test_read_content_never_makes_the_class_that_a_note_names(tmp_path: Path):
    namespace = of({"model": WEIGHTS, "args": argparse.Namespace(lr=0.1), "p": Path("x")}, tmp_path / "t.pth")
    assert not isinstance(namespace["args"], argparse.Namespace) and isinstance(namespace["p"], Unread)


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "posix.system", "nt.system", "subprocess.Popen", "builtins.eval", "builtins.exec",
        "builtins.getattr", "builtins.__import__", "importlib.import_module", "runpy.run_path", "shutil.rmtree",
        "pathlib.Path.touch", "pathlib.Path.write_text", "omegaconf.omegaconf.OmegaConf.load", "numpy.load",
        "torch.load", "torch.hub.load", "torch.storage._load_from_bytes", "lightning.pytorch.cli.run",
        "os.Config", "subprocess.Args", "builtins.Namespace", "operator.attrgetter", "functools.partial",
    ],
)  # fmt: skip
def test_notes_are_no_names_that_could_run_code(name: str):
    assert NOTES.fullmatch(name) is None


@pytest.mark.parametrize("name", ["omegaconf.OmegaConf", "torch.nn.Linear", "sys.Config"])
def test_read_content_refuses_a_call_of_something_else(tmp_path: Path, name: str):
    """A pickle that calls a name with an argument, written by hand: `c` pushes the name, `R` calls it."""
    module, _, function = name.rpartition(".")
    (tmp_path / "t.pth").write_bytes(b"\x80\x02c" + f"{module}\n{function}\n".encode() + b"(X\x01\x00\x00\x00xtR.")
    try:
        value = read_content(tmp_path / "t.pth").value
    except TeacherMismatch as refused:
        assert "weights_only" not in str(refused)
    else:
        assert not value, "a stand-in holds nothing"


def test_read_content_names_paddles_weights(tmp_path: Path):
    (tmp_path / "t.pdparams").write_bytes(pickle.dumps({"fc.w": [1.0], "StructuredToParameterName@@": {}}, protocol=4))
    with pytest.raises(TeacherMismatch, match="weights of PaddlePaddle") as caught:
        read_content(tmp_path / "t.pdparams")
    assert "converters" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["torch.ao.nn.quantized.modules.linear.Linear", "bitsandbytes.nn.modules.Params4bit"])
def test_read_content_names_quantised_layers(tmp_path: Path, made, name: str):
    torch.save({"model": made(name)()}, tmp_path / "t.pth")
    with pytest.raises(TeacherMismatch, match="quantised layers") as caught:
        read_content(tmp_path / "t.pth")
    assert "before the quantisation" in str(caught.value.hint)
