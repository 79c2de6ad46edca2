"""Notes beside the weights become stand-ins that can do nothing; everything else is refused."""

import argparse
import io
import pickle
import sys
import zipfile
from collections import defaultdict, deque
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from base.errors import TeacherMismatch
from kdcore.weights import content as content_module
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
        ("addict.addict.Dict", dict),
        ("box.box.Box", dict),
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


class NamedOfText:
    def __reduce__(self) -> Any:
        return getattr, ("text", "join")


def test_read_content_reads_the_curves_of_openmmlab(tmp_path: Path, made):
    """They name their own functions, which Python pickles as a call of getattr. It stays a call of nothing."""
    history = made("mmengine.logging.history_buffer.HistoryBuffer")

    class Named:
        def __reduce__(self) -> Any:
            return getattr, (history, "mean")

    history.mean = print
    buffer = history()
    buffer.__dict__.update(statistics_methods={"mean": Named()}, log=np.arange(3.0))
    value = of({"state_dict": WEIGHTS, "message_hub": {"log_scalars": {"train/loss": buffer}}}, tmp_path / "t.pth")
    assert isinstance(value["message_hub"]["log_scalars"]["train/loss"], Unread)
    with pytest.raises(TeacherMismatch, match=r"it names builtins\.getattr"):
        of({"state_dict": WEIGHTS, "call": NamedOfText()}, tmp_path / "t.pth")


def test_read_content_reads_optimizers_and_losses_as_notes(tmp_path: Path):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)
    value = of({"model": WEIGHTS, "optimizer": optimizer, "loss": nn.CrossEntropyLoss()}, tmp_path / "t.pth")
    assert isinstance(value["optimizer"], Unread) and isinstance(value["loss"], Unread)


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def arrays() -> bytes:
    out = io.BytesIO()
    np.savez(out, **{name: tensor.numpy() for name, tensor in WEIGHTS.items()})
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "words", "way"),
    [
        (b"Entry not found", "but text: 'Entry not found'", "copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer", "git lfs pull"),
        (b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "in several files", "max_shard_size"),
        (zipped({"run/model.pth": b"x", "run/log.txt": b""}), "a checkpoint in it: run/model.pth", "unpack it"),
        (zipped({"a/config.json": b"{}", "a/model.safetensors": b""}), "in it: a/model.safetensors", "unpack it"),
        (zipped({"archive/data.pkl": b"x"}), "no checkpoint that PyTorch can read", "copy it again"),
        (arrays(), "numpy arrays (.npz)", "torch.from_numpy"),
        (pickle.dumps(WEIGHTS), "written by Python's pickle", "torch.save(state_dict, path)"),
        ((64).to_bytes(8, "little") + b'{"a": {"dtype": "Q4"}}', "cut short or damaged", "compare its size"),
    ],
)  # fmt: skip
def test_read_content_names_what_was_sent_by_mistake(tmp_path: Path, content: bytes, words: str, way: str):
    (tmp_path / "t.pth").write_bytes(content)
    with pytest.raises(TeacherMismatch) as caught:
        read_content(tmp_path / "t.pth")
    said = f"{caught.value.message} | {caught.value.hint}"
    assert words in caught.value.message and way in str(caught.value.hint)
    assert not any(internal in said for internal in ("hasRecord", "report an", "variant", "weights_only"))


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


def test_read_content_of_an_archive_of_zeros_or_of_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Refused before PyTorch unpacks it, or Python makes an object for each file."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(100_000))
    monkeypatch.setattr(content_module, "MOST_RATIO", -1)
    with pytest.raises(TeacherMismatch, match=r"no checkpoint|cut short|PyTorch"):
        read_content(path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        info = zipfile.ZipInfo("x/data/0")
        archive.writestr(info, b"")
        archive.filelist[-1].file_size = 2 << 30
        archive._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(TeacherMismatch, match="it looks like a bomb"):
        read_content(path)
    monkeypatch.setattr(content_module, "MOST_MEMBERS", 1)
    with pytest.raises(TeacherMismatch, match="an archive of more than 1 files"):
        read_content(path)
