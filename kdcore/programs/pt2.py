"""Reader of `.pt2` files, as `torch.export.save` writes them. Nothing in the file is run.

`torch.export.load` is for trusted files. It unpickles freely: weights and constants marked as pickles, custom objects,
and example inputs that the restricted reader refuses. It evaluates text: the sizes (by sympy) and the guards. It calls
any operator, also those that open files, and loads shared libraries. So it is not used here: a program is JSON and raw
bytes, and only those are read. Pickles are never opened, and a program that needs one is refused.

The layout is that of PyTorch 2.11 to 2.13:

    models/model.json                             the graph
    data/weights/model_weights_config.json        the bytes of each parameter or buffer; weight_0, weight_1, …
    data/constants/model_constants_config.json    the same for constants; tensor_0, …
    data/sample_inputs/model.pt                   a pickle of the example inputs: never opened
"""

import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.errors import TeacherMismatch
from base.zip_files import MembersOverlap, members

MODEL = "models/model.json"
JSON_BYTES = 256 << 20
MOST_MEMBERS = 100_000
"""Files in a program's archive: one for each tensor and a few more."""
SCHEMA = 8
"""The major version of the graph's JSON, in PyTorch 2.11 and in 2.13."""
EXPORT_AGAIN = "export it again with PyTorch 2.11 or newer"
SAVE_PROGRAM = "save it with torch.export.save(torch.export.export(model.eval(), ...), 'teacher.pt2')"

DTYPES = {
    **{1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16},
    **{7: torch.float32, 8: torch.float64, 10: torch.complex64, 11: torch.complex128, 12: torch.bool},
    13: torch.bfloat16,
}
MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
STRIDED, KEYWORD = 7, 2
"""The JSON's numbers for types, memory formats, the plain layout, and an argument given by its name."""

_READING_FAILED = (
    *(zipfile.BadZipFile, EOFError, OSError, RecursionError, NotImplementedError),
    *(KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError),
)


@dataclass(frozen=True)
class Contents:
    """The graph with its signature, and the tensors that it names."""

    model: dict[str, Any]
    weights: dict[str, Tensor]
    constants: dict[str, Tensor]


def read(path: Path) -> Contents:
    """Read the file. Raises TeacherMismatch for anything but a program of JSON and raw bytes."""
    with reading(), _opened(path) as archive:
        members = _members(archive, path)
        model = json.loads(_read(archive, members, MODEL))
        if model["schema_version"]["major"] != SCHEMA:
            raise TeacherMismatch(
                f"the program is of schema {model['schema_version']['major']}, not {SCHEMA}", hint=SAVE_PROGRAM
            )
        weights = _tensors(archive, members, "data/weights/", "model_weights_config.json")
        constants = _tensors(archive, members, "data/constants/", "model_constants_config.json")
        return Contents(model, weights, constants)


@contextmanager
def reading() -> Iterator[None]:
    """Turn every error of reading a damaged or forged file into TeacherMismatch."""
    try:
        yield
    except _READING_FAILED as error:
        raise TeacherMismatch(
            f"the program is damaged: {type(error).__name__}: {str(error) or 'no details'}", hint=SAVE_PROGRAM
        ) from error


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        with path.open("rb") as file:
            # Before Python's reader, which makes an object for each of them.
            count = sum(1 for _ in islice(members(file.fileno()), MOST_MEMBERS + 1))
        if count > MOST_MEMBERS:
            raise TeacherMismatch(f"the program's archive has more than {MOST_MEMBERS:,} files", hint=SAVE_PROGRAM)
        return zipfile.ZipFile(path)
    except MembersOverlap as error:
        raise TeacherMismatch("the program's archive claims more bytes than it has") from error
    except zipfile.BadZipFile as error:
        raise TeacherMismatch(
            "the file is no torch.export program and no ONNX model, or it is cut short", hint=SAVE_PROGRAM
        ) from error


