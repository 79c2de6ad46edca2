"""The files in which CIFAR-10, CIFAR-100 and the MNIST family are published, read as they are downloaded.

CIFAR: the archives `cifar-10-python.tar.gz`, `cifar-10-binary.tar.gz`, `cifar-100-python.tar.gz` and
`cifar-100-binary.tar.gz`, also packed anew as .zip or .tar. The python form is a pickle. It is read, opcode by opcode,
into plain data; nothing that it names is imported or called. CIFAR-100 is read with its 100 fine labels.

MNIST: idx files, plain or gzipped, as http://yann.lecun.com/exdb/mnist/ described them: images and labels of `train`
and of `t10k` (or `test`) together in one .zip or .tar. One file of images alone has no labels.

Rows are in the order of the names of the files, whatever their order in the archive.
"""

import gzip
import io
import pickletools
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from base.errors import DatasetUnreadable
from kdcore.catalog.datasets import DATASETS
from kdcore.catalog.facts import LeftOut
from kdcore.data.archive import LIMITS, Limits, entries
from kdcore.data.arrays import cut, numbered, resized
from kdcore.data.decoding import Piece, Pixels, Source, Split, carve, no_labels, require_all_classes
from kdcore.data.images import Labels
from kdcore.spec import DataOptions

_CHUNK_BYTES = 16 << 20
_MAX_OPCODES = 5_000_000
"""CIFAR's largest pickle has a tenth of it. Each opcode makes at most one small object."""
_CIFAR_PART = re.compile(r"(?P<ten>data_batch_\d|test_batch)(\.bin)?|(?P<hundred>train|test)(\.bin)?")
_TEN_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_CIFAR_NAMES = {
    "batches.meta": "label_names",
    "meta": "fine_label_names",
    "batches.meta.txt": None,
    "fine_label_names.txt": None,
}
"""The members with the names of the classes; for pickles, the key that they are under."""
_IDX_PART = re.compile(
    r"(?P<prefix>.*?)(?P<split>train|t10k|test)[-_.]?(?P<what>images|labels)[-_.]?idx[1-4][-_.]?ubyte(\.gz)?"
)
_RGB = (3, 32, 32)
_SENT_WHOLE = "Send the archive as it was downloaded; compare its size."


class _Part(NamedTuple):
    """One file with images, and the row of the split at which they begin."""

    split: Split
    first: int


_Chunks = Callable[[], Iterator[tuple[str, Pixels]]]
"""Pixels n × C × H × W with the name of their file, in the order of the rows within each file."""


def holds_cifar(names: Iterable[str]) -> bool:
    """Return True if one of these files is a part of CIFAR. `train` alone, without `meta`, may be anything."""
    files = {name.rpartition("/")[2] for name in names}
    parts = [part for name in files if (part := _CIFAR_PART.fullmatch(name)) is not None]
    return any(part["ten"] or part[0].endswith(".bin") or "meta" in files for part in parts)


def holds_idx(names: Iterable[str]) -> bool:
    """Return True if one of these files is named as idx files are."""
    return any(_IDX_PART.fullmatch(name.rpartition("/")[2]) for name in names)


def open_cifar(path: Path, options: DataOptions | None = None, limits: Limits = LIMITS) -> Source:
    """Read CIFAR's archive: labels and names of classes now, pixels in a second pass."""
    options = options or DataOptions()
    labels: dict[str, Labels] = {}
    class_names: tuple[str, ...] = ()
    for name, blob in _members(path, limits, options, lambda name: name in _CIFAR_NAMES or _CIFAR_PART.fullmatch(name)):
        if name in _CIFAR_NAMES:
            class_names = _cifar_names(name, blob)
        elif name in labels:
            raise DatasetUnreadable(f"The archive holds {name} twice.", _SENT_WHOLE)
        else:
            labels[name], _ = _cifar_part(name, blob)
    ten = {name for name in labels if not _is_hundred(name)}
    if ten and len(ten) < len(labels):
        raise DatasetUnreadable("The archive holds parts of CIFAR-10 and of CIFAR-100.", "Send one of them.")

    def chunks() -> Iterator[tuple[str, Pixels]]:
        for name, blob in _members(path, limits, options, labels.__contains__):
            yield name, _cifar_part(name, blob)[1]

    # The facts of CIFAR-100 have no names: without a file of them its classes are numbered.
    names = class_names or (tuple(DATASETS["cifar10"].class_names) if ten else tuple(map(str, range(100))))
    splits: dict[str, Split] = {name: "test" if name.startswith("test") else "train" for name in labels}
    source = _source("CIFAR", labels, splits, names, _RGB, options, chunks)
    return replace(source, left_out=_absent(labels)) if ten else source


