"""The architecture of a checkpoint that does not name it: found by sizes, confirmed by names and shapes.

The catalogue knows how many learned values each network has, for any classes and channels; timm's are in
`timm_parameters.json`. Only the few networks of the right size are built.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files

from torch import Tensor

from base.errors import EngineError, TeacherMismatch
from kdcore.catalog.architectures import ARCHITECTURES
from kdcore.weights import heads, names
from kdcore.weights.content import Content
from kdcore.weights.names import Flat, Match, Template

MOST_BUILT = 8
"""The number of networks of one library that are built to be compared."""
FEWEST = 4
"""Tensors of the smallest network."""
MOST_GROUPS = 60
PROGRAM = "give it as a program: torch.export.save(...), a .pt2 file, or an ONNX model"
NAME_IT = (
    "name the architecture: GET /v1/architectures lists them, and timm/<name> is any of timm's. A network that is none "
    f"of them can teach: {PROGRAM}"
)
CHANGED: Sequence[tuple[re.Pattern[str], str]] = (
    (
        re.compile(r"\.parametrizations\.|\.weight_[gv]$"),
        "take it off before saving: torch.nn.utils.parametrize.remove_parametrizations (or remove_weight_norm)",
    ),
    (re.compile(r"\.weight_(orig|mask)$"), "make it permanent before saving: torch.nn.utils.prune.remove"),
    (re.compile(r"\.lora_\w+(\.|$)"), "merge the adapters into the weights before saving: merge_and_unload()"),
)
"""Signs of weights that are computed from others, and what undoes that."""


def architecture_of(file: Flat, content: Content) -> tuple[str, list[str]]:
    """Return the architecture whose names and shapes a file has, and others that have the same.

    The library's networks come after our own, and timm's after torchvision's: those of the same names and shapes
    usually compute the same. Raises TeacherMismatch if none is found, or several of one library.
    """
    noted = [name for name in _noted(content) if _fits(name, file)]
    found = [name for name in dict.fromkeys(noted or _of_the_size(file)) if noted or _fits(name, file)]
    for belongs in (lambda name: "/" not in name, lambda name: name.startswith("torchvision/"), lambda _name: True):
        first = [name for name in found if belongs(name)]
        if len(first) == 1:
            return first[0], [name for name in found if name != first[0]][:MOST_BUILT]
        if first:
            raise TeacherMismatch(
                f"the checkpoint does not say its architecture, and several have its names and shapes: {_or(first)}",
                hint="name the one that it is: architecture",
            )
    sized = list(_of_the_size(file))
    raise TeacherMismatch(
        "the checkpoint does not say its architecture, and its names are those of no network that is known here",
        hint=f"its size is that of {_or(sized)}: name it, if it is" if sized else NAME_IT,
    )


def hint_for(network: Template, match: Match, file: Flat) -> str | None:
    """Return what would help a file whose nearest match does not fit."""
    lacking = tuple(f"{match.prefix}{name.rpartition('.')[0]}." for name in match.missing)
    for sign, way in CHANGED:
        changed = next((path for path in file.tensors if sign.search(path)), None)
        if changed is not None and (changed.startswith(lacking) or ".lora_" in changed):
            return f"its {changed} is a part of a weight: {way}"
    if match.missing and "layout" in file.others.get(match.prefix + match.missing[0], ""):
        return "save it as a dense tensor: tensor.to_dense()"
    if match.missing and set(match.missing) <= set(network.head) and not match.misshapen:
        return _hint_for_head(network, match, file)
    bare = network.architecture.partition("+")[0]
    elsewhere = f"timm/{bare.removeprefix('torchvision/')}"
    if match.misshapen and not match.missing and elsewhere != bare and _fits(elsewhere, file):
        return f"its names and shapes are those of {elsewhere}, which also takes images of other than 3 channels"
    return likely_hint(file, network.architecture)


def _hint_for_head(network: Template, match: Match, file: Flat) -> str:
    """Return what would help a file that has a network's body, but not its classifier."""
    if len(match.missing) < len(network.head):
        name = match.missing[0]
        zeros = f"state[{match.prefix + name!r}] = torch.zeros(number of classes)"
        return f"if its classifier has no bias, add one before saving: {zeros}" if name.endswith(".bias") else PROGRAM
    taken = {f"{match.prefix}{name}" for name in match.state}
    layers = [
        layer
        for layer, own in names.layers_like_head(network, network.head, file.tensors, taken).items()
        if not names.is_of_other_task(layer, match.prefix)
        and not names.beside(layer, match.prefix, set(file.tensors) - taken - set(own.values()))
    ]
    head = network.head[0].rpartition(".")[0]
    if match.unexpected:
        return f"its classifier is of a kind that is not built here (it has {match.unexpected[0]}): {PROGRAM}"
    if len(layers) > 1:
        return f"{_or(sorted(layers))} could be its classifier: save the file with one of them, named {head}"
    return (
        "the file has no classifier. A student can start from it (student.checkpoint). To teach, the network needs "
        f"one, named {head}"
    )


