"""The content of a checkpoint's file, read without running its code: tensors, plain values, inert stand-ins.

A pickle is a program. `torch.load(weights_only=True)` runs only the few calls that rebuild tensors and refuses every
other name. Two things are added here: harmless notes beside the weights (a numpy number, a trainer's options) become
stand-ins that keep nothing and run nothing, and a refusal names the kind of the file, or the names that it would have
called.
"""

import mmap
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, Never

import torch
from safetensors import SafetensorError, safe_open

from base.errors import TeacherMismatch
from base.file_kinds import HEAD_BYTES, NPY, NPZ, PADDLE, PICKLE, TORCH, FileKind, kind_of, kind_of_members
from base.zip_files import members

COPY_AGAIN = "compare its size, copy it again"
ADVICE = "give a PyTorch state dict (torch.save(model.state_dict(), path)) or a safetensors file"

MOST_MEMBERS = 100_000
"""Files in a checkpoint's archive: one for each tensor and a few more."""
MOST_RATIO = 100
NOTES = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|copyreg\._reconstructor|uuid\.UUID|decimal\.Decimal|fractions\.Fraction"
    r"|datetime\.(datetime|date|time|timedelta|timezone)|zoneinfo\.ZoneInfo(\._unpickle)?"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
    r"|builtins\.(dict|list|tuple|set|frozenset|int|float|complex|str|bytes|bool|object|slice|range)"
    r"|collections\.(defaultdict|deque|Counter)|torch\.torch_version\.TorchVersion"
    r"|numpy\.(_core|core)\.multiarray\.(_reconstruct|scalar)|numpy\.(dtype|ndarray|bool_?|u?int\d+|float\d+)"
    r"|numpy\.dtypes\.\w+|numpy\.random\._pickle\.__\w+_ctor"
    r"|addict(\.addict)?\.Dict|box(\.box)?\.Box|mmengine\.logging\.history_buffer\.HistoryBuffer"
    r"|torch\.optim(\.[a-z_]\w*)*\.[A-Z]\w*|torch\.nn\.modules\.loss\.[A-Z]\w*"
    r"|(omegaconf|yacs|ml_collections|typing|pytorch_lightning|lightning|lightning_fabric)(\.[a-z_]\w*)*\.[A-Z]\w*"
    r"|(?!(os|posix|nt|sys|subprocess|shutil|importlib|builtins)\.)[a-z_]\w*(\.[a-z_]\w*)*"
    r"\.([A-Z]\w*)?(Config|ConfigDict|CfgNode|Cfg|Args|Arguments|Options|HParams|Hparams|Namespace"
    r"|AttributeDict|AttrDict|EasyDict|DotDict|Munch)"
)
"""Names of what trainers note beside the weights: numbers, times, paths, options. They become stand-ins."""
OBJECTS = re.compile(
    r"(numpy|mmengine\.logging|datetime|decimal|fractions|pathlib|uuid|zoneinfo|typing|builtins|torch|copyreg)\..*"
)
"""Notes that are no mappings and no lists: PyTorch's reader fills every kind in its own way."""

# Names that torch's reader can rebuild. They explain a refusal, but never decide it.
REBUILDS_TENSORS = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild\w*"
    r"|builtins\.(set|bytearray|complex)"
    r"|torch\.nn\.parameter\.Parameter|torch\.storage\.(Typed|Untyped)Storage"
    r"|torch\.(\w*Storage|Size|Tensor|device|bool|q?u?int\d+|b?float\d+\w*|complex\d+|per_\w+)"
)
HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"
"""OpenMMLab's curves. They name their own functions by way of `getattr`, of which a stand-in does nothing either."""
OF_HISTORY = "builtins.getattr"
PADDLE_KEY = b"StructuredToParameterName@@"
"""An entry of PaddlePaddle's pickles, which hold numpy arrays."""
QUANTISED_MODULES = ("torch.ao.nn.quantized", "torch.nn.quantized", "torch.jit._pickle", "torchao.", "bitsandbytes.")


@dataclass(frozen=True)
class Content:
    """What a file holds."""

    value: Any
    """Of a pickle: dicts, lists, tensors, plain values, stand-ins. Of a safetensors file: a dict of tensors."""
    metadata: dict[str, str]
    """Of a safetensors file."""
    format: Literal["safetensors", "pytorch"]


