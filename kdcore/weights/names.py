"""The names of a checkpoint's tensors, fitted to those of a network.

    flat       every tensor of a file by its path, `state_dict.model.conv1.weight`
    template   the names and shapes of an architecture, whatever its classes and channels
    candidates the places in a file where all of a network's tensors are
    choose     one of them, or an error that names them and the field that chooses
    nearest    the place that fits best, and what is wrong there

A trainer puts names before a network's own (`module.`, `model.`, `state_dict.module.student.`). Whatever stands before
all of them is a prefix, and is removed. Beside them a file may hold what is no part of the network, such as the weights
of a loss: it is left out and named. A tensor below a module that the network has, but that the network has not, is no
such thing: it is another network.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from base.errors import TeacherMismatch
from kdcore.catalog.architectures import ARCHITECTURES
from kdcore.models.networks import skeleton
from kdcore.weights.content import Content, Unread
from kdcore.weights.dialects import Renamed, dialects

BATCH_COUNT = "num_batches_tracked"
DERIVED = (BATCH_COUNT, "relative_position_index", "relative_coords_table", "attn_mask", "position_ids")
"""Buffers that a network computes itself, or that say nothing: files may lack them, or have them."""
AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")
"""Of GoogLeNet and Inception; only training needs them."""
WRAPPED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Put between names by torch.compile, FSDP and activation checkpointing."""
OF_TRAINING = re.compile(r"(optim|sched|lr_sched|scaler|amp|rng|random_state|loops|best_optim)", re.IGNORECASE)
"""The start of entries that are no weights: states of optimizers, schedules and random numbers."""
AVERAGED = re.compile(r"(^|[._])(ema|ema_\w+|averag\w*|swa\w*|\w*_averaged?)([._]|$)", re.IGNORECASE)
"""A prefix of averaged weights: state_dict_ema, model_ema, ema_model, callbacks.….average_model_state."""
RAW_OF_LIGHTNING = "current_model_state"
"""The raw weights in a file of Lightning's WeightAveraging; `state_dict` has the averaged ones then."""
HEAD_WORDS = ("fc", "linear", "classifier", "head", "heads", "last_linear", "logits", "output", "cls")
OTHER_TASK = re.compile(r"decoder|embed|proj|predictor", re.IGNORECASE)
"""Layers behind a body that do not classify: of autoencoders (MAE) and of learning without labels (BYOL, CLIP)."""
SAYS_NOTHING = ("module", "model", "net", "network", "backbone", "encoder", "state_dict")
"""Names before a network's own that do not tell it from another."""
QUANTISED = (".zero_point", ".SCB", ".absmax", ".qweight", ".qzeros", "_packed_params", ".weight_scale")
QUANTISED_TYPES = tuple(
    kind
    for kind in (getattr(torch, name, None) for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"))
    if kind is not None
)
NAMELESS = "tensors without names"
CLASSES, CHANNELS = -1, -2
DEEPEST = 6

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """Which of a file's networks is meant, if it has several."""

    part: str | None = None
    """A name of the path to its weights, such as `student`."""
    averaged: bool | None = None
    """True: the averaged weights (EMA, SWA); False: the raw ones. None: the averaged, if the file has both."""


ANY = Choice()


@dataclass(frozen=True)
class Template:
    """The names of an architecture's tensors with their shapes, in the network's order."""

    architecture: str
    shapes: Mapping[str, Shape]
    """CLASSES and CHANNELS stand for sizes that are not known."""
    floating: frozenset[str]

    @property
    def required(self) -> list[str]:
        return [name for name in self.shapes if not name.endswith(DERIVED)]

    @property
    def head(self) -> list[str]:
        """The classifier: the names whose shapes depend on the number of classes."""
        return [name for name, shape in self.shapes.items() if CLASSES in shape]

    @property
    def modules(self) -> set[str]:
        """The names of the network's outermost modules."""
        return {name.partition(".")[0] for name in self.shapes}


@dataclass(frozen=True)
class Flat:
    """The tensors of a file by their path, and what else it has."""

    tensors: Mapping[str, Tensor]
    ordered: bool
    """True if the order is that of the network's modules; safetensors files sort their tensors."""
    others: Mapping[str, str] = field(default_factory=dict)
    """The kinds of the entries that are no tensors, by their path."""
    unwrapped: tuple[str, ...] = ()
    """What was removed between the names."""


@dataclass(frozen=True)
class Match:
    """A place in a file that was compared with a network."""

    prefix: str
    state: Mapping[str, Tensor]
    """By the network's names."""
    renamed: Mapping[str, str]
    """For each of the network's names that the file has under another name behind the prefix: that name."""
    ignored: tuple[str, ...] = ()
    """Tensors that are no part of the network, by their path."""
    unexpected: tuple[str, ...] = ()
    """Tensors below the network's modules that the network does not have."""
    missing: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    by_order: bool = False
    averaged: bool = False

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen)

    @property
    def label(self) -> str:
        return self.prefix.rstrip(".")


