"""Checkpoints from any source: read without running their code, and compared with an architecture.

    read          tensors and notes of a file, wrappers and prefixes removed
    open_teacher  the same with facts about the network: classes, channels, parameters
    inspect       the facts only
    load_into     a state into a network, or an error that names the keys

A pickle is a program. `torch.load(weights_only=True)` runs only the few calls that rebuild tensors and refuses every
other name. Two things are added here: harmless notes beside the weights (a numpy number, argparse's options) become
`Unread` instead of a refusal, and a refusal names the kind of the file, or the names that it would have called.
"""

import math
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Never

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from base.errors import TeacherMismatch
from base.file_kinds import HEAD_BYTES, PICKLE, TORCH, FileKind, kind_of, kind_of_members
from base.files import sha256_of
from kdcore.catalog.architectures import ARCHITECTURES
from kdcore.catalog.facts import ModelFacts
from kdcore.models.networks import skeleton
from kdcore.spec.fitting import preprocessing_fault

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")
BATCH_COUNT = "num_batches_tracked"
SAVE_WEIGHTS = "save the weights alone: torch.save(model.state_dict(), path), or safetensors"
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

# Names that torch's reader can rebuild. They explain a refusal, but never decide it.
REBUILDS_TENSORS = re.compile(
    r"collections\.OrderedDict|_codecs\.encode|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild\w*"
    r"|torch\.nn\.parameter\.Parameter|torch\.storage\.(Typed|Untyped)Storage"
    r"|torch\.(\w*Storage|Size|Tensor|device|bool|q?u?int\d+|b?float\d+\w*|complex\d+)"
)

ADVICE = "give a PyTorch state dict (torch.save(model.state_dict(), path)) or a safetensors file"


@dataclass(frozen=True)
class Weights:
    """A file's tensors by their names in the network, and its metadata (safetensors only)."""

    state: dict[str, Tensor]
    metadata: dict[str, str]
    format: Literal["safetensors", "pytorch"]

    def notes(self) -> "Notes":
        """Return the notes of a student that this project exported; all None for other files."""
        try:
            return Notes.model_validate_json(self.metadata.get("distillery", "{}"))
        except ValidationError as error:
            raise TeacherMismatch(f"the file's notes about itself cannot be read: {error}") from error


class Notes(BaseModel):
    """The part of an export's notes that a teacher needs."""

    architecture: str | None = None
    members: int = 1
    mean: list[float] | None = None
    std: list[float] | None = None
    class_names: list[str] | None = None
    image_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class TeacherFile:
    """A checkpoint that fits its architecture."""

    facts: ModelFacts
    state: dict[str, Tensor]


def inspect(path: Path, architecture: str | None, channels: int | None = None) -> ModelFacts:
    """Return the facts of a checkpoint's network. Raises TeacherMismatch if it cannot be used."""
    return open_teacher(path, architecture, channels).facts


def open_teacher(path: Path, architecture: str | None, channels: int | None = None) -> TeacherFile:
    """Read a checkpoint and compare it with its architecture. This project's exports contain their architecture's name.

    The class count comes from the classifier's shape, the channels from the stem's; `channels` is only compared.
    """
    weights = read(path)
    notes = weights.notes()
    name = architecture or notes.architecture
    if notes.members > 1:
        raise TeacherMismatch(
            f"the file holds an ensemble of {notes.members} networks, not one",
            hint="a job of born_again whose answer is 'last' exports one; several teachers are named one by one",
        )
    if name is None:
        raise TeacherMismatch("the checkpoint does not say its architecture", hint="name the teacher's architecture")
    facts = ModelFacts(
        **_measure(name, weights.state),
        bytes=path.stat().st_size,
        format=weights.format,
        mean=notes.mean,
        std=notes.std,
        class_names=notes.class_names,
        image_size=notes.image_size,
        digest=f"sha256:{sha256_of(path)}",
    )
    if channels is not None and channels != facts.channels:
        raise TeacherMismatch(f"the teacher takes images of {facts.channels} channels, the data has {channels}")
    for what, values, count in (
        ("class names", facts.class_names, facts.num_classes),
        ("channels of its mean", facts.mean, facts.channels),
        ("channels of its standard deviation", facts.std, facts.channels),
    ):
        if values is not None and len(values) != count:
            raise TeacherMismatch(f"the file notes {len(values)} {what}, its weights have {count}")
    fault = preprocessing_fault(facts.mean, facts.std) if facts.mean and facts.std else None
    if fault is not None:
        raise TeacherMismatch(f"the mean and std that the file notes cannot be used: {fault}")
    return TeacherFile(facts, weights.state)


