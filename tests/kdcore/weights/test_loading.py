"""Checkpoints as people have them, and files that only look like one."""

import argparse
import hashlib
import io
import json
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from base.errors import SpecInvalid, TeacherMismatch
from kdcore import models, weights
from kdcore.weights.content import read_content
from tests.base.test_file_kinds import STARTS

TEACHERS = Path(__file__).parents[3] / "shared" / "data" / "teachers"
NAME = "convnet4"


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return models.build(NAME, 10, channels=1)


@pytest.fixture
def state(network: nn.Module) -> dict[str, torch.Tensor]:
    return network.state_dict()


def refusal(path: Path, architecture: str | None = NAME) -> TeacherMismatch:
    with pytest.raises(TeacherMismatch) as caught:
        weights.inspect(path, architecture)
    return caught.value


# Real teachers


@pytest.mark.parametrize(("depth", "parameters"), [(20, 278_324), (32, 472_756), (56, 861_620)])
def test_published_teachers_load(depth: int, parameters: int):
    path = TEACHERS / f"cifar100_resnet{depth}.pth"
    if not path.exists():
        pytest.skip("the published teachers are not here; a network saved by the tests stands in for them")
    teacher = weights.open_teacher(path, f"resnet{depth}", channels=3)
    assert (teacher.facts.num_classes, teacher.facts.channels) == (100, 3)
    assert (teacher.facts.parameters, teacher.facts.format) == (parameters, "pytorch")
    weights.load_into(models.build(f"resnet{depth}", 100), teacher.state, "the teacher")


def test_inspect_a_cifar_resnet_is_measured_by_its_file(tmp_path: Path):
    path = tmp_path / "teacher.pth"
    torch.save(models.build("resnet20", 17, channels=1).state_dict(), path)
    facts = weights.inspect(path, "resnet20")
    assert (facts.num_classes, facts.channels, facts.parameters) == (17, 1, 272_474 + 7 * 65 - 2 * 144)
    assert facts.bytes == path.stat().st_size
    assert facts.digest == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("num_classes", [1000, 5])
@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v2"])
def test_inspect_torchvisions_state_dicts_fit_with_any_class_count(tmp_path: Path, name: str, num_classes: int):
    torch.save(models.build(f"torchvision/{name}", num_classes).state_dict(), tmp_path / "t.pth")
    facts = weights.inspect(tmp_path / "t.pth", f"torchvision/{name}")
    assert (facts.num_classes, facts.channels) == (num_classes, 3)


# Wrappings


def lies(network: nn.Module, path: Path) -> bool:
    """Return True if the file gives back the network's own weights under their own names."""
    read = weights.open_teacher(path, NAME).state
    return equal(read, network)


def equal(state: Mapping[str, torch.Tensor], network: nn.Module) -> bool:
    own = network.state_dict()
    return state.keys() == own.keys() and all(torch.equal(state[key], value) for key, value in own.items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"net": state, "acc": torch.tensor(93.1)},
        lambda state: {"model": state, "best_acc": np.float64(72.6), "args": argparse.Namespace(lr=0.1)},
        lambda state: {"model": {"state_dict": state}, "mean": np.array([0.5]), "where": Path("x")},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
        lambda state: {"n_averaged": torch.tensor(5)} | {f"module.{key}": value for key, value in state.items()},
        lambda state: OrderedDict((key, nn.Parameter(v) if v.is_floating_point() else v) for key, v in state.items()),
    ],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_wrappers_prefixes_and_notes_are_undone(tmp_path: Path, network: nn.Module, wrap, zipped: bool):
    path = tmp_path / "model_best.pth.tar"
    torch.save(wrap(network.state_dict()), path, _use_new_zipfile_serialization=zipped)
    assert lies(network, path)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_read_numbers_of_old_and_new_numpy_are_passed_over(tmp_path: Path, network: nn.Module, module: str):
    """Under either name that numpy's reader has had."""
    path = tmp_path / "t.pth"
    torch.save({"net": network.state_dict(), "acc": np.float64(1)}, path, _use_new_zipfile_serialization=False)
    here = np.float64.__reduce__(np.float64(1))[0].__module__
    path.write_bytes(path.read_bytes().replace(f"c{here}\n".encode(), f"c{module}\n".encode()))
    assert lies(network, path)