# Templates


@lru_cache(maxsize=64)
def template(architecture: str) -> Template:
    """Return an architecture's names and shapes. Raises SpecInvalid for an unknown name."""
    builds = [skeleton(architecture, 2, 3).state_dict(), skeleton(architecture, 3, 3).state_dict()]
    if not takes_three_channels_only(architecture):
        builds.append(skeleton(architecture, 2, 1).state_dict())
    shapes = {
        name: tuple(map(_size, *(build[name].shape for build in builds)))
        if all(name in build and build[name].ndim == value.ndim for build in builds)
        else tuple(value.shape)
        for name, value in builds[0].items()
    }
    floating = frozenset(name for name, value in builds[0].items() if value.is_floating_point())
    return Template(architecture, shapes, floating)


def takes_three_channels_only(architecture: str) -> bool:
    bare = architecture.partition("+")[0]
    return bare in ARCHITECTURES and ARCHITECTURES[bare].channels == 3


def _size(one: int, more_classes: int, one_channel: int | None = None) -> int:
    if one != more_classes:
        return CLASSES
    return one if one_channel in (None, one) else CHANNELS


def count(shapes: Template, state: Mapping[str, Tensor], unknown: int) -> int | None:
    """Return the size, in a state, of the dimension that a template does not know: the classes or the channels."""
    for name, shape in shapes.shapes.items():
        if unknown in shape and name in state and state[name].ndim == len(shape):
            return int(state[name].shape[shape.index(unknown)])
    return None


def compatible(shape: Shape, tensor: Tensor) -> bool:
    return len(shape) == tensor.ndim and all(
        known < 0 or known == size for known, size in zip(shape, tensor.shape, strict=True)
    )


# Files


def flat(content: Content) -> Flat:
    """Return the tensors of a file by their path. Raises TeacherMismatch if it has none."""
    if not isinstance(content.value, dict):
        raise TeacherMismatch(
            f"the checkpoint is {kind(content.value)}, no state dict",
            hint="save the weights alone: torch.save(model.state_dict(), path), or safetensors",
        )
    tensors: dict[str, Tensor] = {}
    others: dict[str, str] = {}
    for path, value in _walk(content.value, "", 0):
        if isinstance(value, Tensor) and value.layout is torch.strided:
            tensors[path] = value.detach()
        else:
            others[path] = kind(value)
    if not any(tensor.ndim for tensor in tensors.values()):
        held = next(iter(others.items()), None)
        raise TeacherMismatch(
            "the checkpoint holds no tensors of weights" + (f"; its entry {held[0]!r} is {held[1]}" if held else ""),
            hint="save the weights alone: torch.save(model.state_dict(), path), or safetensors",
        )
    plain = {_unwrapped(path): value for path, value in tensors.items()}
    if len(plain) < len(tensors):  # The file has a network compiled, and not.
        plain = tensors
    unwrapped = tuple(word for word in WRAPPED if plain is not tensors and any(word in path for path in tensors))
    return Flat(plain, content.format == "pytorch", others, unwrapped)