def load_into(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy a state into a network. Raises TeacherMismatch, naming the first keys that do not fit."""
    model.load_state_dict(_fitted(model.state_dict(), state, what))


def _measure(architecture: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """Return classes, channels and parameters, from the shapes of a state that fits."""
    what = f"the checkpoint does not fit {architecture}"
    three_channels = ARCHITECTURES[architecture].channels == 3 if architecture in ARCHITECTURES else False
    num_classes = _count(architecture, state, ((2, 3), (3, 3)), what)
    channels = 3 if three_channels else _count(architecture, state, ((2, 3), (2, 1)), what)
    network = skeleton(architecture, num_classes, channels)
    fitted = _fitted(network.state_dict(), state, what)
    for name, value in fitted.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise TeacherMismatch(f"the checkpoint's {name} holds values that are no numbers (NaN or infinite)")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"architecture": architecture, "num_classes": num_classes, "channels": channels, "parameters": parameters}


def _count(
    architecture: str, state: dict[str, Tensor], builds: tuple[tuple[int, int], tuple[int, int]], what: str
) -> int:
    """Return the size, in this state, of the one dimension that differs between two builds of an architecture.

    Builds with two class counts differ in the classifier's tensor, builds with two channel counts in the stem's.
    """
    one, other = (skeleton(architecture, *build).state_dict() for build in builds)
    for name, value in one.items():
        for dimension, (here, there) in enumerate(zip(value.shape, other[name].shape, strict=True)):
            if here != there and name in state and state[name].ndim == value.ndim:
                return state[name].shape[dimension]
    _fitted(one, state, what)
    raise AssertionError(f"{architecture}: no tensor depends on the count, and yet the state fits")


def _fitted(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return the state under the expected names. Raises TeacherMismatch if it does not fit.

    It accepts missing batch norm counters (old files), auxiliary heads, which only training needs, and the names that
    DenseNets had before PyTorch forbade dots.
    """
    dots = r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)"
    given = {re.sub(dots, r"\1\2", name): value for name, value in state.items()}
    given = {name: value for name, value in given.items() if name in expected or not name.startswith(AUXILIARY_HEADS)}
    faults = list(_faults(expected, given))
    if faults:
        raise TeacherMismatch(f"{what}: {'; '.join(faults)}", hint=_likely_architectures(state))
    return {name: given.get(name, value) for name, value in expected.items()}


