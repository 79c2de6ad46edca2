"""Checkpoints as people have them: read without running anything that is in them, held against their architecture.

    read          tensors and notes of a file, whatever it was wrapped in
    open_teacher  the same, with what they say about the network: classes, channels, parameters
    inspect       only what they say
    published     torchvision's own weights, downloaded
    load_into     into a network, or an error that names the keys

A pickle is a program. PyTorch's restricted reader runs only the few calls that rebuild tensors; what else a file names
is refused, by name. Notes that people save beside their weights (numpy's numbers, argparse's options) are read as
nothing at all.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from base.errors import Internal, SpecInvalid, TeacherMismatch
from kdcore import unpickled, vision
from kdcore.catalog.architectures import ARCHITECTURES
from kdcore.catalog.facts import ModelFacts
from kdcore.models.skeleton import skeleton

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")
BATCH_COUNT = "num_batches_tracked"
SAVE_WEIGHTS = "save the weights alone: torch.save(model.state_dict(), path), or safetensors"


@dataclass(frozen=True)
class Weights:
    """A file's tensors under their network's names, and the text that stood beside them (safetensors only)."""

    state: dict[str, Tensor]
    metadata: dict[str, str]
    format: Literal["safetensors", "pytorch"]

    def notes(self) -> "Notes":
        """What a student that we exported says about itself; all None for anybody else's file."""
        try:
            return Notes.model_validate_json(self.metadata.get("distillery", "{}"))
        except ValidationError as error:
            raise TeacherMismatch(f"the file's notes about itself cannot be read: {error}") from error


class Notes(BaseModel):
    """The part of an export's notes that a teacher needs; the rest is for people."""

    architecture: str | None = None
    members: int = 1
    mean: list[float] | None = None
    std: list[float] | None = None
    class_names: list[str] | None = None


@dataclass(frozen=True)
class TeacherFile:
    """A checkpoint that fits its architecture."""

    facts: ModelFacts
    state: dict[str, Tensor]


def inspect(path: Path, architecture: str | None, channels: int | None = None) -> ModelFacts:
    """What a checkpoint says about its network. Raises TeacherMismatch where it cannot be used, and says why."""
    return open_teacher(path, architecture, channels).facts


def open_teacher(path: Path, architecture: str | None, channels: int | None = None) -> TeacherFile:
    """Read a checkpoint and hold it against its architecture, which a student exported by us says itself.

    The class count is read off the classifier, the channels off the stem; `channels` only asks that they agree.
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
        digest=digest(path),
    )
    if channels is not None and channels != facts.channels:
        raise TeacherMismatch(f"the teacher takes images of {facts.channels} channels, the data has {channels}")
    _refuse_notes_that_do_not_fit(facts)
    return TeacherFile(facts, weights.state)


def _refuse_notes_that_do_not_fit(facts: ModelFacts) -> None:
    for what, values, count in (
        ("class names", facts.class_names, facts.num_classes),
        ("channels of its mean", facts.mean, facts.channels),
        ("channels of its standard deviation", facts.std, facts.channels),
    ):
        if values is not None and len(values) != count:
            raise TeacherMismatch(f"the file notes {len(values)} {what}, its weights have {count}")


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


# Reading


def read(path: Path) -> Weights:
    """Tensors by name, wrappers and prefixes undone. Raises TeacherMismatch for anything but a checkpoint."""
    with path.open("rb") as file:
        head = file.read(512)
    if _is_safetensors(head):
        return _read_safetensors(path)
    unpickled.refuse_other_files(path, head)
    return Weights(_bare(_state_in(unpickled.read(path))), {}, "pytorch")


def _is_safetensors(head: bytes) -> bool:
    """Eight bytes that count the header's, little end first, then JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise TeacherMismatch(f"the safetensors file is cut short or damaged: {error}") from error
    return Weights(_bare(state), metadata, "safetensors")


def _state_in(content: Any) -> dict[str, Tensor]:
    """The state dict in what a checkpoint held: the thing itself, or under one of the usual names."""
    if not isinstance(content, Mapping):
        raise TeacherMismatch(f"the checkpoint is {unpickled.kind(content)}, no state dict", hint=SAVE_WEIGHTS)
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            return _state_in(content[wrapper])
    if not content:
        raise TeacherMismatch("the checkpoint holds no tensors", hint=SAVE_WEIGHTS)
    for name, value in content.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise TeacherMismatch(
                f"the checkpoint's entry {str(name)!r} is {unpickled.kind(value)}, not a tensor of weights",
                hint=f"the state dict must be the whole file or stand under one of {', '.join(WRAPPERS)}",
            )
    return {str(name): value.detach() for name, value in content.items()}