def _walk(value: dict[Any, Any], path: str, depth: int) -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if not isinstance(key, str) or (depth < 2 and OF_TRAINING.match(key) and not isinstance(inner, Tensor)):
            continue
        if isinstance(inner, dict) and depth < DEEPEST:
            yield from _walk(inner, f"{path}{key}.", depth + 1)
        else:
            yield f"{path}{key}", inner


def _unwrapped(path: str) -> str:
    for word in WRAPPED:
        path = path.replace(word, "")
    return path


def kind(value: Any) -> str:
    """Return what a value of a file is, in words."""
    if isinstance(value, Tensor):
        return f"a tensor of the layout {value.layout}" if value.layout is not torch.strided else "of type Tensor"
    if isinstance(value, list | tuple) and value and all(isinstance(one, Tensor) for one in value):
        return f"of type {type(value).__name__}: {len(value)} {NAMELESS}"
    return "a numpy array or other object" if isinstance(value, Unread) else f"of type {type(value).__name__}"


# Fitting


def candidates(network: Template, file: Flat, also: Iterable[Renamed] = ()) -> list[Match]:
    """Return the places of a file that hold a network completely: by names (its own, or `also`), else by order."""
    found: dict[str, Match] = {}
    for renamed in (*dialects(network.shapes, file.tensors), *also):
        for prefix in _prefixes(network, renamed):
            match = _attempt(network, renamed, prefix)
            if match.fits:
                found.setdefault(prefix, match)
    matches = list(found.values()) or _by_order(network, file)
    lightning = any(path.startswith(f"{RAW_OF_LIGHTNING}.") for path in file.tensors)
    return [replace(one, averaged=_is_averaged(one.prefix, lightning)) for one in matches]


def _is_averaged(prefix: str, lightning: bool) -> bool:
    if lightning and not prefix.startswith(f"{RAW_OF_LIGHTNING}."):
        return True
    return bool(AVERAGED.search(prefix))


def nearest(network: Template, file: Flat, part: str | None = None) -> Match:
    """Return the place of a file that fits best."""
    attempts = [
        _attempt(network, renamed, prefix)
        for renamed in dialects(network.shapes, file.tensors)
        for prefix in _prefixes(network, renamed) or [""]
        if part is None or _is_part(prefix, part)
    ]
    if not attempts:
        return _attempt(network, Renamed(file.tensors), "")
    return min(attempts, key=lambda one: len(one.missing) + len(one.misshapen) + len(one.unexpected))


def body_prefixes(network: Template, renamed: Renamed) -> list[str]:
    """Return the prefixes behind which everything of a network is but its classifier."""
    body = [name for name in network.required if CLASSES not in network.shapes[name]]
    return [
        prefix
        for prefix in _prefixes(network, renamed)
        if all(
            f"{prefix}{name}" in renamed.tensors
            and compatible(network.shapes[name], renamed.tensors[f"{prefix}{name}"])
            for name in body
        )
    ]


def _prefixes(network: Template, renamed: Renamed) -> list[str]:
    """Return the prefixes behind which at least half of the network's names are, the fullest first."""
    counts: Counter[str] = Counter()
    for path in renamed.tensors:
        at = 0
        while True:
            if path[at:] in network.shapes:
                counts[path[:at]] += 1
            dot = path.find(".", at)
            if dot < 0:
                break
            at = dot + 1
    half = len(network.required) / 2
    return [prefix for prefix, hits in counts.most_common() if hits >= half]