def _faults(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Iterator[str]:
    missing = [name for name in expected if name not in given and not name.endswith(BATCH_COUNT)]
    unexpected = [name for name in given if name not in expected]
    misshapen = [name for name in expected if name in given and given[name].shape != expected[name].shape]
    quantised = [
        name
        for name in expected
        if name in given and expected[name].is_floating_point() and not given[name].is_floating_point()
    ]
    if missing:
        yield f"{_of(missing, expected)} missing, first {missing[0]}"
    if unexpected:
        yield f"{_of(unexpected, given)} unexpected, first {unexpected[0]}"
    if misshapen:
        name = misshapen[0]
        shapes = f"{_shape(given[name])} in the file, {_shape(expected[name])} in the network"
        yield f"{_of(misshapen, expected)} of another shape, first {name}: {shapes}"
    if quantised:
        yield f"{_of(quantised, expected)} quantised, first {quantised[0]} is {given[quantised[0]].dtype}"


def _of(names: list[str], among: Mapping[str, Tensor]) -> str:
    return f"{len(names)} of {len(among)} keys {'is' if len(names) == 1 else 'are'}"


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a single number"


def _likely_architectures(state: Mapping[str, Tensor]) -> str | None:
    """Return a hint with the architectures of the same number of parameters: the given name may be wrong."""
    learned = {name: value for name, value in state.items() if not name.endswith(("running_mean", "running_var"))}
    total = sum(math.prod(value.shape) for name, value in learned.items() if not name.endswith(BATCH_COUNT))
    classifiers = [value.shape for value in state.values() if value.ndim == 2]
    stems = [value.shape for value in state.values() if value.ndim == 4]
    if not classifiers or not stems:
        return None
    likely = [n for n, f in ARCHITECTURES.items() if f.parameters(classifiers[-1][0], stems[0][1]) == total]
    return f"its {total:,} parameters are those of {' or '.join(likely)}" if likely else None


def read(path: Path) -> Weights:
    """Return tensors by name, without wrappers and prefixes. Raises TeacherMismatch for any file but a checkpoint."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    # safetensors: the header's length in eight bytes, little end first, then the header, which is JSON.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        return _read_safetensors(path)
    refuse_other_files(path, head)
    return Weights(_bare(_state_in(unpickle(path))), {}, "pytorch")


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise TeacherMismatch(f"the safetensors file is cut short or damaged: {error}") from error
    return Weights(_bare(state), metadata, "safetensors")


def _state_in(content: Any) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint: its whole content, or the entry under one of the usual names."""
    if not isinstance(content, Mapping):
        raise TeacherMismatch(f"the checkpoint is {_kind(content)}, no state dict", hint=SAVE_WEIGHTS)
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            return _state_in(content[wrapper])
    if not content:
        raise TeacherMismatch("the checkpoint holds no tensors", hint=SAVE_WEIGHTS)
    for name, value in content.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise TeacherMismatch(
                f"the checkpoint's entry {str(name)!r} is {_kind(value)}, not a tensor of weights",
                hint=f"the state dict must be the whole file or be stored under one of {', '.join(WRAPPERS)}",
            )
    return {str(name): value.detach() for name, value in content.items()}


def _bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with the network's names: without the prefixes of DataParallel, torch.compile and averaging."""
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items() if name != "n_averaged"}
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


class Unread:
    """A placeholder for a note that is not needed: accepts any arguments, keeps nothing, runs nothing."""

    def __new__(cls, *_arguments: Any, **_options: Any) -> "Unread":
        return super().__new__(cls)

    def __init__(self, *_arguments: Any, **_options: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


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


def _refuse_other_archives(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise TeacherMismatch(
            "the checkpoint is cut short or damaged", hint="compare its size, copy it again"
        ) from error
    kind = kind_of_members(names)
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
    """Return the content of PyTorch's file formats: tensors on the CPU, notes as `Unread`. Raises TeacherMismatch."""
    try:
        with torch.serialization.safe_globals([(Unread, name) for name in NOTES]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # A damaged or hostile pickle may raise any exception.
        _explain(path, error)


def _explain(path: Path, error: Exception) -> Never:
    with warnings.catch_warnings():
        # In a legacy file, raw tensor data follows the pickles; pickletools may read it as a badly escaped string.
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
    # PyTorch's reader of pickles advises to lift its guard, which is no advice for a service: its words are left out.
    refused = isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)
    reason = "" if refused or not str(error) else f": {str(error).splitlines()[0]}"
    raise TeacherMismatch(
        f"the file is no checkpoint that PyTorch can read, or it is cut short{reason}", hint=ADVICE
    ) from error


def _kind(value: Any) -> str:
    return "a numpy array or other object" if isinstance(value, Unread) else f"of type {type(value).__name__}"


def _names(path: Path) -> Iterator[str]:
    """Yield the globals that a checkpoint's pickles name. The pickles are read, not run."""
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