def likely_hint(file: Flat, asked: str) -> str | None:
    """Return what a file probably is that does not fit the architecture asked for."""
    bare = asked.partition("+")[0]
    sized = list(_of_the_size(file))
    others = [name for name in sized if name != bare]
    if bare in sized:
        named = [name for name in others if _fits(name, file)]
        if named:
            return f"its names and shapes are those of {_or(named)}"
        return (
            f"its size is that of {bare}, but names and order are those of another implementation: save the weights "
            "under the names that the network has here, or give the network as a program (torch.export.save)"
        )
    if not others:
        return f"if the network is another one, {PROGRAM}"
    total = _total(file, others[0])
    return f"its {total:,} parameters are those of {_or(others)}"


def _or(found: Iterable[str]) -> str:
    shown = list(dict.fromkeys(found))
    return " or ".join(shown[:4]) + (f" or {len(shown) - 4} more" if len(shown) > 4 else "")


def _fits(name: str, file: Flat) -> bool:
    try:
        network = names.template(name)
        matches = names.candidates(network, file)
        for deep in heads.deep_heads(network, file):
            matches += names.candidates(names.template(f"{name}{deep.suffix}"), file, [deep.renamed])
    except EngineError:
        return False
    return any(not one.by_order for one in matches)


def _noted(content: Content) -> Iterator[str]:
    """Yield what a training script noted as its network: timm's has `arch`."""
    if content.format != "pytorch":
        return
    for key in ("arch", "architecture", "model_name"):
        noted = dict.get(content.value, key) if isinstance(content.value, dict) else None
        if isinstance(noted, str) and noted.replace("_", "").replace(".", "").isalnum() and len(noted) < 80:
            yield from (noted, f"timm/{noted}", f"torchvision/{noted}")


def _of_the_size(file: Flat) -> Iterator[str]:
    """Yield the architectures that have as many learned values as the file, or as a part of it."""
    return (name for name, _total_values in _sizes(file))


def _total(file: Flat, name: str) -> int:
    return next(total for found, total in _sizes(file) if found == name)


def _sizes(file: Flat) -> Iterator[tuple[str, int]]:
    seen: set[str] = set()
    for state in _groups(file):
        total = names.learned(state)
        for name in _named_by_size(state, total):
            if name not in seen:
                seen.add(name)
                yield name, total


def _groups(file: Flat) -> Iterator[Mapping[str, Tensor]]:
    """Yield the tensors of the file, and those behind each prefix of several, the largest first."""
    distinct = dict.fromkeys(tuple(paths) for paths in names.behind_prefixes(file).values() if len(paths) >= FEWEST)
    for paths in sorted(distinct, key=len, reverse=True)[:MOST_GROUPS]:
        yield {path: file.tensors[path] for path in paths}


def _named_by_size(state: Mapping[str, Tensor], total: int) -> Iterator[str]:
    # Without any, the body alone is compared.
    classifiers = {tuple(value.shape) for value in state.values() if value.ndim == 2} or {(0, 0)}
    stems = {value.shape[1] for value in state.values() if value.ndim == 4 and value.shape[1] <= 16}
    linear = sum(value.numel() for name, value in state.items() if _is_linear(name, state))
    for name, facts in ARCHITECTURES.items():
        body, stem = facts.body_parameters, facts.stem_parameters_per_channel
        if any(
            (facts.embedding_width == width and facts.parameters(classes, channels) == total)
            or (body is not None and stem is not None and body + stem * channels == total - linear)
            for classes, width in classifiers
            for channels in stems
        ):
            yield name
    by_size, built = _timm_sizes(), 0
    for classes, width in sorted(classifiers):
        for each_class in (width + 1, width):
            for name in by_size.get((total - classes * each_class, each_class), ()):
                if built < MOST_BUILT:
                    built += 1
                    yield f"timm/{name}"


def _is_linear(name: str, state: Mapping[str, Tensor]) -> bool:
    """Return True for the weight or bias of a linear layer."""
    weight = state.get(f"{name.rpartition('.')[0]}.weight")
    return weight is not None and weight.ndim == 2 and name.endswith((".weight", ".bias"))


@cache
def _timm_sizes() -> dict[tuple[int, int], list[str]]:
    """Return timm's networks by the learned values of their body, and those of the classifier for each class."""
    content = files("kdcore.catalog").joinpath("timm_parameters.json").read_text()
    sizes: dict[tuple[int, int], list[str]] = {}
    for name, (body, each_class) in json.loads(content).items():
        sizes.setdefault((body, each_class), []).append(name)
    return sizes