def _attempt(network: Template, renamed: Renamed, prefix: str) -> Match:
    """Compare the tensors behind a prefix with a network."""
    behind = {path.removeprefix(prefix): path for path in renamed.tensors if path.startswith(prefix)}
    places = {
        name: behind[name]
        for name, shape in network.shapes.items()
        if name in behind and (not name.endswith(DERIVED) or compatible(shape, renamed.tensors[behind[name]]))
    }
    missing = [name for name in network.required if name not in places]
    if (head := [name for name in missing if CLASSES in network.shapes[name]]) == network.head:
        found = _head_elsewhere(network, head, renamed.tensors, places.values(), prefix)
        places |= found
        missing = [name for name in missing if name not in found]
    state = {name: renamed.tensors[path] for name, path in places.items()}
    taken, mine = set(places.values()), set(behind.values())
    rest = [path for path in renamed.tensors if path not in taken]
    unexpected = {
        path
        for path in rest
        if path in mine and _belongs(path.removeprefix(prefix), network) and not path.endswith(DERIVED)
    }
    ignored = [
        path
        for path in rest
        if path not in unexpected
        and renamed.tensors[path].ndim
        and not path.endswith(DERIVED)
        and not path.removeprefix(prefix).startswith(AUXILIARY_HEADS)
    ]
    return Match(
        prefix=prefix,
        state=state,
        renamed={
            name: renamed.origin(path)
            for name, path in places.items()
            if renamed.origin(path) != f"{prefix}{name}" and not name.endswith(DERIVED)
        },
        ignored=tuple(renamed.origin(path) for path in ignored),
        unexpected=tuple(path.removeprefix(prefix) for path in rest if path in unexpected),
        missing=tuple(missing),
        misshapen=tuple(
            name
            for name, tensor in state.items()
            if not compatible(network.shapes[name], tensor) and not name.endswith(DERIVED)
        ),
    )


def _belongs(name: str, network: Template) -> bool:
    """Return True for a tensor that would be a part of the network's modules, or of none: a bare name."""
    return name.partition(".")[0] in network.modules and not name.startswith(AUXILIARY_HEADS)


def _head_elsewhere(
    network: Template, missing: Sequence[str], tensors: Mapping[str, Tensor], taken: Iterable[str], prefix: str
) -> dict[str, str]:
    """Return the places of a classifier that has another name: the one layer of its kind and width beside the body.

    A layer with others in its module, such as the last one of a projection, is no classifier of the body's output.
    """
    fitting = {
        layer: own
        for layer, own in layers_like_head(network, missing, tensors, taken).items()
        if not is_of_other_task(layer, prefix)
        and not beside(layer, prefix, set(tensors) - set(taken) - set(own.values()))
    }
    if len(fitting) > 1:
        named = {layer: own for layer, own in fitting.items() if set(layer.split(".")[-2:]) & set(HEAD_WORDS)}
        fitting = named or fitting
    if len(fitting) != 1:
        return {}
    (own,) = fitting.values()
    leaves = {name.rpartition(".")[2]: name for name in missing}
    return {name: own[leaf] for leaf, name in leaves.items()}


def layers_like_head(
    network: Template, head: Sequence[str], tensors: Mapping[str, Tensor], taken: Iterable[str]
) -> dict[str, dict[str, str]]:
    """Return the layers that have the classifier's kind and width, by their module path: leaf names and paths."""
    leaves = {name.rpartition(".")[2]: name for name in head}
    layers: dict[str, dict[str, str]] = {}
    for path in tensors.keys() - set(taken):
        layer, _, leaf = path.rpartition(".")
        layers.setdefault(layer, {})[leaf] = path
    return {
        layer: own
        for layer, own in layers.items()
        if own.keys() == leaves.keys()
        and all(compatible(network.shapes[name], tensors[own[leaf]]) for leaf, name in leaves.items())
    }


def apart(layer: str, prefix: str) -> str:
    """Return the path of a layer from where it leaves the path to the body."""
    steps, body = layer.split("."), prefix.split(".")
    shared = next((at for at, (own, other) in enumerate(zip(steps, body, strict=False)) if own != other), len(body))
    return ".".join(steps[shared:])


