"""Files that would run code, files that are something else, and damaged ones."""

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from base.errors import TeacherMismatch
from kdcore import programs
from kdcore.programs import pt2
from tests.kdcore.programs.making import CONSTANTS, MODEL, WEIGHTS, exported, nodes, rewritten

Change = Callable[[Any], object]


def refusal(path: Path) -> TeacherMismatch:
    with pytest.raises(TeacherMismatch) as caught:
        programs.inspect(path)
    return caught.value


def test_read_what_is_in_a_program(program: Path, network: nn.Module):
    contents = pt2.read(program)
    assert contents.weights.keys() == network.state_dict().keys() and not contents.constants
    assert all(torch.equal(contents.weights[name], value) for name, value in network.state_dict().items())


# Files that would run code: one for each way that torch.export.load has of running it


class Trap:
    """Unpickled freely, it would touch a file."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self):
        return os.system, (f"touch {self.sprung}",)


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def as_pickle(name: str, path_name: str) -> Change:
    """A payload that says of itself that it is a pickle."""

    def change(config: Any) -> None:
        some = next(iter(config["config"].values()), {"is_param": False, "tensor_meta": None})
        config["config"][name] = {**some, "path_name": path_name, "use_pickle": True}

    return change


def weights_trap(sprung: Path) -> dict[str, Any]:
    return {WEIGHTS: as_pickle("fc.bias", "trap"), "data/weights/trap": saved(Trap(sprung))}


def old_weights_trap(sprung: Path) -> dict[str, Any]:
    """PyTorch once kept a whole state dict in one pickle; it is still read, with the careless reader at second try."""
    return {"data/weights/model.pt": saved({"fc.bias": Trap(sprung)})}


def constants_trap(sprung: Path) -> dict[str, Any]:
    return {CONSTANTS: as_pickle("c", "tensor_9"), "data/constants/tensor_9": saved(Trap(sprung))}


def opaque_object_trap(sprung: Path) -> dict[str, Any]:
    return {CONSTANTS: as_pickle("c", "opaque_obj_0"), "data/constants/opaque_obj_0": pickle.dumps(Trap(sprung))}


def example_inputs_trap(sprung: Path) -> dict[str, Any]:
    return {"data/sample_inputs/model.pt": saved(((Trap(sprung),), {}))}


def size_trap(sprung: Path) -> dict[str, Any]:
    """Sizes are text that sympy evaluates."""
    text = f"__import__('os').system('touch {sprung}')"

    def change(model: Any) -> None:
        for meta in model["graph_module"]["graph"]["tensor_values"].values():
            for size in meta["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = text

    return {MODEL: change}


def guard_trap(sprung: Path) -> dict[str, Any]:
    """Guards on the inputs are Python code, which would be compiled when the program becomes a module."""
    text = f"__import__('os').system('touch {sprung}') == 0"
    return {MODEL: lambda model: model.update(guards_code=[text])}


def operator_trap(sprung: Path) -> dict[str, Any]:
    """Among the operators is one that maps a file into memory, and makes it where it is not."""
    given = {"filename": {"as_string": str(sprung)}, "shared": {"as_bool": True}, "size": {"as_int": 10}}
    call = {
        "target": "torch.ops.aten.from_file.default",
        "inputs": [{"name": name, "arg": argument, "kind": 1} for name, argument in given.items()],
        "outputs": [{"as_tensor": {"name": "trap"}}],
        "metadata": {},
    }

    def change(model: Any) -> None:
        nodes(model).insert(0, call)
        values = model["graph_module"]["graph"]["tensor_values"]
        values["trap"] = values["p_fc_bias"]

    return {MODEL: change}


TRAPS = [
    weights_trap, old_weights_trap, constants_trap, opaque_object_trap, example_inputs_trap, size_trap, guard_trap,
    operator_trap,
]  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_read_no_trap_springs(program: Path, tmp_path: Path, trap: Callable[[Path], dict[str, Any]]):
    path = rewritten(program, tmp_path / "t.pt2", trap(tmp_path / "sprung"))
    with suppress(TeacherMismatch):
        programs.open_program(path)(torch.zeros(2, 1, 8, 8))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trap", TRAPS)
def test_read_the_traps_would_spring(program: Path, tmp_path: Path, trap: Callable[[Path], dict[str, Any]]):
    """Else the test above proves nothing."""
    if trap is opaque_object_trap and not hasattr(torch._C._export.pt2_archive_constants, "OPAQUE_OBJ_FILENAME_PREFIX"):
        pytest.skip("this PyTorch knows no such objects yet")
    path = rewritten(program, tmp_path / "t.pt2", trap(tmp_path / "sprung"))
    try:
        torch.export.load(path).module()(torch.zeros(2, 1, 8, 8))
    except Exception as error:
        print(error)
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "change",
    [
        {WEIGHTS: as_pickle("fc.bias", "weight_0")},
        {CONSTANTS: as_pickle("c", "custom_obj_0"), "data/constants/custom_obj_0": b"?"},
        {CONSTANTS: as_pickle("c", "opaque_obj_0"), "data/constants/opaque_obj_0": b"?"},
    ],
    ids=["weights", "script object", "opaque object"],
)
def test_read_what_is_pickled_is_refused_by_name(program: Path, tmp_path: Path, change: dict[str, Any]):
    error = refusal(rewritten(program, tmp_path / "t.pt2", change))
    assert "as a pickle, which is never opened" in error.message and "plain tensors" in str(error.hint)


def test_read_what_is_beside_the_program_is_left_alone(program: Path, tmp_path: Path):
    more = {"data/aotinductor/model/code.so": b"\x7fELF", "data/sample_inputs/model.pt": None, "extra/notes.txt": b"?"}
    assert programs.inspect(rewritten(program, tmp_path / "t.pt2", more)).num_classes == 10


# Files that are something else


def archive_of(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, "x")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no torch.export program"),
        (b"<!DOCTYPE html>", "no torch.export program"),
        (pickle.dumps({"fc.weight": [1.0]}), "no torch.export program"),
        (archive_of("word/document.xml"), "a zip archive, but no"),
        (archive_of("m/data.pkl", "m/constants.pkl"), "TorchScript"),
        (archive_of("m/data.pkl", "m/version"), "a checkpoint, not a program"),
        (archive_of("version", "serialized_exported_program.json"), "PyTorch 2.7 or older"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_read_other_files_are_named(tmp_path: Path, content: bytes, words: str):
    (tmp_path / "t.pt2").write_bytes(content)
    assert words in refusal(tmp_path / "t.pt2").message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({MODEL: None}, "no program named 'model'"),
        ({WEIGHTS: None}, "as older versions of PyTorch did"),
        ({"archive_format": b"pt3"}, "a zip archive, but no"),
        ({"byteorder": b"big"}, "big-endian"),
        ({MODEL: lambda model: model["schema_version"].update(major=9)}, "of schema 9, not 8"),
        ({MODEL: b"{"}, "damaged: JSONDecodeError"),
        ({MODEL: b"[" * 100_000}, "damaged: RecursionError"),
        ({MODEL: b"[]"}, "damaged: TypeError"),
        ({"data/weights/weight_0": b"abc"}, "damaged: RuntimeError"),
        ({"data/weights/weight_0": b"abcd"}, "larger than what is stored of it"),
        ({"data/weights/weight_0": None}, "damaged: KeyError"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_read_what_is_wrong_inside_is_named(program: Path, tmp_path: Path, changes: dict[str, Any], words: str):
    assert words in refusal(rewritten(program, tmp_path / "t.pt2", changes)).message


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_read_a_file_cut_short_is_refused(program: Path, tmp_path: Path, share: float):
    whole = program.read_bytes()
    (tmp_path / "t.pt2").write_bytes(whole[: int(len(whole) * share)])
    assert "cut short" in refusal(tmp_path / "t.pt2").message


def test_read_a_flipped_bit_is_found(program: Path, tmp_path: Path):
    blob = bytearray(program.read_bytes())
    blob[blob.index(b'"schema_version"') + 3] ^= 1
    (tmp_path / "t.pt2").write_bytes(blob)
    assert "damaged: BadZipFile" in refusal(tmp_path / "t.pt2").message


def test_read_every_part_of_the_graph_may_be_missing(program: Path, tmp_path: Path):
    """One after the other: a refusal each time, or the part was not needed, but nothing else."""
    with zipfile.ZipFile(program) as file:
        model = json.loads(file.read(next(name for name in file.namelist() if name.endswith(MODEL))))

    def places(content: Any, path: tuple[Any, ...] = ()) -> Any:
        for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
            if key not in ("metadata", "module_call_graph"):
                yield (*path, key)
                yield from places(content[key], (*path, key))

    def without(content: Any, path: tuple[Any, ...]) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    refused = 0
    for path in list(places(model))[::29]:
        try:
            programs.open_program(
                rewritten(program, tmp_path / "t.pt2", {MODEL: lambda content, path=path: without(content, path)})
            )
        except TeacherMismatch:
            refused += 1
    assert refused > 5


# Bombs


def test_read_a_packed_archive_is_refused(program: Path, tmp_path: Path):
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(tmp_path / "t.pt2", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("teacher/data/weights/weight_99", bytes(1 << 24))
    assert "packed again" in refusal(tmp_path / "t.pt2").message


def test_read_members_that_share_bytes_are_refused(program: Path, tmp_path: Path):
    path = Path(shutil.copy(program, tmp_path / "t.pt2"))
    with zipfile.ZipFile(path, "a") as file:
        largest = max(file.infolist(), key=lambda info: info.file_size)
        file.filelist += [largest] * 9
        file._didModify = True  # type: ignore[attr-defined]
    assert "claims more bytes than it has" in refusal(path).message


def test_a_graph_of_absurd_length_is_not_read(program: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pt2, "JSON_BYTES", 100)
    assert "the most is 100" in refusal(program).message


def test_read_a_shape_is_not_believed(program: Path, tmp_path: Path):
    """A terabyte made of one stored number, by strides of 0."""

    def change(config: Any) -> None:
        meta = config["config"]["fc.bias"]["tensor_meta"]
        meta["sizes"], meta["strides"] = [{"as_int": 1 << 38}], [{"as_int": 0}]

    assert "'fc.bias' is larger" in refusal(rewritten(program, tmp_path / "t.pt2", {WEIGHTS: change})).message


# Tensors


class Odd(nn.Module):
    """Tied weights, a buffer that is a view with gaps, one that is kept out of the state dict, and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.other.weight = self.one.weight
        self.register_buffer("gaps", torch.arange(12.0)[::2])
        self.register_buffer("unsaved", torch.full((6,), 0.5), persistent=False)
        self.register_buffer("empty", torch.empty(0, 6))
        self.constant = torch.tensor([1, 2, 3, 4, 5, 6])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([images.mean((2, 3)), self.empty])
        return self.other(self.one(rows)) + self.gaps + self.unsaved + self.constant


def test_read_tensors_of_every_kind(tmp_path: Path):
    torch.manual_seed(0)
    network, images = Odd().eval(), torch.randn(5, 6, 4, 4)
    program = programs.open_program(exported(network, tmp_path / "odd.pt2", images))
    assert torch.equal(program(images), network(images))
    assert program.facts.parameters == sum(parameter.numel() for parameter in program.parameters()) == 36
