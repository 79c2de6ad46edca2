"""Classifiers of several layers: found in a file by their shapes, and named as part of the architecture.

People replace a network's classifier by a sequence, such as linear, ReLU, dropout, linear. The shapes of the file say
how many units the hidden layers have; its names may say if there was something between two of them; nothing says
which activation it was.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from kdcore.catalog.architectures import HiddenLayer
from kdcore.weights.dialects import Renamed, dialects
from kdcore.weights.names import CLASSES, HEAD_WORDS, Flat, Template, beside, body_prefixes, is_of_other_task

ASSUMED = "relu"


@dataclass(frozen=True)
class Deep:
    """A file whose classifier has hidden layers."""

    layers: tuple[HiddenLayer, ...]
    renamed: Renamed
    """The file's tensors; those of the classifier have the names that they have in the network here."""

    @property
    def suffix(self) -> str:
        return "".join(layer.suffix for layer in self.layers)

    @property
    def is_assumed(self) -> bool:
        return any(layer.activation == ASSUMED for layer in self.layers)


def deep_heads(network: Template, file: Flat) -> Iterator[Deep]:
    """Yield the classifiers of several layers that stand behind a complete body of the network."""
    own = [name.removesuffix(".weight") for name in network.head if name.endswith(".weight")]
    if len(own) != 1 or len(network.shapes[f"{own[0]}.weight"]) != 2:
        return
    (path,) = own
    for renamed in dialects(network.shapes, file.tensors):
        for prefix in body_prefixes(network, renamed):
            behind = {name for name in renamed.tensors if name.startswith(prefix)}
            body = {f"{prefix}{name}" for name in network.shapes if CLASSES not in network.shapes[name]}
            for scope in (behind - body, renamed.tensors.keys() - body):
                rest = {name: tensor for name, tensor in renamed.tensors.items() if name in scope}
                chain = _chain(rest, f"{prefix}{path}", network.shapes[f"{path}.weight"][1])
                if len(chain) > 1:
                    deep, places = _deep(renamed, rest, chain, f"{prefix}{path}")
                    # With more weights in its module it is another function: a projection, a learned activation.
                    others = beside(chain[0], prefix, rest.keys() - places)
                    if not others and not any(is_of_other_task(layer, prefix) for layer in chain):
                        yield deep
                    break


def _chain(rest: Mapping[str, Tensor], head: str, width: int) -> list[str]:
    """Return the linear layers that follow each other from a body of this width, as module paths."""
    layers = {
        name.removesuffix(".weight"): tensor
        for name, tensor in rest.items()
        if name.endswith(".weight") and tensor.ndim == 2 and f"{name.removesuffix('.weight')}.bias" in rest
    }
    chain: list[str] = []
    while True:
        following = [name for name, tensor in layers.items() if tensor.shape[1] == width and name not in chain]
        if len(following) > 1:
            if chain:
                near = [name for name in following if name.rpartition(".")[0] == chain[-1].rpartition(".")[0]]
                following = near[:1]
            else:
                named = [name for name in following if name == head or name.startswith(f"{head}.")]
                named = named or [name for name in following if set(name.split(".")[-3:]) & set(HEAD_WORDS)]
                # Of two layers of the same width the first is the hidden one.
                following = named[:1]
        if not following:
            return chain
        chain += following
        width = layers[following[0]].shape[0]


def _deep(renamed: Renamed, rest: Mapping[str, Tensor], chain: list[str], head: str) -> tuple[Deep, set[str]]:
    """Return a classifier of several layers, and the tensors of which it consists."""
    layers: list[HiddenLayer] = []
    new: dict[str, str] = {}
    order, at = list(rest), 0
    for name, following in zip(chain, [*chain[1:], None], strict=True):
        units = rest[f"{name}.weight"].shape[0]
        new |= {f"{name}.{leaf}": f"{head}.{at}.{leaf}" for leaf in ("weight", "bias")}
        at += 1
        if following is None:
            break
        between = order[order.index(f"{name}.bias") + 1 : order.index(f"{following}.weight")]
        norm = next(
            (
                path.removesuffix(".running_mean")
                for path in (between or order)
                if path.endswith(".running_mean") and rest[path].shape[0] == units
            ),
            None,
        )
        if norm is not None:
            leaves = [path.removeprefix(f"{norm}.") for path in rest if path.startswith(f"{norm}.")]
            new |= {f"{norm}.{leaf}": f"{head}.{at}.{leaf}" for leaf in leaves}
            at += 1
        activation = "linear" if _adjacent(name, following, norm is not None) else ASSUMED
        at += activation != "linear"
        layers.append(HiddenLayer(units, activation, norm is not None))
    tensors: dict[str, Tensor] = {}
    origins = dict(renamed.origins)
    for path, tensor in renamed.tensors.items():
        name = new.get(path, path)
        tensors[name] = tensor
        if name != path:
            origins[name] = renamed.origin(path)
    return Deep(tuple(layers), Renamed(tensors, origins)), set(new)


def _adjacent(one: str, other: str, norm_between: bool) -> bool:
    """Return True if the numbers in two names of one sequence leave no place for an activation between them."""
    (parent, _, first), (other_parent, _, second) = one.rpartition("."), other.rpartition(".")
    if parent != other_parent or not (first.isdigit() and second.isdigit()):
        return False
    return int(second) - int(first) - 1 - norm_between < 1