def test_safetensors_are_read(tmp_path: Path, network: nn.Module):
    save_file(network.state_dict(), tmp_path / "t.safetensors")
    assert lies(network, tmp_path / "t.safetensors")
    assert weights.inspect(tmp_path / "t.safetensors", NAME).format == "safetensors"


def test_inspect_a_student_of_ours_says_all_by_itself(tmp_path: Path, state: dict[str, torch.Tensor]):
    notes = {"architecture": NAME, "num_classes": 10, "class_names": list("0123456789"), "mean": [0.3], "std": [0.4]}
    save_file(state, tmp_path / "t.safetensors", {"distillery": json.dumps(notes)})
    facts = weights.inspect(tmp_path / "t.safetensors", None)
    assert (facts.architecture, facts.num_classes, facts.channels) == (NAME, 10, 1)
    assert (facts.mean, facts.std, facts.class_names) == ([0.3], [0.4], list("0123456789"))


@pytest.mark.parametrize(
    ("notes", "words"),
    [
        ("{", "cannot be read"),
        ('{"mean": "grey"}', "cannot be read"),
        ('{"class_names": ["a"]}', "notes 1 class names, its weights have 10"),
        ('{"std": [1, 1, 1]}', "notes 3 channels of its standard deviation, its weights have 1"),
        ('{"mean": [0.5], "std": [0]}', "the mean and std that the file notes cannot be used: Input should be greater"),
        ('{"mean": [NaN]}', "the mean and std that the file notes cannot be used: Input should be a finite number"),
        ('{"std": [-1]}', "the mean and std that the file notes cannot be used: Input should be greater than 0"),
        ('{"mean": [0.5], "std": [1e-300]}', "cannot be used: Input should be greater than or equal to 0.001"),
        ('{"class_names": ["\\ud800"]}', "cannot be read"),
        ('{"mean": [123.7], "std": [58.4]}', "are not of pixels in 0..1: divide by 255"),
    ],
)
def test_notes_that_make_no_sense_are_refused(tmp_path: Path, state: dict[str, torch.Tensor], notes: str, words: str):
    save_file(state, tmp_path / "t.safetensors", {"distillery": notes})
    assert words in refusal(tmp_path / "t.safetensors").message


def test_load_into_half_precision_and_missing_counters_are_forgiven(tmp_path: Path, network: nn.Module):
    old = {k: v.half() for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "t.pth")
    twin = models.build(NAME, 10, channels=1)
    weights.load_into(twin, weights.open_teacher(tmp_path / "t.pth", NAME).state, "the teacher")
    assert torch.allclose(twin.fc.weight, network.fc.weight, atol=1e-3)


def test_load_into_auxiliary_heads_and_densenets_old_names_are_forgiven(tmp_path: Path):
    googlenet = models.build("torchvision/googlenet", 4)
    weights.load_into(googlenet, googlenet.state_dict() | {"aux1.fc2.weight": torch.zeros(4, 1)}, "the teacher")
    densenet = models.build("torchvision/densenet121", 4)
    old = {k.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): v for k, v in densenet.state_dict().items()}
    assert old.keys() != densenet.state_dict().keys()
    torch.save(old, tmp_path / "t.pth")
    assert equal(weights.open_teacher(tmp_path / "t.pth", "torchvision/densenet121").state, densenet)


# Misfits


def test_inspect_a_misfit_names_the_first_keys_and_the_likely_architecture(tmp_path: Path):
    torch.save(models.build("resnet14", 10).state_dict(), tmp_path / "t.pth")
    error = refusal(tmp_path / "t.pth", "resnet20")
    assert "28 of 128 keys are missing, first layer1.2.conv1.weight" not in error.message, "counters are forgiven"
    assert "missing, first layer1.2.conv1.weight" in error.message
    assert error.hint == "its 175,258 parameters are those of resnet14"


