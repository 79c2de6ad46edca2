"""The kinds of files that are sent by mistake, found by their bytes and members: one table for data and models.

Nothing is decoded and nothing is run: only the first bytes of a file, and the names in an archive, are looked at.
"""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

HEAD_BYTES = 1024
"""The number of first bytes that `kind_of` looks at."""
_MANY_COLUMNS = 20


class FileKind(NamedTuple):
    """What a file is, in words, and how to make of it something that is read; "" if only the usual forms help."""

    words: str
    as_data: str = ""
    as_model: str = ""


_ARRAYS = "Load it and write the arrays: numpy.savez('data.npz', x_train=..., y_train=..., x_test=..., y_test=...)."
_UNPACK = "Unpack it and send the folder as .zip or .tar."
_EXPORT = (
    "bring its network as an ONNX model (.onnx; tf2onnx makes one of Keras, TensorFlow and TFLite), or as a .pt2 "
    "program of torch.export.save(...)"
)
_OTHER_LIBRARY = (
    f"{_EXPORT}; or copy its numbers into the same network in PyTorch, and save its state dict (timm and Hugging Face "
    "have converters for most)"
)
_TO_MODELS = "It is a model: register it as one (models add)."
_TO_DATA = "it is data: register it as a data set (datasets add)"

HDF5 = FileKind(
    "an HDF5 file, as Keras (.h5) and MATLAB 7.3 write them", _ARRAYS, f"of a Keras model: {_OTHER_LIBRARY}"
)
MATLAB = FileKind("a MATLAB file", _ARRAYS.replace("Load it", "Load it (scipy.io.loadmat)"), _TO_DATA)
_PROGRAM = "it holds its own network: give it as the program of a teacher, or register it without an architecture"
ONNX = FileKind("an ONNX model", _TO_MODELS, _PROGRAM)
TFLITE = FileKind("a TFLite model", _TO_MODELS, _EXPORT)
TENSORFLOW = FileKind("a TensorFlow SavedModel", _TO_MODELS, _OTHER_LIBRARY)
KERAS = FileKind("a Keras model (.keras)", _TO_MODELS, _OTHER_LIBRARY)
OPENVINO = FileKind("a network of OpenVINO (.xml)", _TO_MODELS, _EXPORT)
SHARDS = FileKind(
    "the index of a model that was saved in several files", _TO_MODELS,
    "save it in one: model.save_pretrained(folder, max_shard_size='100GB') of Hugging Face, and send that file",
)  # fmt: skip
COREML = FileKind("a Core ML model", _TO_MODELS, _EXPORT)
PADDLE = FileKind("weights of PaddlePaddle", _TO_MODELS, _OTHER_LIBRARY)
FLAX = FileKind("weights of JAX (Flax's msgpack)", _TO_MODELS, _OTHER_LIBRARY)
ORBAX = FileKind("a checkpoint of JAX (Orbax)", _TO_MODELS, _OTHER_LIBRARY)
TFRECORD = FileKind("a TFRecord file", "Read it with TensorFlow, and write class folders or arrays.", _TO_DATA)
WEBDATASET = FileKind(
    "a webdataset, with labels in .cls files", "Unpack it and put each picture in the folder of its class.", _TO_DATA
)
TORCH = FileKind("a PyTorch checkpoint", _TO_MODELS)
TORCHSCRIPT = FileKind(
    "a TorchScript program",
    _TO_MODELS,
    "save its weights alone: torch.save(torch.jit.load(path).state_dict(), ...); or export its "
    "network with torch.export.save(...), a .pt2 program",
)
TORCH_EXPORT = FileKind("a torch.export program", _TO_MODELS, _PROGRAM)
PARQUET = FileKind("a Parquet table", "", _TO_DATA)
IDX = FileKind("an idx file, as MNIST's are", "", _TO_DATA)
_TO_TENSORS = (
    "make tensors of them, under the names of the network: torch.save({name: torch.from_numpy(array), ...}, path)"
)
NPY = FileKind(
    "one numpy array (.npy)", "Put images and labels in one file: numpy.savez('data.npz', x_train=..., y_train=...).",
    _TO_TENSORS,
)  # fmt: skip
NPZ = FileKind("an archive of numpy arrays (.npz)", "", f"if these are weights, {_TO_TENSORS}")
CSV = FileKind(
    "a table of text (.csv)", "If it lists files and labels, pack it together with the pictures. If it holds pixels: "
    "numpy.savez('data.npz', x_train=..., y_train=...).", _TO_DATA,
)  # fmt: skip
PICKLE = FileKind("a pickle, which is a program and is never run", _ARRAYS)
RAR = FileKind("a RAR archive", _UNPACK, "unpack it first")
SEVEN_ZIP = FileKind("a 7z archive", _UNPACK, "unpack it first")
ZSTANDARD = FileKind("a Zstandard file (.zst)", _UNPACK, "unpack it first")
BZIP2 = FileKind("a bzip2 file", _UNPACK, "unpack it first")
XZ = FileKind("an xz file", _UNPACK, "unpack it first")
LZ4 = FileKind("an LZ4 file", _UNPACK, "unpack it first")
LMDB = FileKind("an LMDB database", "Write its pictures into class folders.", _TO_DATA)
IMAGE = FileKind("an image, not an archive of them", "Put the pictures in class folders, and pack those.")
OFFICE = FileKind("an office document")
NESTED = FileKind("an archive of archives", "Send the inner archive, or unpack it first.", "unpack it first")