def is_of_other_task(layer: str, prefix: str) -> bool:
    """Return True for a layer behind the body that does not classify, by its name."""
    return OTHER_TASK.search(apart(layer, prefix)) is not None


def beside(layer: str, prefix: str, paths: Iterable[str]) -> list[str]:
    """Return those of the paths that are in the same module as a layer: in the outermost one that holds the layer, and
    not the body behind `prefix`."""
    owner = layer.removesuffix(apart(layer, prefix)) + apart(layer, prefix).partition(".")[0] + "."
    return [
        path
        for path in paths
        if path.startswith(owner) and not path.endswith(DERIVED) and not re.search("loss|criterion", path)
    ]


def behind_prefixes(file: Flat) -> dict[str, list[str]]:
    """Return, by prefix ("" and each that ends with a dot), the paths of the learned tensors behind it, in order."""
    groups: dict[str, list[str]] = {}
    for path, tensor in file.tensors.items():
        if tensor.ndim == 0 or path.endswith(DERIVED):
            continue
        at = 0
        while True:
            groups.setdefault(path[:at], []).append(path)
            dot = path.find(".", at)
            if dot < 0:
                break
            at = dot + 1
    return groups


def _by_order(network: Template, file: Flat) -> list[Match]:
    """Return the places whose tensors are, one after the other, of the shapes of the network's.

    The order is the network's own, or that of its names, in which weights are that came out of a safetensors file.
    """
    if not file.ordered:
        return []
    orders = (network.required, sorted(network.required))
    found: dict[tuple[str, ...], Match] = {}
    for prefix, paths in behind_prefixes(file).items():
        order = next((order for order in orders if _same_places(network, order, paths, file)), None)
        if order is None:
            continue
        taken = set(paths)
        others = tuple(path for path in file.tensors if path not in taken and file.tensors[path].ndim)
        match = Match(
            prefix=prefix,
            state={name: file.tensors[path] for name, path in zip(order, paths, strict=True)},
            renamed=dict(zip(order, paths, strict=True)),
            ignored=tuple(path for path in others if not path.endswith(DERIVED)),
            by_order=True,
        )
        found[tuple(paths)] = match  # Of nested prefixes of the same tensors the longest.
    return list(found.values())


def _same_places(network: Template, order: Sequence[str], paths: Sequence[str], file: Flat) -> bool:
    return len(order) == len(paths) and all(
        _same_place(network, name, path, file) for name, path in zip(order, paths, strict=True)
    )


def _same_place(network: Template, name: str, path: str, file: Flat) -> bool:
    """Return True for tensors of one shape whose last names do not contradict each other."""
    if not compatible(network.shapes[name], file.tensors[path]):
        return False
    known = ("weight", "bias", "running_mean", "running_var")
    own, other = name.rpartition(".")[2], path.rpartition(".")[2]
    return own == other or own not in known or other not in known


# Choosing


def choose(matches: Sequence[Match], choice: Choice) -> tuple[Match, bool]:
    """Return the network that is meant, and True if averaged weights were taken without being asked for.

    Raises TeacherMismatch if that is not clear, or not possible.
    """
    meant = [one for one in matches if choice.part is None or _is_part(one.prefix, choice.part)]
    if not meant:
        raise TeacherMismatch(
            f"the file has no weights of this network under {choice.part!r}; it has them at {_listed(matches)}",
            hint=_ways(matches) if len(matches) > 1 else "leave out the part",
        )
    if choice.averaged is not None:
        kind_of_weights = "averaged" if choice.averaged else "raw"
        chosen = [one for one in meant if one.averaged == choice.averaged]
        if not chosen:
            raise TeacherMismatch(
                f"the file has no {kind_of_weights} weights of this network, only those at {_listed(meant)}",
                hint=f'"averaged": {"false" if choice.averaged else "true"}, or leave it out',
            )
        meant = chosen
    averaged = [one for one in meant if one.averaged]
    if len(averaged) == 1 and len(meant) == 2:
        return averaged[0], True
    if len(meant) > 1:
        raise TeacherMismatch(
            f"the file holds {len(meant)} networks of this architecture: {_listed(meant)}", hint=_ways(meant)
        )
    return meant[0], False