def test_load_into_unexpected_and_misshapen_keys_are_named(state: dict[str, torch.Tensor]):
    wrong = state | {"extra": torch.zeros(1), "fc.weight": torch.zeros(10, 9)}
    with pytest.raises(TeacherMismatch) as caught:
        weights.load_into(models.build(NAME, 10, channels=1), wrong, "the teacher job:1")
    assert caught.value.message == (
        "the teacher job:1: 1 of 21 keys is unexpected, first extra; "
        "1 of 20 keys is of another shape, first fc.weight: 10 x 9 in the file, 10 x 8 in the network"
    )


def test_inspect_a_checkpoint_without_classifier_says_so(tmp_path: Path, state: dict[str, torch.Tensor]):
    torch.save({key: value for key, value in state.items() if not key.startswith("fc.")}, tmp_path / "t.pth")
    assert "2 of 20 keys are missing, first fc.weight" in refusal(tmp_path / "t.pth").message


def test_inspect_data_of_other_channels_is_refused(tmp_path: Path, state: dict[str, torch.Tensor]):
    torch.save(state, tmp_path / "t.pth")
    with pytest.raises(TeacherMismatch, match="images of 1 channels, the data has 3"):
        weights.inspect(tmp_path / "t.pth", NAME, channels=3)


def test_inspect_without_architecture_it_is_found_by_its_size(tmp_path: Path, state: dict[str, torch.Tensor]):
    torch.save(state, tmp_path / "t.pth")
    facts = weights.inspect(tmp_path / "t.pth", None)
    assert (facts.architecture, facts.loading.architecture_found) == (NAME, True)
    torch.save({"a.weight": torch.zeros(3, 3), "a.bias": torch.zeros(3)}, tmp_path / "t.pth")
    assert "does not say its architecture" in refusal(tmp_path / "t.pth", None).message


def test_inspect_an_unknown_architecture_is_the_specs_fault(tmp_path: Path, state: dict[str, torch.Tensor]):
    torch.save(state, tmp_path / "t.pth")
    with pytest.raises(SpecInvalid, match="convnet4"):
        weights.inspect(tmp_path / "t.pth", "convnet5")


def test_weights_that_diverged_are_refused(tmp_path: Path, state: dict[str, torch.Tensor]):
    torch.save(state | {"fc.bias": torch.full((10,), float("nan"))}, tmp_path / "t.pth")
    assert "fc.bias holds values that are no numbers" in refusal(tmp_path / "t.pth").message


def test_quantised_weights_are_refused(tmp_path: Path, state: dict[str, torch.Tensor]):
    torch.save(state | {"fc.weight": torch.zeros(10, 8, dtype=torch.int8)}, tmp_path / "t.pth")
    assert "quantised: fc.weight is torch.int8" in refusal(tmp_path / "t.pth").message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"fc.weight": torch.zeros(2), "note": "mine"}, "20 keys are missing"),
        ({"fc.weight": np.zeros(3)}, "entry 'fc.weight' is a numpy array or other object"),
        ({"epoch": 3}, "entry 'epoch' is of type int"),
        ({}, "holds no tensors"),
        ([torch.zeros(1)], "is of type list"),
        (torch.zeros(1), "is of type Tensor"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "entry 'a'"),
    ],
)
def test_inspect_what_is_no_state_dict_is_named(tmp_path: Path, content: object, words: str):
    torch.save(content, tmp_path / "t.pth")
    assert words in refusal(tmp_path / "t.pth").message


# Files that would run code