_MAGIC: tuple[tuple[int, bytes, FileKind], ...] = (
    (0, b"PAR1", PARQUET),
    (0, b"Rar!\x1a\x07", RAR),
    (0, b"7z\xbc\xaf\x27\x1c", SEVEN_ZIP),
    (0, b"\x28\xb5\x2f\xfd", ZSTANDARD),
    (0, b"\xfd7zXZ\x00", XZ),
    (0, b"BZh", BZIP2),
    (0, b"\x04\x22\x4d\x18", LZ4),
    (0, b"\x93NUMPY", NPY),
    (0, b"\x89HDF\r\n\x1a\n", HDF5),
    (0, b"MATLAB 7.3 MAT-file", HDF5),
    (0, b"MATLAB ", MATLAB),
    (4, b"TFL3", TFLITE),
    (0, b"ARROW1", FileKind("an Arrow or Feather table", "Write it as Parquet with the columns image and label.")),
    (0, b"GGUF", FileKind("a GGUF file, of a language model")),
    (0, b"SQLite format 3\x00", FileKind("an SQLite database")),
    (16, b"\xde\xc0\xef\xbe", LMDB),
    (0, b"%PDF", FileKind("a PDF document")),
    (0, b"\x89PNG", IMAGE),
    (0, b"\xff\xd8\xff", IMAGE),
    (0, b"GIF8", IMAGE),
    (0, b"II*\x00", IMAGE),
    (0, b"MM\x00*", IMAGE),
    (8, b"WEBP", IMAGE),
    (4, b"ftyphei", IMAGE),
    (128, b"DICM", FileKind("a DICOM picture", "Write the pictures as PNG into class folders.")),
    (
        0,
        b"version https://git-lfs",
        FileKind("a Git LFS pointer; the file itself was not fetched", *["fetch it: git lfs pull"] * 2),
    ),
    (0, b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", TORCH),
)
_BY_NAME = {
    # In this order: a TorchScript program has a data.pkl, too.
    "constants.pkl": TORCHSCRIPT,
    "archive_format": TORCH_EXPORT,
    "data.pkl": TORCH,
    "saved_model.pb": TENSORFLOW,
    "coremldata.bin": COREML,
    "_CHECKPOINT_METADATA": ORBAX,
    "model.weights.h5": KERAS,
    "model.mlmodel": COREML,
    "[Content_Types].xml": OFFICE,
}
_BY_SUFFIX: dict[str, FileKind] = {
    **dict.fromkeys((".h5", ".hdf5"), HDF5),
    **dict.fromkeys((".tfrecord", ".tfrecords"), TFRECORD),
    **dict.fromkeys((".pkl", ".pickle"), PICKLE),
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".safetensors"), TORCH),
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".npz", ".bz2", ".xz", ".7z", ".rar"), NESTED),
    **dict.fromkeys((".mlmodel", ".mlpackage"), COREML),
    **dict.fromkeys((".pdparams", ".pdmodel"), PADDLE),
    **{
        ".keras": KERAS,
        ".msgpack": FLAX,
        ".npy": NPY,
        ".mat": MATLAB,
        ".onnx": ONNX,
        ".tflite": TFLITE,
        ".cls": WEBDATASET,
        ".zst": ZSTANDARD,
    },
    **{".dcm": FileKind("an archive of DICOM pictures", "Write the pictures as PNG into class folders."), ".csv": CSV},
}
_NEWEST_ONNX = 32
_ONNX_VERSION = 0x28
_ONNX_NOTES = (0x12, 0x1A, 0x22, _ONNX_VERSION, 0x32)
"""The first bytes of its notes: the producer's name and version, a domain, the model's version, a description."""
_ONNX_ENDS = (0x3A, 0x42)
"""Those of the graph, and of the sets of operators."""
_STARTS: tuple[tuple[re.Pattern[bytes], FileKind], ...] = (
    # Protocol buffers. SavedModel: the schema's version, then the first graph with its meta information. Core ML: a
    # version, then the description of its inputs, or its notes. ONNX has a name there, which starts with a letter.
    (re.compile(rb"\x08\x01\x12[\x80-\xff]{1,4}[\x00-\x7f]\x0a", re.DOTALL), TENSORFLOW),
    (re.compile(rb"\x08[\x01-\x0c]\x12[\x80-\xff]{0,3}[\x00-\x7f](\x0a|\xa2\x06)", re.DOTALL), COREML),
    # msgpack: a small map whose first key is one of Flax's.
    (re.compile(rb"[\x81-\x8f][\xa1-\xbf](params|step|opt_state|model|batch_stats|target|state)", re.DOTALL), FLAX),
    (re.compile(rb"\x80[\x02-\x05][\x95}\]c(KX\x8c\x8a]", re.DOTALL), PICKLE),
)