class Unread:
    """A stand-in for a note that is not needed: accepts any arguments, keeps nothing, runs nothing."""

    def __new__(cls, *_arguments: Any, **_options: Any) -> "Unread":
        return super().__new__(cls)

    def __init__(self, *_arguments: Any, **_options: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


class UnreadMapping:
    """A stand-in for options: a plain dict of the items that are in the file."""

    def __new__(cls, *_arguments: Any, **_options: Any) -> Any:
        return OrderedDict()


class UnreadList:
    """A stand-in for a queue: a plain list."""

    def __new__(cls, *_arguments: Any, **_options: Any) -> Any:
        return []


def read_content(path: Path) -> Content:
    """Return the content of a file. Raises TeacherMismatch for any file but a checkpoint."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    # safetensors: the header's length in eight bytes, little end first, then the header, which is JSON.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        return _read_safetensors(path)
    refuse_other_files(path, head)
    return Content(unpickle(path), {}, "pytorch")


def _read_safetensors(path: Path) -> Content:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise TeacherMismatch("the safetensors file is cut short or damaged", hint=COPY_AGAIN) from error
    return Content(state, metadata, "safetensors")


def refuse_other_files(path: Path, head: bytes) -> None:
    """Raise TeacherMismatch for files that are sent by mistake. `head` is the file's beginning."""
    if not head:
        raise TeacherMismatch("the file is empty", hint=ADVICE)
    if head[257:262] == b"ustar" or (len(head) >= 512 and head.startswith(b"sys_info\0")):
        raise TeacherMismatch(
            "the file is a tar archive; PyTorch wrote its checkpoints so before version 0.2",
            hint="load it with the PyTorch that wrote it and save it again, or unpack the archive",
        )
    if head.startswith(b"\x1f\x8b"):
        raise TeacherMismatch("the file is no checkpoint but a gzip archive", hint="unpack it first")
    if head.startswith(b"PK"):
        _refuse_other_archives(path)
        return
    kind = kind_of(head)
    # PyTorch's former files are pickles; the reader below opens them.
    if kind is not None and kind not in (TORCH, PICKLE):
        raise _other(kind)
    if kind is None and len(head) < HEAD_BYTES and head.isascii() and (words := head.decode().strip()).isprintable():
        raise TeacherMismatch(f"the file is no checkpoint but text: {words[:60]!r}", hint=f"copy it again, or {ADVICE}")


def _refuse_other_archives(path: Path) -> None:
    try:
        with path.open("rb") as file:
            found = list(islice(members(file.fileno()), MOST_MEMBERS + 1))
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise TeacherMismatch("the checkpoint is cut short or damaged", hint=COPY_AGAIN) from error
    if len(found) > MOST_MEMBERS:
        raise TeacherMismatch(f"the file is an archive of more than {MOST_MEMBERS:,} files", hint=ADVICE)
    if sum(one.file_size for one in found) > max(1 << 30, MOST_RATIO * path.stat().st_size):
        text = f"the file unpacks to more than {MOST_RATIO} times its size: it looks like a bomb"
        raise TeacherMismatch(text, hint="send the file as PyTorch wrote it, which packs nothing")
    names = [one.filename for one in found]
    kind = kind_of_members(names)
    if kind is NPY:
        raise _other(NPZ)
    inner = [name for name in names if name.lower().endswith((".pt", ".pth", ".ckpt", ".safetensors"))]
    if kind is TORCH and inner:
        raise TeacherMismatch(
            f"the file is an archive with a checkpoint in it: {inner[0]}", hint="unpack it, and send that file alone"
        )
    if kind is not TORCH or not any(name.endswith("/data.pkl") for name in names):
        raise _other(kind, "a zip archive, but no checkpoint")


def _other(kind: FileKind | None, words: str = "") -> TeacherMismatch:
    if kind is None:
        return TeacherMismatch(f"the file is {words}", hint=ADVICE)
    return TeacherMismatch(
        f"the file is no checkpoint: it is {kind.words}",
        hint=f"{kind.as_model}; or {ADVICE}" if kind.as_model else ADVICE,
    )


def unpickle(path: Path) -> Any:
    """Return the content of PyTorch's file formats: tensors on the CPU, notes as stand-ins. Raises TeacherMismatch."""
    try:
        return _load(path, ())
    except MemoryError:
        raise
    except Exception as error:  # A damaged or hostile pickle may raise any exception.
        names = _named(path)
        if not _foreign(names) and (notes := sorted(name for name in names if _is_note(name, names))):
            try:
                return _load(path, notes)
            except MemoryError:
                raise
            except Exception as again:
                _explain(path, names, again)
        _explain(path, names, error)


def _load(path: Path, notes: Iterable[str]) -> Any:
    stand_ins: list[Any] = [(_stand_in(name), name) for name in notes]
    with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
        # A pickle of another protocol than torch's own: PyTorch's advice about it is for its users, not for ours.
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _stand_in(name: str) -> type:
    if name == "collections.deque":
        return UnreadList
    return Unread if OBJECTS.fullmatch(name) else UnreadMapping


def _foreign(names: Iterable[str]) -> list[str]:
    """Return the names that neither rebuild tensors nor are notes."""
    known = set(names)
    return sorted(name for name in known if not _is_note(name, known) and not REBUILDS_TENSORS.fullmatch(name))


def _is_note(name: str, names: set[str]) -> bool:
    return NOTES.fullmatch(name) is not None or (name == OF_HISTORY and HISTORY in names)


def _explain(path: Path, names: set[str], error: Exception) -> Never:
    foreign = _foreign(names)
    if _contains(path, PADDLE_KEY):
        raise _other(PADDLE) from error
    if any(name.startswith(QUANTISED_MODULES) for name in foreign):
        raise TeacherMismatch(
            f"the checkpoint holds quantised layers ({', '.join(foreign[:3])})",
            hint="give the weights from before the quantisation, in float32, float16 or bfloat16",
        ) from error
    if any(name.startswith("torch.nn.modules.") for name in foreign):
        own = [name for name in foreign if not name.startswith(("torch.", "builtins.", "collections."))]
        raise TeacherMismatch(
            f"the checkpoint holds a whole pickled network ({', '.join((own or foreign)[:3])}), not only its weights",
            hint=ADVICE,
        ) from error
    if foreign == ["torch.storage._load_from_bytes"]:
        raise TeacherMismatch(
            "the file was written by Python's pickle, which is a program and is never run",
            hint="load it as it was written, and save it with PyTorch: torch.save(state_dict, path)",
        ) from error
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise TeacherMismatch(
            f"the checkpoint is refused: it names {', '.join(foreign[:3])}{more}, which reading weights never needs",
            hint=ADVICE,
        ) from error
    if names and not any(name.startswith("torch.") for name in names):
        raise TeacherMismatch(
            f"the file is a pickle of other objects ({', '.join(sorted(names)[:3])}), no PyTorch checkpoint",
            hint=ADVICE,
        ) from error
    # PyTorch's own words are left out: they advise to lift its guard, or to report an error to PyTorch.
    raise TeacherMismatch(
        "the file is no checkpoint that PyTorch can read, or it is cut short", hint=f"{COPY_AGAIN}; or {ADVICE}"
    ) from error


def _contains(path: Path, key: bytes) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(key) >= 0


def _named(path: Path) -> set[str]:
    """Return the globals that a checkpoint's pickles name. The pickles are read, not run."""
    with warnings.catch_warnings():
        # In a legacy file, raw tensor data follows the pickles; pickletools may read it as a badly escaped string.
        warnings.filterwarnings("ignore", "invalid escape sequence", DeprecationWarning)
        return set(_names(path))


def _names(path: Path) -> Iterator[str]:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            yield from _names_in(file)
        return
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".pkl"):
                with archive.open(name) as file:
                    yield from _names_in(file)


def _names_in(file: IO[bytes]) -> Iterator[str]:
    """Yield `module.name` of every global, as far as the stream of pickles can be followed.

    Newer pickles push both halves as strings, new or from their memo, before the global's opcode.
    """
    memo: dict[Any, str | None] = {}
    strings: list[str] = []
    last: str | None = None
    while True:
        try:
            for opcode, argument, _ in pickletools.genops(file):
                match opcode.name:
                    case "GLOBAL" | "INST":
                        yield _in_python3(*str(argument).split(" ", 1))
                        last = None
                    case "STACK_GLOBAL":
                        yield ".".join(strings[-2:])
                        last = None
                    case "MEMOIZE":
                        memo[len(memo)] = last
                    case "PUT" | "BINPUT" | "LONG_BINPUT":
                        memo[argument] = last
                    case "GET" | "BINGET" | "LONG_BINGET":
                        last = memo.get(argument)
                        strings += [last] if last is not None else []
                    case _:
                        last = argument if isinstance(argument, str) else None
                        strings += [last] if last is not None else []
        except ValueError:
            return


def _in_python3(module: str, name: str = "") -> str:
    """Return a global by its present name, as PyTorch's reader looks it up: pickles have those of Python 2."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"
