"""Checkpoints from any source: read without running their code, and fitted to a network.

    open_teacher  a state under the network's names, with facts: classes, channels, how it was loaded
    inspect       the facts only
    opened_start  as much of a file as fits a network, to start a training from
    load_into     a state into a network, or an error that names the keys

`content` reads a file; `names`, `dialects`, `heads` and `finding` say which of its tensors is which of the network's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from base.errors import SpecInvalid, TeacherMismatch
from base.files import sha256_of
from kdcore.catalog.architectures import UnknownName, hidden_layers
from kdcore.catalog.facts import Loading, ModelFacts
from kdcore.models.networks import skeleton
from kdcore.protocol import NOTHING_KNOWN, KnownBefore
from kdcore.spec import Teacher
from kdcore.spec.fitting import preprocessing_fault
from kdcore.weights import finding, heads, names
from kdcore.weights.content import Content, read_content
from kdcore.weights.names import ANY, Choice, Flat, Match

NO_NUMBERS = "its training diverged, or half precision overflowed: give an earlier checkpoint"
NAMED = 10
"""The number of names that an answer lists of each kind."""


class Notes(BaseModel):
    """The part of an export's notes that a teacher needs; all None for files that this project did not export."""

    architecture: str | None = None
    members: int = 1
    mean: list[float] | None = None
    std: list[float] | None = None
    class_names: list[str] | None = None
    image_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class TeacherFile:
    """A checkpoint that fits its architecture, under the network's names and in float32."""

    facts: ModelFacts
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Start:
    """What a file has of a network: the tensors of the same name and shape. The classifier may be of other classes."""

    state: dict[str, Tensor]
    loading: Loading
    notes: Notes
    missing: tuple[str, ...]
    """Names of the network that the file lacks, or has in another shape."""


def chosen(spec: Teacher, known: KnownBefore) -> Choice:
    """Return which weights of a checkpoint the spec of a teacher means.

    A service writes its choice into every spec that it accepts. One without it was accepted, or its model registered,
    by a version that took the raw weights of a file that has both; so it still means them.
    """
    is_accepted = known is not NOTHING_KNOWN
    return Choice(spec.part, False if spec.averaged is None and is_accepted else spec.averaged)


def inspect(path: Path, architecture: str | None, channels: int | None = None, choice: Choice = ANY) -> ModelFacts:
    """Return the facts of a checkpoint's network. Raises TeacherMismatch if it cannot be used."""
    return open_teacher(path, architecture, channels, choice).facts