class Trap:
    """Unpickled freely, it would touch a file."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self):
        return Path.touch, (self.sprung,)


class ShellTrap(Trap):
    def __reduce__(self):
        import os

        return os.system, (f"touch {self.sprung}",)


class EvalTrap(Trap):
    def __reduce__(self):
        return eval, (f"open({str(self.sprung)!r}, 'w')",)


def zipped(content: object, path: Path) -> None:
    torch.save(content, path)


def legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def plain(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def plain_now(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=5))


@pytest.mark.parametrize("save", [zipped, legacy, plain, plain_now])
@pytest.mark.parametrize(
    ("trap", "named"), [(Trap, "getattr|pathlib"), (ShellTrap, r"(posix|nt)\.system"), (EvalTrap, r"builtins\.eval")]
)
def test_read_a_trap_is_named_and_does_not_spring(tmp_path: Path, state: dict, save, trap: type[Trap], named: str):
    sprung, path = tmp_path / "sprung", tmp_path / "t.pth"
    save({"state_dict": state, "note": trap(sprung)}, path)
    with pytest.raises(TeacherMismatch, match=f"refused: it names .*({named})"):
        read_content(path)
    assert not sprung.exists()


def test_read_the_traps_would_spring(tmp_path: Path):
    """Else the tests above prove nothing."""
    for trap in (Trap, ShellTrap):
        sprung = tmp_path / trap.__name__
        pickle.loads(pickle.dumps(trap(sprung)))
        assert sprung.exists()


@pytest.mark.parametrize("save", [zipped, legacy])
def test_inspect_a_whole_network_is_refused_with_advice(tmp_path: Path, network: nn.Module, save):
    save(network, tmp_path / "t.pth")
    error = refusal(tmp_path / "t.pth")
    assert "whole pickled network (kdcore.models.convnet.ConvNet" in error.message
    assert "model.state_dict()" in error.hint


# Files that are something else


def archive(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, "x")
    return buffer.getvalue()


def old_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("sys_info"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html>sign in</html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"\x1f\x8b\x08rest", "gzip"),
        (b"\x89HDF\r\n\x1a\n", "Keras"),
        (b"\x93NUMPY\x01\x00", "numpy"),
        (b'{"weights": []}', "JSON"),
        (b"\x89PNG\r\n", "image"),
        (b"just some words", "no checkpoint"),
        (bytes(range(256)), "no checkpoint"),
        (archive("word/document.xml"), "zip archive"),
        (archive("m/data.pkl", "m/constants.pkl"), "TorchScript"),
        (archive("m/archive_format", "m/models/model.json"), "torch.export"),
        (archive("m/data.pkl")[:60], "cut short"),
        (old_tar(), "tar archive"),
        ((300).to_bytes(8, "little") + b'{"a":', "safetensors file is cut short"),
        (pickle.dumps({"fc.weight": [1.0]}), "no checkpoint"),
        (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xff" + bytes(4000), "an ONNX model"),
        (b"\x1c\x00\x00\x00TFL3" + bytes(400), "a TFLite model"),
        (b"MATLAB 5.0 MAT-file" + bytes(600), "a MATLAB file"),
        (b"Rar!\x1a\x07\x01\x00", "a RAR archive"),
        (b"PAR1" + bytes(300), "a Parquet table"),
        (archive("config.json", "model.weights.h5"), "a Keras model"),
        (archive("m/saved_model.pb"), "a TensorFlow SavedModel"),
    ],
    # Not the contents: an archive holds the time, and each process would name its tests otherwise.
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inspect_other_files_are_named(tmp_path: Path, content: bytes, words: str):
    (tmp_path / "t.pth").write_bytes(content)
    assert words in refusal(tmp_path / "t.pth").message


@pytest.mark.parametrize(("content", "words"), STARTS, ids=[str(number) for number in range(len(STARTS))])
def test_inspect_no_other_file_gets_pytorchs_advice(tmp_path: Path, content: bytes, words: str):
    """PyTorch's error tells how to lift the guard against pickles that run programs."""
    (tmp_path / "t.pth").write_bytes(content + bytes(2000))
    error = refusal(tmp_path / "t.pth")
    said = f"{error.message} {error.hint}"
    assert "weights_only" not in said and "torch.load" not in said and "state dict" in said


@pytest.mark.parametrize("noise", range(20))
def test_inspect_noise_gets_an_error_of_our_own(tmp_path: Path, noise: int):
    content = np.random.default_rng(noise).integers(0, 256, 3000, dtype=np.uint8).tobytes()
    (tmp_path / "t.pth").write_bytes((b"\x80\x02" if noise % 2 else b"") + content)
    error = refusal(tmp_path / "t.pth")
    assert "weights_only" not in f"{error.message} {error.hint}" and "no checkpoint" in error.message


@pytest.mark.parametrize("save", [zipped, legacy])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_inspect_a_file_cut_short_is_refused(tmp_path: Path, state: dict, save, share: float):
    path = tmp_path / "t.pth"
    save(state, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "cut short" in refusal(path).message


def test_inspect_safetensors_cut_short_are_refused(tmp_path: Path, state: dict):
    path = tmp_path / "t.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-10])
    assert "cut short" in refusal(path).message
