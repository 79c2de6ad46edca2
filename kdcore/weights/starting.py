"""The weights from which a student starts: what of a checkpoint its network takes over, and what of it is frozen.

    inspect              the facts, of a file
    inspect_named        the same of the student of a job that has not ended: there is no file yet
    inspect_published    the same of published weights, which are not downloaded
    open_start           facts and tensors of a job's student
    freeze               modules that are not trained

A parameter or statistic is taken if the checkpoint has one of the same name and shape; the classifier also needs
classes of the same names (`spec.fitting.keeps_classifier`), and is then brought into the order of the data's classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

from base.errors import TeacherMismatch
from base.files import sha256_of
from kdcore.catalog import ARCHITECTURES, DatasetFacts, NamedStartFacts, PublishedFacts, StartFacts
from kdcore.catalog.facts import Loading
from kdcore.models.networks import skeleton
from kdcore.spec import Student
from kdcore.spec.classes import class_order
from kdcore.spec.fitting import fresh_parameters, keeps_classifier
from kdcore.spec.inputs import EVERYTHING_ELSE
from kdcore.weights import loading, published
from kdcore.weights.names import ANY, AUXILIARY_HEADS, DERIVED, Choice

F = TypeVar("F", bound=StartFacts)


@dataclass(frozen=True)
class Start:
    """What a student starts from. `state` is None in a resumed job in which all trials with this student have ended:
    the file is not read again."""

    facts: StartFacts
    fresh: frozenset[str]
    """Names of the parameters that start from random weights."""
    state: Mapping[str, Tensor] | None

    def without_state(self) -> Start:
        return Start(self.facts, self.fresh, None)

    def as_saved(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        state = None if self.state is None else dict(self.state)
        return {"facts": self.facts.model_dump(mode="json"), "fresh": sorted(self.fresh), "state": state}

    @classmethod
    def of_saved(cls, saved: Mapping[str, Any]) -> Start:
        return cls(StartFacts(**saved["facts"]), frozenset(saved["fresh"]), saved["state"])


@dataclass(frozen=True)
class _Given:
    """A checkpoint's tensors under the names of its network, and what its file or publisher says about it."""

    state: Mapping[str, Tensor]
    notes: Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """A student's network, as far as it decides what fits."""

    architecture: str
    num_classes: int
    channels: int
    freeze: tuple[str, ...] = ()

    def skeleton(self, more_classes: int = 0, more_channels: int = 0) -> nn.Module:
        """Return the network without memory."""
        return skeleton(self.architecture, self.num_classes + more_classes, self.channels + more_channels)


def inspect(path: Path, shape: Shape, choice: Choice = ANY) -> StartFacts:
    """Return what of a file a network can take over. Raises TeacherMismatch if the file is no checkpoint."""
    given, network = _of_file(path, shape.architecture, choice), shape.skeleton()
    _require_numbers(_fitting(given.state, network))
    return _facts(StartFacts, given.state, shape, network, given.notes)


def inspect_named(source: str, num_classes: int, channels: int, shape: Shape) -> NamedStartFacts:
    """Return what of weights of the architecture `source` a network can take over, when their file is not here yet."""
    return _of_network(source, num_classes, channels, shape, {})


def inspect_published(reference: str, shape: Shape) -> NamedStartFacts:
    """Return what of published weights a network can take over. Raises SpecInvalid if there are none of that name."""
    facts = published.inspect(reference.removeprefix(published.PREFIX))
    return _of_network(facts.architecture, facts.num_classes, facts.channels, shape, _stated(facts))


def _of_network(
    source: str, num_classes: int, channels: int, shape: Shape, notes: Mapping[str, Any]
) -> NamedStartFacts:
    given, network = skeleton(source, num_classes, channels).state_dict(), shape.skeleton()
    left_out = _of_another_network(given, network, shape)
    return _facts(NamedStartFacts, given, shape, network, {**notes, "loading": left_out})