def open_idx(path: Path, options: DataOptions | None = None, limits: Limits = LIMITS) -> Source:
    """Read the idx files in an archive: headers and labels now, pixels in a second pass."""
    options = options or DataOptions()
    shapes: dict[Split, tuple[int, ...]] = {}
    labels: dict[Split, Labels] = {}
    prefixes = set()
    for name, blob in _members(path, limits, options, lambda name: holds_idx([name])):
        part = _IDX_PART.fullmatch(name)
        assert part is not None, "only such members are read"
        split = _idx_split(part)
        prefixes.add(part["prefix"])
        if len(prefixes) > 1:
            both = " and ".join(repr(prefix) for prefix in sorted(prefixes))
            raise DatasetUnreadable(f"The archive holds several sets of idx files: {both}.", "Send one set an archive.")
        if split in (labels if part["what"] == "labels" else shapes):
            raise DatasetUnreadable(
                f"The archive holds the {part['what']} of {split} twice: {name}.", "Leave one of the copies out."
            )
        with _opened(name, io.BytesIO(blob)) as file:
            if part["what"] == "labels":
                labels[split] = _idx_labels(file, name, limits)
            else:
                shapes[split] = _idx_images(file, name, limits, len(blob))
    for wanted, found, other in (("images", shapes, labels), ("labels", labels, shapes)):
        if missing := sorted((other.keys() | {"train"}) - found.keys()):
            raise DatasetUnreadable(
                f"The archive lacks the {wanted} of {missing[0]}.",
                "Pack train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
                "t10k-labels-idx1-ubyte together, plain or as .gz.",
            )
    for split, shape in shapes.items():
        if len(labels[split]) != shape[0]:
            raise DatasetUnreadable(f"The {split} split has {len(labels[split])} labels for {shape[0]} images.")
        if shape[1:] != shapes["train"][1:]:
            raise DatasetUnreadable(f"The images of train are {shapes['train'][1:]}, those of test {shape[1:]}.")

    def chunks() -> Iterator[tuple[str, Pixels]]:
        for name, blob in _members(path, limits, options, lambda name: holds_idx([name])):
            part = _IDX_PART.fullmatch(name)
            if part is not None and part["what"] == "images":
                with _opened(name, io.BytesIO(blob)) as file:
                    yield from ((_idx_split(part), pixels) for pixels in _idx_chunks(file, name))

    names = numbered(labels["train"])
    of_parts: dict[str, Labels] = {split: of for split, of in labels.items()}
    return _source("idx", of_parts, {split: split for split in labels}, names, _chw(shapes["train"]), options, chunks)


def open_idx_file(path: Path, options: DataOptions | None = None, limits: Limits = LIMITS) -> Source:
    """Read one idx file of images, plain or gzipped. They have no labels."""
    options = options or DataOptions()
    name = "The idx file"
    with path.open("rb") as raw, _opened(name, raw) as file:
        shape = _idx_images(file, name, limits, path.stat().st_size)

    def pieces() -> Iterator[Piece]:
        start = 0
        with path.open("rb") as raw, _opened(name, raw) as file:
            for pixels in _idx_chunks(file, name):
                yield Piece("train", np.arange(start, start + len(pixels)), resized(pixels, options))
                start += len(pixels)

    channels, height, width = _chw(shape)
    return Source(
        kind="arrays",
        class_names=(),
        channels=channels,
        height=options.image_size or height,
        width=options.image_size or width,
        labels=no_labels(shape[0]),
        test_carved=False,
        pieces=pieces,
        layout="idx",
        **cut((height, width), shape[0], options),
    )


def _members(
    path: Path, limits: Limits, options: DataOptions, wanted: Callable[[str], object]
) -> Iterator[tuple[str, bytes]]:
    """Yield the last part of the path, and the content, of each wanted file: one in memory at a time."""
    for entry in entries(path, limits, options.encoding):
        if not entry.is_folder and wanted(entry.path.name):
            yield entry.path.name, entry.read()