def _is_part(prefix: str, part: str) -> bool:
    """Return True if a prefix has this name or path; `.` is the file itself."""
    if not part.strip("."):
        return not prefix
    return f".{part.strip('.')}." in f".{prefix}"


def _listed(matches: Sequence[Match]) -> str:
    names = [one.label or "the top level" for one in matches]
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def _ways(matches: Sequence[Match]) -> str:
    """Return the values of `part` that choose each of them, each the last name that only one of them has."""
    words = []
    for one in matches:
        others = [other for other in matches if other is not one]
        own = [
            word
            for word in reversed(one.label.split("."))
            if word and not any(_is_part(o.prefix, word) for o in others)
        ]
        telling = [word for word in own if word not in SAYS_NOTHING]
        words.append((telling or own or [one.label])[0])
    ways = [f'"part": "{word}"' for word in islice((word for word in words if word), 4)]
    if sum(one.averaged for one in matches) == 1:
        ways.append('"averaged": true')
    return f"choose one: {' or '.join(ways)}"


# What is wrong


def faults(network: Template, match: Match, file: Flat) -> str:
    """Return what is wrong with a match, in words; "" if nothing is."""
    found = []
    behind = f" (behind {match.prefix!r})" if match.prefix else ""
    if match.missing:
        found.append(f"{_of(match.missing, len(network.shapes))} missing, first {match.missing[0]}{behind}")
        at = match.prefix + match.missing[0]
        if at in file.others:
            found.append(f"its entry {at!r} is {file.others[at]}")
    if match.unexpected:
        found.append(
            f"{_of(match.unexpected, len(match.state) + len(match.unexpected))} unexpected, first {match.unexpected[0]}"
        )
    if match.misshapen:
        name = match.misshapen[0]
        shapes = f"{in_words(match.state[name].shape)} in the file, {in_words(network.shapes[name])} in the network"
        found.append(f"{_of(match.misshapen, len(network.shapes))} of another shape, first {name}: {shapes}")
    return "; ".join(found)


def quantised(network: Template, match: Match, file: Flat) -> str | None:
    """Return a sign of quantised weights; None if there is none."""
    for name in network.floating:
        tensor = match.state.get(name)
        if tensor is not None and (
            tensor.is_quantized or not tensor.is_floating_point() or tensor.dtype in QUANTISED_TYPES
        ):
            return f"{name} is {tensor.dtype}"
    signs = [path for path in (*file.tensors, *file.others) if path.endswith(QUANTISED)]
    return f"it has {signs[0]}" if signs and not match.fits else None


def _of(names: Sequence[str], among: int) -> str:
    return f"{len(names)} of {among} keys {'is' if len(names) == 1 else 'are'}"


def in_words(shape: Sequence[int]) -> str:
    words = {CLASSES: "classes", CHANNELS: "channels"}
    return " x ".join(words.get(size, str(size)) for size in shape) or "a single number"


def learned(state: Mapping[str, Tensor]) -> int:
    """Return the number of learned values, as far as names and shapes tell it: without batch-norm statistics."""
    return sum(
        math.prod(value.shape)
        for name, value in state.items()
        if not name.endswith(("running_mean", "running_var", *DERIVED))
    )


def within(file: Flat, prefix: str) -> dict[str, Tensor]:
    """Return the tensors behind a prefix."""
    return {path.removeprefix(prefix): value for path, value in file.tensors.items() if path.startswith(prefix)}


def converted(network: Template, match: Match) -> Match:
    """Return a match whose numbers are of the network's precision: files may hold half precision."""
    state = {
        name: value.float() if name in network.floating and value.is_floating_point() else value
        for name, value in match.state.items()
    }
    return replace(match, state=state)