def _members(archive: zipfile.ZipFile, path: Path) -> Mapping[str, zipfile.ZipInfo]:
    """Return members by their names below the archive's top folder.

    PyTorch compresses nothing, so a compressed member is refused; without compression there can be no zip bomb.
    """
    infos = archive.infolist()
    # A program that is cut short may end in its example inputs, a pickle that is a zip archive too.
    if not infos or min(info.header_offset for info in infos) != 0:
        raise TeacherMismatch("the file is no torch.export program, or it is cut short", hint=SAVE_PROGRAM)
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise TeacherMismatch("the program's archive was packed again", hint="send the file as PyTorch wrote it")
    if sum(info.file_size for info in infos) > path.stat().st_size:
        raise TeacherMismatch("the program's archive claims more bytes than it has")
    members = {info.filename.partition("/")[2]: info for info in infos}
    if "archive_format" not in members or archive.read(members["archive_format"]) != b"pt2":
        raise _another_archive({info.filename for info in infos} | members.keys())
    if MODEL not in members:
        raise TeacherMismatch(
            "the archive holds no program named 'model'; compiled code (AOTInductor) is never run", hint=SAVE_PROGRAM
        )
    if archive.read(members["byteorder"]) != b"little":
        raise TeacherMismatch("the program was saved on a big-endian machine", hint="save it on another")
    return members


def _another_archive(names: set[str]) -> TeacherMismatch:
    if "serialized_exported_program.json" in names:
        return TeacherMismatch("the program was saved by PyTorch 2.7 or older", hint=EXPORT_AGAIN)
    if "constants.pkl" in names:
        return TeacherMismatch("the file is a TorchScript program", hint=SAVE_PROGRAM)
    if "data.pkl" in names:
        return TeacherMismatch(
            "the file is a checkpoint, not a program", hint="name it as teacher.checkpoint, with its architecture"
        )
    return TeacherMismatch("the file is a zip archive, but no torch.export program", hint=SAVE_PROGRAM)


def _read(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], name: str) -> bytes:
    if members[name].file_size > JSON_BYTES:
        raise TeacherMismatch(f"{name} has {members[name].file_size:,} bytes; the most is {JSON_BYTES:,}")
    return archive.read(members[name])


def _tensors(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], folder: str, config: str
) -> dict[str, Tensor]:
    """Return tensors by name. Tensors that share bytes in the file, such as tied weights, share them in memory."""
    if folder + config not in members:
        raise TeacherMismatch("the program keeps its weights as older versions of PyTorch did", hint=EXPORT_AGAIN)
    stores: dict[str, Tensor] = {}
    views: dict[str, Tensor] = {}
    tensors = {}
    for name, payload in json.loads(_read(archive, members, folder + config))["config"].items():
        meta, file = payload["tensor_meta"], folder + payload["path_name"]
        if payload["use_pickle"] or meta is None or meta["layout"] != STRIDED:
            raise TeacherMismatch(
                f"the program keeps {name!r} as a pickle, which is never opened",
                hint="export a network of plain tensors, without tensor subclasses or objects of its own",
            )
        if file not in stores:
            stores[file] = _bytes(archive.read(members[file]))
        # Cached by the whole entry, so that tied weights are one tensor.
        tensors[name] = views.setdefault(json.dumps(payload), _strided(name, stores[file], meta))
    return tensors


def _bytes(blob: bytes) -> Tensor:
    # torch.frombuffer refuses an empty buffer, and needs a writable one.
    return torch.frombuffer(bytearray(blob), dtype=torch.uint8) if blob else torch.empty(0, dtype=torch.uint8)


def _strided(name: str, store: Tensor, meta: Mapping[str, Any]) -> Tensor:
    store = store.view(DTYPES[meta["dtype"]])
    sizes, strides = ([size["as_int"] for size in meta[which]] for which in ("sizes", "strides"))
    if math.prod(sizes) > store.numel():
        raise TeacherMismatch(f"the program's {name!r} is larger than what is stored of it")
    return store.as_strided(sizes, strides, meta["storage_offset"]["as_int"])