def _source(
    layout: str,
    labels: Mapping[str, Labels],
    splits: Mapping[str, Split],
    class_names: tuple[str, ...],
    chw: tuple[int, int, int],
    options: DataOptions,
    chunks: _Chunks,
) -> Source:
    """Put the parts' rows one after the other, by name. Without test images, some are set aside."""
    parts: dict[str, _Part] = {}
    whole: dict[Split, list[Labels]] = {}
    for name in sorted(labels):
        rows = whole.setdefault(splits[name], [])
        parts[name] = _Part(splits[name], sum(map(len, rows)))
        rows.append(labels[name])
        if wrong := np.flatnonzero(labels[name] >= len(class_names)).tolist():
            raise DatasetUnreadable(
                f"{name}: the label of image {wrong[0]} is {labels[name][wrong[0]]}; there are {len(class_names)} "
                "classes, from 0."
            )
    if "train" not in whole:
        raise DatasetUnreadable("The archive holds no training images.", _SENT_WHOLE)
    joined: dict[Split, Labels] = {split: np.concatenate(of) for split, of in whole.items()}
    require_all_classes(joined["train"], class_names)
    aside = {split: np.zeros(len(of), dtype=np.bool_) for split, of in joined.items()}
    if "test" not in joined:
        aside["train"] = carve(joined["train"])
        joined = {"train": joined["train"][~aside["train"]], "test": joined["train"][aside["train"]]}

    def pieces() -> Iterator[Piece]:
        done = dict.fromkeys(parts, 0)
        places = {split: np.where(out, np.cumsum(out), np.cumsum(~out)) - 1 for split, out in aside.items()}
        for name, pixels in chunks():
            split, first = parts[name]
            here = slice(first + done[name], first + done[name] + len(pixels))
            done[name] += len(pixels)
            fitted, rows, out = resized(pixels, options), places[split][here], aside[split][here]
            yield Piece(split, rows[~out], fitted[~out])
            if out.any():
                yield Piece("test", rows[out], fitted[out])

    channels, height, width = chw
    return Source(
        kind="arrays",
        class_names=class_names,
        channels=channels,
        height=options.image_size or height,
        width=options.image_size or width,
        labels=joined,
        test_carved=bool(aside["train"].any()),
        pieces=pieces,
        layout=layout,
        splits={name: len(labels[name]) for name in sorted(labels)},
        **cut((height, width), sum(map(len, labels.values())), options),
    )


# CIFAR


def _is_hundred(name: str) -> bool:
    part = _CIFAR_PART.fullmatch(name)
    return part is not None and part["hundred"] is not None


def _absent(present: Iterable[str]) -> list[LeftOut]:
    """Return the training parts of CIFAR-10 that the archive does not have. A test part is set aside if there is none,
    which is a warning of its own."""
    whole = {name.removesuffix(".bin") for name in present}
    why = "the archive does not hold this part of the training images; send it as it was downloaded"
    return [LeftOut(what=name, count=0, why=why) for name in _TEN_TRAIN if name not in whole]


def _cifar_part(name: str, blob: bytes) -> tuple[Labels, Pixels]:
    """Return labels and pixels (n × 3 × 32 × 32) of one file."""
    size = int(np.prod(_RGB))
    if name.endswith(".bin"):
        # CIFAR-100 has the coarse label before the fine one.
        noted = 2 if _is_hundred(name) else 1
        if not blob or len(blob) % (noted + size):
            raise DatasetUnreadable(
                f"{name} has {len(blob):,} bytes, which are no whole number of records of {noted + size}.", _SENT_WHOLE
            )
        table = np.frombuffer(blob, dtype=np.uint8).reshape(-1, noted + size)
        return table[:, noted - 1].astype(np.int64), table[:, noted:].reshape(-1, *_RGB)
    content = _pickled(name, blob)
    key = "fine_labels" if _is_hundred(name) else "labels"
    labels, pixels = content.get(key), content.get("data")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise DatasetUnreadable(f"{name} has no list {key!r} of labels from 0 to 255.", _SENT_WHOLE)
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape != (len(labels), size):
        shape = f"of shape {pixels.shape}" if isinstance(pixels, np.ndarray) else "no array of bytes"
        raise DatasetUnreadable(f"{name}: 'data' is {shape}; it is {len(labels)} x {size} uint8.", _SENT_WHOLE)
    return np.array(labels, dtype=np.int64), pixels.reshape(-1, *_RGB)