def _bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the network has them: DataParallel, torch.compile and averaged models put theirs before or between."""
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items() if name != "n_averaged"}
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


# Holding against an architecture


def load_into(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy a state into a network. Raises TeacherMismatch, naming the first keys that do not fit."""
    model.load_state_dict(_fitted(model.state_dict(), state, what))


def _measure(architecture: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """Classes, channels and parameters, from the shapes of a state that fits."""
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
    """The size, in this state, of the one dimension in which two builds of an architecture differ.

    Built for two class counts, an architecture shows which tensor is its classifier; for two channel counts, its stem.
    """
    one, other = (skeleton(architecture, *build).state_dict() for build in builds)
    for name, value in one.items():
        for dimension, (here, there) in enumerate(zip(value.shape, other[name].shape, strict=True)):
            if here != there and name in state and state[name].ndim == value.ndim:
                return state[name].shape[dimension]
    _fitted(one, state, what)
    raise AssertionError(f"{architecture}: no tensor depends on the count, and yet the state fits")


def _fitted(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The state under the names that are expected, or TeacherMismatch.

    Forgiven: batch norm's counters, which old files lack; auxiliary heads, which only training needs; the names that
    DenseNets had before PyTorch forbade dots.
    """
    given = {_without_dots(name): value for name, value in state.items()}
    given = {name: value for name, value in given.items() if name in expected or not name.startswith(AUXILIARY_HEADS)}
    faults = list(_faults(expected, given))
    if faults:
        raise TeacherMismatch(f"{what}: {'; '.join(faults)}", hint=_likely(state))
    return {name: given.get(name, value) for name, value in expected.items()}


def _without_dots(name: str) -> str:
    return re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name)


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


def _likely(state: Mapping[str, Tensor]) -> str | None:
    """Which architectures have just as many parameters, for those who took the name for another."""
    learned = {name: value for name, value in state.items() if not name.endswith(("running_mean", "running_var"))}
    total = sum(math.prod(value.shape) for name, value in learned.items() if not name.endswith(BATCH_COUNT))
    classifiers = [value.shape for value in state.values() if value.ndim == 2]
    stems = [value.shape for value in state.values() if value.ndim == 4]
    if not classifiers or not stems:
        return None
    likely = [n for n, f in ARCHITECTURES.items() if f.parameters(classifiers[-1][0], stems[0][1]) == total]
    return f"its {total:,} parameters are those of {' or '.join(likely)}" if likely else None


# torchvision's published weights


def published(name: str) -> TeacherFile:
    """`ResNet50_Weights.IMAGENET1K_V2`, or `torchvision/resnet50` for that network's best; kept in torch's hub cache.

    Raises SpecInvalid for a name that torchvision does not know, Internal when the download fails.
    """
    architecture, entry = _published_entry(name)
    transforms = entry.transforms()
    # These two normalise their input again as torchvision loads them: to a mean and deviation of one half.
    again = architecture in ("torchvision/googlenet", "torchvision/inception_v3")
    try:
        state = entry.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise Internal(
            f"the published weights {entry} could not be downloaded from {entry.url}: {error}",
            hint="where workers have no internet, upload the file and register it as a model",
        ) from error
    facts = ModelFacts(
        **_measure(architecture, state),
        bytes=sum(value.nbytes for value in state.values()),
        format="pytorch",
        mean=[0.5] * 3 if again else list(transforms.mean),
        std=[0.5] * 3 if again else list(transforms.std),
        class_names=list(entry.meta["categories"]),
    )
    return TeacherFile(facts, state)


def _published_entry(name: str) -> tuple[str, Any]:
    """The architecture and torchvision's own record of the weights."""
    library = vision.torchvision().models
    networks = library.list_models(module=library)
    bare = name.removeprefix("torchvision/")
    if bare in networks:
        return f"torchvision/{bare}", library.get_model_weights(bare).DEFAULT
    try:
        entry = library.get_weight(name)
    except (ValueError, AttributeError, KeyError) as error:
        raise SpecInvalid(
            f"torchvision publishes no weights {name!r}", hint="such as ResNet50_Weights.IMAGENET1K_V2"
        ) from error
    for network in networks:
        if library.get_model_weights(network) is type(entry):
            return f"torchvision/{network}", entry
    raise SpecInvalid(f"{name} are not the weights of an image classifier")