def _of_another_network(given: Mapping[str, Tensor], network: nn.Module, shape: Shape) -> Loading | None:
    """Return what is left out of another network's weights, outside of its classifier; None if nothing is."""
    own = network.state_dict()
    heads = tuple(f"{name.partition('.')[0]}." for name in _classifier(network, shape))
    apart = (*heads, *AUXILIARY_HEADS)
    rest = [name for name in given if name not in own and not name.startswith(apart) and not name.endswith(DERIVED)]
    if not rest:
        return None
    return Loading(tensors=len(_fitting(given, network)), ignored=len(rest), ignored_names=rest[: loading.NAMED])


def _require_numbers(state: Mapping[str, Tensor]) -> None:
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise TeacherMismatch(
                f"the checkpoint's {name} holds values that are no numbers (NaN or infinite)", hint=loading.NO_NUMBERS
            )


def open_start(student: Student, dataset: DatasetFacts, path: Path | None, cache: Path) -> Start:
    """Read the checkpoint of a student. `path`: its file; None for published weights, which are fetched into `cache`.

    The state has only the tensors that are taken. Raises TeacherMismatch, WeightsUnavailable or SpecInvalid.
    """
    assert student.checkpoint is not None, "the student starts from a checkpoint"
    choice = Choice(student.part, student.averaged)
    given = _of_published(student.checkpoint, cache) if path is None else _of_file(path, student.architecture, choice)
    shape = Shape(student.architecture, dataset.num_classes, dataset.channels, student.freeze)
    network = shape.skeleton()
    facts = _facts(StartFacts, given.state, shape, network, given.notes)
    fresh = frozenset(fresh_parameters(student, facts, dataset))
    names = student.class_names or facts.class_names
    kept = keeps_classifier(student, facts, dataset)
    order = class_order(names, dataset) if kept else None
    fitting = _fitting(given.state, network)
    state = {name: value.detach().clone() for name, value in fitting.items() if name not in fresh}
    if order is not None:
        for name, dimension in _classifier(network, shape).items():
            if name in state:
                state[name] = state[name][(slice(None),) * dimension + (list(order),)]
    _require_numbers(state)
    return Start(facts, fresh, state)


def _of_file(path: Path, architecture: str, choice: Choice) -> _Given:
    start = loading.opened_start(path, architecture, choice)
    notes = start.notes
    if notes.members > 1:
        raise TeacherMismatch(
            f"the file holds an ensemble of {notes.members} networks, not one",
            hint="a job of born_again whose answer is 'last' exports one",
        )
    kept = ("mean", "std", "class_names")
    stated = {name: getattr(notes, name) for name in kept}
    return _Given(start.state, {**stated, "digest": _digest(path), "loading": start.loading})


def _of_published(reference: str, cache: Path) -> _Given:
    found = published.find(reference.removeprefix(published.PREFIX))
    path = published.fetch(found, cache)
    return _Given(published.state(found, path), {**_stated(found.facts), "digest": _digest(path)})


def _stated(facts: PublishedFacts) -> dict[str, Any]:
    return {"mean": facts.mean, "std": facts.std, "class_names": facts.class_names}


def _digest(path: Path) -> str:
    return f"sha256:{sha256_of(path)}"


def _facts(kind: type[F], given: Mapping[str, Tensor], shape: Shape, network: nn.Module, notes: Mapping[str, Any]) -> F:
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    classifier, stem = _classifier(network, shape), _stem(network, shape)
    taken = [name for name in _fitting(given, network) if name in sizes]
    frozen, unknown = _frozen_parameters(network, shape, classifier)
    in_classifier = [name for name in sizes if name in classifier]
    return kind(
        **notes,
        num_classes=_count(given, network, classifier),
        channels=_count(given, network, stem),
        parameters=sum(sizes.values()),
        taken=sum(sizes[name] for name in taken),
        classifier_taken=sum(sizes[name] for name in taken if name in classifier),
        fresh=[name for name in sizes if name not in taken],
        classifier=in_classifier,
        frozen=sum(sizes[name] for name in frozen),
        frozen_classifier=sum(sizes[name] for name in frozen if name in classifier),
        frozen_fresh=[name for name in frozen if name not in taken],
        unknown_modules=unknown,
    )