def _cifar_names(name: str, blob: bytes) -> tuple[str, ...]:
    key = _CIFAR_NAMES[name]
    if key is None:
        return tuple(line.strip() for line in blob.decode("utf-8", "replace").splitlines() if line.strip())
    names = _pickled(name, blob).get(key)
    if not isinstance(names, list) or not all(isinstance(one, str | bytes) for one in names):
        raise DatasetUnreadable(f"{name} has no list {key!r} of text.", _SENT_WHOLE)
    return tuple(one.decode("utf-8", "replace") if isinstance(one, bytes) else one for one in names)


# Pickles, read as data


@dataclass
class _Named:
    """A name that the pickle would import; for a call, its arguments, and the state that it would set."""

    name: str
    arguments: tuple[Any, ...] | None = None
    state: Any = field(default=None, repr=False)


def _pickled(name: str, blob: bytes) -> dict[str, Any]:
    """Return the dictionary in a pickle of plain data and numpy's bytes, its keys as text."""
    try:
        with warnings.catch_warnings():
            # A damaged text may look badly escaped.
            warnings.simplefilter("ignore", DeprecationWarning)
            content = _plain(_run(blob))
    except (ValueError, IndexError, KeyError, TypeError, RecursionError, AttributeError, OverflowError) as error:
        raise DatasetUnreadable(
            f"{name} is no pickle of plain data: {error or type(error).__name__}.", _SENT_WHOLE
        ) from error
    if not isinstance(content, dict):
        raise DatasetUnreadable(f"{name} holds a {type(content).__name__}, not a dictionary.", _SENT_WHOLE)
    return {key.decode("latin-1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def _run(blob: bytes) -> Any:  # noqa: PLR0912, PLR0915 - one case for each opcode
    """Follow a pickle's opcodes on a stack of data. Imports and calls are only noted. Raises ValueError."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def marked() -> list[Any]:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(blob)):
        if count > _MAX_OPCODES:
            raise ValueError(f"it has more than {_MAX_OPCODES:,} opcodes")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT":
                stack.append(argument)
            case "STRING" | "BINSTRING" | "SHORT_BINSTRING":
                # Python 2 had bytes where Python 3 has text.
                stack.append(argument.encode("latin-1"))
            case (
                "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8"
                | "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8"
            ):  # fmt: skip
                stack.append(argument)
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "LIST":
                stack.append(marked())
            case "TUPLE":
                stack.append(tuple(marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = tuple(stack[-int(opcode.name[-1]) :])
                del stack[-len(items) :]
                stack.append(items)
            case "DICT":
                items_of = marked()
                stack.append(dict(zip(items_of[::2], items_of[1::2], strict=True)))
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                values = marked()
                stack[-1].extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                pairs = marked()
                stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "POP":
                stack.pop()
            case "GLOBAL":
                stack.append(_Named(str(argument).replace(" ", ".")))
            case "STACK_GLOBAL":
                last, module = stack.pop(), stack.pop()
                stack.append(_Named(f"{module}.{last}"))
            case "REDUCE":
                arguments, named = stack.pop(), stack.pop()
                match named.name, arguments:
                    # Bytes, as Python 3 writes them for Python 2.
                    case "_codecs.encode", (str() as text, "latin1" | "latin-1"):
                        stack.append(text.encode("latin-1"))
                    case _:
                        stack.append(_Named(named.name, arguments))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case _:
                raise ValueError(f"it has the opcode {opcode.name}, which plain data does not need")
    raise ValueError("it has no end")


def _plain(value: Any) -> Any:
    """Return a dictionary with numpy's arrays of bytes as arrays. Any other name that was noted is refused."""
    if isinstance(value, dict):
        return {key: _plain(item) if isinstance(item, _Named) else item for key, item in value.items()}
    if not isinstance(value, _Named):
        return value
    match value:
        case _Named(
            "numpy.core.multiarray._reconstruct" | "numpy._core.multiarray._reconstruct",
            state=(_, tuple() as shape, dtype, fortran_order, content),
        ):
            return _array(dtype, shape, "F" if fortran_order else "C", content)
        case _Named(
            "numpy.core.numeric._frombuffer" | "numpy._core.numeric._frombuffer",
            (content, dtype, tuple() as shape, "C" | "F" as order),
        ):
            return _array(dtype, shape, order, content)
    raise ValueError(f"it names {value.name}, which is never imported")


def _array(dtype: Any, shape: tuple[Any, ...], order: str, content: Any) -> Pixels:
    """Return an array of bytes, whose content is in the pickle."""
    match dtype:
        case _Named("numpy.dtype", ("u1" | b"u1" | "|u1" | b"|u1", *_)):
            pass
        case _:
            raise ValueError("it holds an array of another type than uint8")
    if not isinstance(content, bytes | bytearray) or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError("it holds a damaged array")
    pixels = np.frombuffer(content, dtype=np.uint8)
    return pixels.reshape(shape) if order == "C" else pixels.reshape(shape[::-1]).transpose()


# idx


class _opened:
    """The content of an idx file, unpacked if it is gzipped. Errors of reading become DatasetUnreadable."""

    def __init__(self, name: str, raw: IO[bytes]) -> None:
        self._name = name
        start = raw.read(2)
        raw.seek(0)
        self._file: IO[bytes] = gzip.GzipFile(fileobj=raw) if start == b"\x1f\x8b" else raw  # type: ignore[assignment]

    def __enter__(self) -> IO[bytes]:
        return self._file

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, EOFError | OSError | zlib.error):
            raise DatasetUnreadable(f"{self._name} cannot be unpacked: {error}.", "Download it again.") from error


def _idx_split(part: re.Match[str]) -> Split:
    return "train" if part["split"] == "train" else "test"


def _idx_shape(file: IO[bytes], name: str) -> tuple[int, ...]:
    start = file.read(4)
    if len(start) < 4 or start[:2] != b"\0\0":
        raise DatasetUnreadable(f"{name} is no idx file: it begins with {start.hex(' ')}.")
    if start[2] != 8:
        raise DatasetUnreadable(f"{name} holds numbers of type 0x{start[2]:02x}; bytes (0x08) are read.")
    sides = file.read(4 * start[3])
    if len(sides) < 4 * start[3]:
        raise DatasetUnreadable(f"{name} is cut short in its header.")
    return tuple(np.frombuffer(sides, dtype=">u4").tolist())


def _idx_images(file: IO[bytes], name: str, limits: Limits, packed: int) -> tuple[int, ...]:
    """Return the shape N × H × W or N × H × W × C, within the limits that archives have."""
    shape = _idx_shape(file, name)
    if len(shape) == 1:
        raise DatasetUnreadable(f"{name} holds labels; images are missing.", "Pack it together with its images.")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)) or 0 in shape:
        raise DatasetUnreadable(f"{name} has shape {shape}.", "Images are N x H x W or N x H x W x C with C 1 or 3.")
    size = int(np.prod(shape, dtype=object))
    if size > limits.total_bytes or size > max(limits.ratio_from_bytes, limits.ratio * packed):
        raise DatasetUnreadable(f"{name} unpacks to {size:,} bytes from {packed:,}: it looks like a bomb.")
    return shape