def kind_of(head: bytes) -> FileKind | None:
    """Return what a file is, from its first bytes; None for zip, gzip, tar and anything unknown."""
    for offset, magic, kind in _MAGIC:
        if head[offset:].startswith(magic):
            return kind
    if is_idx(head):
        return IDX
    for start, kind in _STARTS:
        if start.match(head):
            return kind
    if _is_onnx(head):
        return ONNX
    if _is_tfrecord(head):
        return TFRECORD
    return _kind_of_text(head)


def kind_of_members(names: Iterable[str]) -> FileKind | None:
    """Return what an archive is that holds no pictures, from the names in it; None if no name says so."""
    paths = [PurePosixPath(name) for name in names]
    files = {path.name for path in paths}
    telling = next((kind for name, kind in _BY_NAME.items() if name in files), None)
    suffixes = (path.suffix.lower() for path in paths)
    return telling or next((_BY_SUFFIX[suffix] for suffix in suffixes if suffix in _BY_SUFFIX), None)


def is_idx(head: bytes) -> bool:
    """Return True for the start of an idx file: two zeros, the type of its numbers, the number of dimensions."""
    return len(head) >= 8 and head[:2] == b"\0\0" and head[2] in (8, 9, 11, 12, 13, 14) and 1 <= head[3] <= 4


def _is_onnx(head: bytes) -> bool:
    """Return True for the first fields of ONNX's protocol buffer: ir_version, notes, then the graph or its operators.

    Each field has a byte for its number and type, then a number, or a length and as many bytes; a number is in groups
    of seven bits, the lowest first, of which all but the last have the highest bit set.
    """
    if head[:1] != b"\x08" or not 1 <= int.from_bytes(head[1:2]) <= _NEWEST_ONNX:
        return False
    at = 2
    while at < len(head):
        field = head[at]
        if field in _ONNX_ENDS:
            return True
        if field not in _ONNX_NOTES:
            return False
        number, at = _varint(head, at + 1)
        at += number if field != _ONNX_VERSION else 0
    # A note that is longer than the head; without any the bytes would say nothing.
    return at > len(head) > 2


def _varint(head: bytes, at: int) -> tuple[int, int]:
    """Return the number that starts at this place, and the place behind it."""
    number, shift = 0, 0
    while at < len(head):
        number |= (head[at] & 0x7F) << shift
        shift += 7
        at += 1
        if head[at - 1] < 0x80:
            break
    return number, at


def _kind_of_text(head: bytes) -> FileKind | None:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"<"):
        if b"<net " in start[:300]:
            return OPENVINO
        return FileKind(
            "an HTML or XML page, as a failed download leaves it", "Download it again.", "download it again"
        )
    if start[:1] in (b"{", b"["):
        return SHARDS if b'"weight_map"' in start else FileKind("JSON text")
    # The last character may be cut.
    text = head.decode("utf-8", "ignore")
    printable = text.translate({ord(blank): None for blank in "\r\n\t"}).isprintable()
    if len(text.encode()) < len(head) - 3 or not printable:
        return None
    lines = text.splitlines()[:3]
    # The names of 784 columns of pixels fill the head.
    is_cut = len(lines) == 1 and len(head) == HEAD_BYTES and len(re.findall(r"[,;\t]", text)) > _MANY_COLUMNS
    return CSV if is_cut or (len(lines) > 1 and all(re.search(r"[,;\t]", line) for line in lines[:2])) else None


def _is_tfrecord(head: bytes) -> bool:
    """Return True if the first twelve bytes are a record's length and its checksum, as TFRecord masks it."""
    if len(head) < 12:
        return False
    checksum = 0xFFFFFFFF
    for byte in head[:8]:
        checksum ^= byte
        for _ in range(8):
            checksum = checksum >> 1 ^ (0x82F63B78 if checksum & 1 else 0)
    checksum ^= 0xFFFFFFFF
    masked = ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return masked == int.from_bytes(head[8:12], "little")