def open_teacher(
    path: Path, architecture: str | None, channels: int | None = None, choice: Choice = ANY
) -> TeacherFile:
    """Read a checkpoint and fit it to its architecture: the one that is given, or that the file notes (this project's
    exports do), or the only one of these names and shapes.

    The class count comes from the classifier's shape, the channels from the stem's; `channels` is only compared.
    """
    content = read_content(path)
    notes = _notes(content)
    if notes.members > 1:
        raise TeacherMismatch(
            f"the file holds an ensemble of {notes.members} networks, not one",
            hint="a job of born_again whose answer is 'last' exports one; several teachers are named one by one",
        )
    file = names.flat(content)
    name, similar = architecture or notes.architecture, None
    if name is None:
        name, similar = finding.architecture_of(file, content)
    fitted = _fitted_file(name, file, choice)
    loading = fitted.loading
    if similar is not None:
        loading = loading.model_copy(update={"architecture_found": True, "similar": similar})
    facts = ModelFacts(
        **_measure(fitted.architecture, fitted.state),
        bytes=path.stat().st_size,
        format=content.format,
        mean=notes.mean,
        std=notes.std,
        class_names=notes.class_names,
        image_size=notes.image_size,
        digest=f"sha256:{sha256_of(path)}",
        loading=loading,
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
    fault = preprocessing_fault(facts.mean, facts.std)
    if fault is not None:
        raise TeacherMismatch(f"the mean and std that the file notes cannot be used: {fault}")
    return TeacherFile(facts, fitted.state)


def opened_start(path: Path, architecture: str, choice: Choice = ANY) -> Start:
    """Return as much of a file as fits an architecture by name and shape, whatever its classes and channels.

    Raises TeacherMismatch if the file cannot be read, holds several such networks, or nothing that fits.
    """
    content = read_content(path)
    file, network = names.flat(content), names.template(architecture)
    if names.candidates(network, file):
        fitted = _fitted_file(architecture, file, choice)
        return Start(fitted.state, fitted.loading, _notes(content), ())
    match = names.nearest(network, file, choice.part)
    wrong = set(match.misshapen)
    state = {name: value for name, value in match.state.items() if name not in wrong}
    if not any(name in state for name in network.required):
        raise TeacherMismatch(
            f"nothing in the checkpoint fits {architecture}", hint=finding.likely_hint(file, architecture)
        )
    missing = tuple(name for name in network.required if name not in state)
    # A deeper network has all that this one has; another classifier than this one's is no news.
    head_modules = tuple(f"{name.partition('.')[0]}." for name in network.head)
    deeper = (f"{match.prefix}{name}" for name in match.unexpected if not name.startswith(head_modules))
    match = replace(match, ignored=(*match.ignored, *deeper))
    match = names.converted(network, replace(match, state=state))
    loading = _loading(match, file, [match], False).model_copy(update={"missing": len(missing)})
    return Start(dict(match.state), loading, _notes(content), missing)


def _notes(content: Content) -> Notes:
    try:
        return Notes.model_validate_json(content.metadata.get("distillery", "{}"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "/".join(map(str, first["loc"])) or "the whole"
        raise TeacherMismatch(f"the file's notes about itself cannot be read: {place}: {first['msg']}") from error


@dataclass(frozen=True)
class _Fitted:
    architecture: str
    """With the hidden layers of its classifier, if the file has some."""
    state: dict[str, Tensor]
    loading: Loading


def _fitted_file(architecture: str, file: Flat, choice: Choice) -> _Fitted:
    """Return the state of a file that fits an architecture. Raises TeacherMismatch if none does, or several do."""
    try:
        bare, given_layers = hidden_layers(architecture)
    except UnknownName as unknown:
        raise SpecInvalid(str(unknown)) from unknown
    deep = list(heads.deep_heads(names.template(bare), file))
    assumed = None
    if deep and not given_layers:
        architecture += deep[0].suffix
        assumed = heads.ASSUMED if deep[0].is_assumed else None
    network = names.template(architecture)
    matches = names.candidates(network, file, [one.renamed for one in deep])
    match, by_default = names.choose(matches, choice) if matches else (names.nearest(network, file, choice.part), False)
    if sign := names.quantised(network, match, file):
        raise TeacherMismatch(
            f"the checkpoint's weights are quantised: {sign}",
            hint="give the weights from before the quantisation, in float32, float16 or bfloat16",
        )
    if not match.fits:
        raise TeacherMismatch(
            f"the checkpoint does not fit {architecture}: {names.faults(network, match, file)}",
            hint=finding.hint_for(network, match, file),
        )
    loading = _loading(match, file, matches, by_default).model_copy(update={"activation_guessed": assumed})
    return _Fitted(architecture, dict(names.converted(network, match).state), loading)


def _loading(match: Match, file: Flat, matches: list[Match], by_default: bool) -> Loading:
    """Return the record of how a match was loaded. Other networks of the file are no left-overs."""
    others = [one.prefix for one in matches if one is not match and one.prefix]
    ignored = [path for path in match.ignored if not path.startswith(tuple(others))]
    # Averages in a list (torch-ema's shadow_params) have no names by which they could be loaded.
    ignored += [path for path, kind in file.others.items() if names.NAMELESS in kind and names.AVERAGED.search(path)]
    several = len(matches) > 1
    precisions = sorted(
        {str(value.dtype).removeprefix("torch.") for value in match.state.values() if value.is_floating_point()}
    )
    return Loading(
        tensors=len(match.state),
        removed=[*([match.prefix] if match.prefix else []), *file.unwrapped],
        part=(match.label or ".") if several else None,
        averaged=match.averaged if several or match.averaged else None,
        averaged_by_default=by_default,
        mapped=len(match.renamed),
        mapped_names=dict(list(match.renamed.items())[:NAMED]),
        by_order=match.by_order,
        ignored=len(ignored),
        ignored_names=ignored[:NAMED],
        precision=", ".join(precisions),
    )


def load_into(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy a state into a network. Raises TeacherMismatch, naming the first keys that do not fit."""
    model.load_state_dict(_complete(model.state_dict(), state, what))


def _measure(architecture: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return classes, channels and parameters, from the shapes of a state that fits."""
    known = names.template(architecture)
    num_classes = names.count(known, state, names.CLASSES)
    channels = 3 if names.takes_three_channels_only(architecture) else names.count(known, state, names.CHANNELS)
    if num_classes is None or channels is None:
        raise TeacherMismatch(f"{architecture} is no network whose classes and channels its weights tell")
    if num_classes < 1:
        raise TeacherMismatch("the checkpoint's classifier has no classes", hint="give the weights after its training")
    network = skeleton(architecture, num_classes, channels)
    _complete(network.state_dict(), state, f"the checkpoint does not fit {architecture}")
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise TeacherMismatch(
                f"the checkpoint's {name} holds values that are no numbers (NaN or infinite)",
                hint=NO_NUMBERS,
            )
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"architecture": architecture, "num_classes": num_classes, "channels": channels, "parameters": parameters}


def _complete(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return a state with the network's own buffers where it has none. Raises TeacherMismatch if it does not fit."""
    given = {
        name: value for name, value in state.items() if name in expected or not name.startswith(names.AUXILIARY_HEADS)
    }
    network = names.Template(what, {name: tuple(value.shape) for name, value in expected.items()}, frozenset())
    match = Match(
        prefix="",
        state={name: value for name, value in given.items() if name in expected},
        renamed={},
        unexpected=tuple(name for name in given if name not in expected and not name.endswith(names.DERIVED)),
        missing=tuple(name for name in network.required if name not in given),
        misshapen=tuple(name for name in expected if name in given and given[name].shape != expected[name].shape),
    )
    if not match.fits:
        raise TeacherMismatch(f"{what}: {names.faults(network, match, Flat(given, True))}")
    return {name: given.get(name, value) for name, value in expected.items()}