def _idx_labels(file: IO[bytes], name: str, limits: Limits) -> Labels:
    shape = _idx_shape(file, name)
    if len(shape) != 1 or shape[0] == 0 or shape[0] > limits.member_bytes:
        raise DatasetUnreadable(f"{name} has shape {shape}; labels are one number an image.")
    content = file.read(shape[0])
    if len(content) < shape[0]:
        raise DatasetUnreadable(f"{name} is cut short: it has {len(content)} of {shape[0]} labels.")
    return np.frombuffer(content, dtype=np.uint8).astype(np.int64)


def _idx_chunks(file: IO[bytes], name: str) -> Iterator[Pixels]:
    """Yield the images as n × C × H × W, a few megabytes at a time."""
    count, *row = shape = _idx_shape(file, name)
    row_bytes = int(np.prod(row))
    step = max(1, _CHUNK_BYTES // row_bytes)
    for start in range(0, count, step):
        wanted = min(step, count - start) * row_bytes
        content = file.read(wanted)
        if len(content) < wanted:
            raise DatasetUnreadable(f"{name} is cut short: its shape is {shape}, but its images end earlier.")
        pixels = np.frombuffer(content, dtype=np.uint8).reshape(-1, *row)
        yield pixels[:, None] if len(row) == 2 else pixels.transpose(0, 3, 1, 2)


def _chw(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return (shape[3] if len(shape) == 4 else 1), shape[1], shape[2]