def _fitting(given: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a network has under the same name, in the same shape; numbers for numbers."""
    return {
        name: given[name]
        for name, value in network.state_dict().items()
        if name in given
        and given[name].shape == value.shape
        and given[name].is_floating_point() == value.is_floating_point()
    }


def _classifier(network: nn.Module, shape: Shape) -> dict[str, int]:
    """Return the tensors whose shape depends on the number of classes, each with the dimension that does."""
    return dict(_differing(network.state_dict(), shape.skeleton(more_classes=1).state_dict()))


def _stem(network: nn.Module, shape: Shape) -> dict[str, int]:
    """Return the tensors whose shape depends on the number of channels, each with the dimension that does.

    Of a network that takes three channels only, that is its first convolution.
    """
    own = network.state_dict()
    if shape.architecture in ARCHITECTURES and ARCHITECTURES[shape.architecture].channels == 3:
        return {name: 1 for name, value in own.items() if value.ndim == 4 and value.shape[1] == 3}
    return dict(_differing(own, shape.skeleton(more_channels=1).state_dict()))


def _differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
    for name, value in one.items():
        for dimension, (here, there) in enumerate(zip(value.shape, other[name].shape, strict=True)):
            if here != there:
                yield name, dimension


def _count(given: Mapping[str, Tensor], network: nn.Module, places: Mapping[str, int]) -> int | None:
    """Return the size that a checkpoint has at one of these places; None if it has no tensor of such a shape there."""
    own = network.state_dict()
    for name, dimension in places.items():
        if name in given and given[name].ndim == own[name].ndim:
            mine, theirs = list(own[name].shape), list(given[name].shape)
            count = theirs.pop(dimension)
            del mine[dimension]
            if mine == theirs:
                return count
    return None


def freeze(network: nn.Module, shape: Shape) -> None:
    """Freeze modules for good: their parameters get no gradient, and they stay in eval mode, with the statistics and
    without the dropout of the checkpoint. The paths are the network's own."""
    if not shape.freeze:
        return
    classifier = _classifier(network, shape) if EVERYTHING_ELSE in shape.freeze else {}
    paths = [path for path in shape.freeze if path != EVERYTHING_ELSE]
    if EVERYTHING_ELSE in shape.freeze:
        paths += _outside(network, "", classifier)
    for path in paths:
        module = network.get_submodule(path)
        # Set on the module itself: a scheme may build the network's modules into another one, and train that.
        module.train = MethodType(_stay_in_eval, module)  # type: ignore[method-assign]
        module.train()
    names, _ = _frozen_parameters(network, shape, classifier)
    for name, parameter in network.named_parameters():
        if name in names:
            parameter.requires_grad_(False)


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


def _frozen_parameters(
    network: nn.Module, shape: Shape, classifier: Mapping[str, int]
) -> tuple[list[str], dict[str, list[str]]]:
    """Return the names of the frozen parameters, and the paths that the network does not have, each with similar
    ones."""
    modules = dict(network.named_modules())
    paths = [path for path in shape.freeze if path != EVERYTHING_ELSE]
    unknown = {path: get_close_matches(path, modules, n=3) for path in paths if path not in modules}
    body = EVERYTHING_ELSE in shape.freeze
    names = [
        name
        for name, _ in network.named_parameters()
        if (body and name not in classifier) or any(path in modules and name.startswith(f"{path}.") for path in paths)
    ]
    return names, unknown


def _outside(network: nn.Module, path: str, classifier: Mapping[str, int]) -> list[str]:
    """Return the paths of the largest modules without a parameter of the classifier."""
    prefix = f"{path}." if path else ""
    if path and not any(name.startswith(prefix) for name in classifier):
        return [path]
    children = network.get_submodule(path).named_children()
    return [found for name, _ in children for found in _outside(network, f"{prefix}{name}", classifier)]
