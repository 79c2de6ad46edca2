"""PyTorch's own file formats, read without running what a file asks to be run, and explained where they cannot be.

`torch.load(weights_only=True)` is the guard: it calls nothing but what rebuilds tensors. This page adds two things.
Harmless notes beside the weights become `Unread`, so that a best accuracy saved as a numpy number spoils nothing.
And a refusal says what the file is, or which names it would have called.
"""

import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Never

import torch

from base.errors import TeacherMismatch


class Unread:
    """Stands for a note that is not needed: made of anything, keeps nothing, runs nothing."""

    def __new__(cls, *_arguments: Any, **_options: Any) -> "Unread":
        return super().__new__(cls)

    def __init__(self, *_arguments: Any, **_options: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


NOTES = (
    "argparse.Namespace",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
)

# What torch's reader knows how to rebuild; used to explain a refusal, never to decide on one.
REBUILDS_TENSORS = re.compile(
    r"collections\.OrderedDict|_codecs\.encode|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild\w*"
    r"|torch\.nn\.parameter\.Parameter|torch\.storage\.(Typed|Untyped)Storage"
    r"|torch\.(\w*Storage|Size|Tensor|device|bool|q?u?int\d+|b?float\d+\w*|complex\d+)"
)

LOOKS_LIKE = (
    (b"<", "an HTML or XML page, as a failed download leaves it"),
    (b"version https://git-lfs", "a Git LFS pointer; the file itself was not fetched"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"\x89HDF", "an HDF5 file, as Keras writes them"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
    (b"GGUF", "a GGUF file"),
    (b"{", "JSON text"),
)
ADVICE = "give a PyTorch state dict (torch.save(model.state_dict(), path)) or a safetensors file"


def refuse_other_files(path: Path, head: bytes) -> None:
    """Name the files that people send by mistake. `head` is the file's first 512 bytes."""
    if not head:
        raise TeacherMismatch("the file is empty", hint=ADVICE)
    if head[257:262] == b"ustar" or (len(head) == 512 and head.startswith(b"sys_info\0")):
        raise TeacherMismatch(
            "the file is a tar archive; PyTorch wrote its checkpoints so before version 0.2",
            hint="load it with the PyTorch that wrote it and save it again, or unpack the archive",
        )
    for beginning, words in LOOKS_LIKE:
        if head.lstrip().startswith(beginning):
            raise TeacherMismatch(f"the file is no checkpoint: it looks like {words}", hint=ADVICE)
    if head.startswith(b"PK"):
        _refuse_other_archives(path)


def _refuse_other_archives(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise TeacherMismatch(
            "the checkpoint is cut short or damaged", hint="compare its size, copy it again"
        ) from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise TeacherMismatch("the file is a TorchScript program, not a state dict", hint=ADVICE)
    if any(name.endswith("archive_format") for name in names):
        raise TeacherMismatch("the file is a torch.export program, not a state dict", hint=ADVICE)
    if not any(name.endswith("/data.pkl") for name in names):
        raise TeacherMismatch("the file is a zip archive, but no checkpoint", hint=ADVICE)


def read(path: Path) -> Any:
    """What the file holds, tensors on the CPU and notes unread. Raises TeacherMismatch for all that it cannot read."""
    try:
        with torch.serialization.safe_globals([(Unread, name) for name in NOTES]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # A damaged or hostile pickle may fail in any way.
        _explain(path, error)


def _explain(path: Path, error: Exception) -> Never:
    with warnings.catch_warnings():
        # A legacy file's pickles end in raw tensor data, which pickletools may take for a badly escaped string.
        warnings.filterwarnings("ignore", "invalid escape sequence", DeprecationWarning)
        names = set(_names(path))
    foreign = sorted(name for name in names if name not in NOTES and not REBUILDS_TENSORS.fullmatch(name))
    if any(name.startswith("torch.nn.modules.") for name in foreign):
        own = [name for name in foreign if not name.startswith(("torch.", "builtins.", "collections."))]
        raise TeacherMismatch(
            f"the checkpoint holds a whole pickled network ({', '.join((own or foreign)[:3])}), not only its weights",
            hint=ADVICE,
        ) from error
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise TeacherMismatch(
            f"the checkpoint is refused: it names {', '.join(foreign[:3])}{more}, which reading weights never needs",
            hint=ADVICE,
        ) from error
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise TeacherMismatch(
        f"the file is no checkpoint that PyTorch can read, or it is cut short: {first_line}", hint=ADVICE
    ) from error


def kind(value: Any) -> str:
    """What a reader would call it."""
    return "a numpy array or other object" if isinstance(value, Unread) else f"of type {type(value).__name__}"


def _names(path: Path) -> Iterator[str]:
    """The globals that a checkpoint's pickles name, found by reading, not by running them."""
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
    """`module.name` of every global, as far as the stream of pickles can be followed.

    Newer pickles push both halves as strings, fresh or out of their memo, before they ask for the global.
    """
    memo: dict[Any, str | None] = {}
    strings: list[str] = []
    last: str | None = None
    while True:
        try:
            for opcode, argument, _ in pickletools.genops(file):
                match opcode.name:
                    case "GLOBAL" | "INST":
                        yield str(argument).replace(" ", ".").replace("__builtin__.", "builtins.")
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
