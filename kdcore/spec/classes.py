"""The classes of a teacher beside those of the data: which of its outputs answer each class.

    as they are   output k is class k: the names are the same, or not known
    in order      the same names in another order (`class_order`)
    by a map      some outputs are dropped, several answer one class, or names differ (`teacher.class_map`)

A map is given by the spec, or found by the names if each class of the data has one output of its name. A resolved
spec has every map as numbers of outputs.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, cached_property
from typing import Literal

from base.errors import Fault
from kdcore.catalog import DatasetFacts, ModelFacts, imagenet
from kdcore.spec.inputs import ClassMap, Teacher, Unlabelled
from kdcore.spec.rules import Fields, each_method

Outputs = tuple[tuple[int, ...], ...]
"""For each class of the data, the teacher's outputs that answer it."""
FoundBy = Literal["given", "names", "imagenet", "imagenet's order"]
_IS_IMAGENET = 0.9
"""The part of a classifier's 1,000 names that must be ImageNet's at their place, so that the others are, too."""
_COMPARED, _TOLD = 5000, 20
"""The most names among which one that is nearly the same is looked for, and the most faults of one map."""
_NUMBERED = re.compile(r"(n\d{8})([_\- ].*)?")
"""A folder's name that begins with WordNet's number: `n02085620-Chihuahua`."""


@dataclass(frozen=True)
class Mapped:
    """The outputs that answer each class of the data, and how they were found."""

    outputs: Outputs
    by: FoundBy


class Names:
    """The names of a teacher's outputs, as they are found by a name: as it is, without regard to case and
    underscores, or by ImageNet's synonyms and WordNet's numbers."""

    def __init__(self, names: Sequence[str] | None, count: int) -> None:
        self.names, self.count = names, count
        self._exact = _places(names or ())
        self._plain = _places([_plain(name) for name in names or ()])

    def find(self, name: str) -> tuple[list[int], FoundBy]:
        """Return the outputs of a name: one, none, or several where the name says too little."""
        for places, key in ((self._exact, name), (self._plain, _plain(name))):
            if key in places:
                return places[key], "names"
        by: FoundBy = "imagenet" if self.names else "imagenet's order"
        return sorted({place for meant in _denoted(name) for place in self._by_imagenet.get(meant, ())}), by

    def nearest(self, name: str) -> list[str]:
        """Return the names that look most like one that is not found."""
        return _nearest(name, self.names or ())

    @cached_property
    def _by_imagenet(self) -> Mapping[int, Sequence[int]]:
        """The outputs that are each of ImageNet's classes."""
        own = [_denoted(name) for name in self.names or ()]
        if self.count == imagenet.CLASSES and imagenet.synonyms():
            fitting = sum(place in classes for place, classes in enumerate(own))
            if not own or fitting >= _IS_IMAGENET * imagenet.CLASSES:
                return {place: [place] for place in range(self.count)}
        found: dict[int, list[int]] = {}
        for place, classes in enumerate(own):
            for one in classes:
                found.setdefault(one, []).append(place)
        return found


def class_names(teacher: Teacher, facts: ModelFacts | None) -> list[str] | None:
    """Return the names of a teacher's classes in the order of its outputs: those of the spec, else the file's."""
    return list(teacher.class_names) if teacher.class_names else (facts.class_names if facts else None)


def class_order(names: Sequence[str] | None, dataset: DatasetFacts) -> tuple[int, ...] | None:
    """Return, for each class of the data, the output of the model that has its name.

    None if nothing has to be reordered: names are not known, are in the data's order, or are not the data's.
    """
    if not names or list(names) == dataset.class_names or not _same_names(names, dataset):
        return None
    places = {name: place for place, name in enumerate(names)}
    return tuple(places[name] for name in dataset.class_names)


def _same_names(names: Sequence[str], dataset: DatasetFacts) -> bool:
    return len(set(names)) == len(names) and set(names) == set(dataset.class_names)


def class_outputs(teacher: Teacher, facts: ModelFacts, dataset: DatasetFacts) -> Mapped | None:
    """Return the map of a teacher's outputs to the data's classes. None if there is none, because none is needed or
    none can be found: `class_faults` tells these apart."""
    if teacher.class_map is not None:
        outputs, faults = _given(teacher.class_map, teacher, facts, dataset, "")
        return None if faults else Mapped(outputs, "given")
    if _as_many(teacher, facts, dataset):
        return None
    names = class_names(teacher, facts)
    # Numbers as names say nothing: class 3 of one set is not class 3 of another.
    if all(name.strip().isdecimal() for name in dataset.class_names):
        return None
    known = Names(names, facts.num_classes)
    found = [known.find(name) for name in dataset.class_names]
    places = [place for outputs, _ in found for place in outputs]
    if any(len(outputs) != 1 for outputs, _ in found) or len(set(places)) < len(places):
        return None
    ways: tuple[FoundBy, ...] = ("imagenet's order", "imagenet")
    by: FoundBy = next((way for way in ways if any(way == own for _, own in found)), "names")
    return Mapped(tuple((place,) for place in places), by)


def _as_many(teacher: Teacher, facts: ModelFacts, dataset: DatasetFacts) -> bool:
    """Return True if the outputs are the data's classes: as many, and of the same names where both are known."""
    names = class_names(teacher, facts)
    if facts.num_classes != dataset.num_classes:
        return False
    return not names or not dataset.class_names or _same_names(names, dataset) or names == dataset.class_names


def answers_classes(teacher: Teacher, facts: ModelFacts, dataset: DatasetFacts) -> bool:
    """Return True if the teacher has an output for each class of the data. Without, its accuracy is not known."""
    if teacher.class_map is not None and not dataset.class_names:
        return True
    return class_outputs(teacher, facts, dataset) is not None or _as_many(teacher, facts, dataset)


def needs_classes(fields: Fields) -> bool:
    """Return True if a spec compares the teacher's logits, so that it must have the data's classes."""
    methods, unlabelled = [method for _, method in each_method(fields)], fields.get("unlabelled")
    if isinstance(unlabelled, Unlabelled) and unlabelled.labels == "teacher":
        return True
    return not methods or any("logits" in one.facts.needs or one.compares_gradients for one in methods)


def class_faults(
    dataset: DatasetFacts, teacher: Teacher, facts: ModelFacts, pointer: str, file: str, needed: bool
) -> Iterator[Fault]:
    """Yield the faults of a teacher's classes. `file` is the field that names its file; `needed`: see needs_classes."""
    names = class_names(teacher, facts)
    at = f"{pointer}/class_names" if teacher.class_names else file
    if names and len(names) != facts.num_classes:
        text = f"{len(names)} class names, and the teacher has {facts.num_classes} classes"
        yield Fault(at, text, "teacher_mismatch", facts.num_classes, len(names))
    elif teacher.class_map is not None:
        yield from _given(teacher.class_map, teacher, facts, dataset, f"{pointer}/class_map")[1]
    elif needed and not answers_classes(teacher, facts, dataset):
        if facts.num_classes != dataset.num_classes:
            text = f"the teacher has {facts.num_classes} classes, the data set has {dataset.num_classes}"
            text += _advice(names, facts, dataset)
            yield Fault(file, text, "teacher_mismatch", dataset.num_classes, facts.num_classes)
        else:
            text = f"the teacher's class names differ from the data set's{_advice(names, facts, dataset)}"
            yield Fault(at, text, "teacher_mismatch", dataset.class_names[:10], (names or [])[:10])


def _advice(names: Sequence[str] | None, facts: ModelFacts, dataset: DatasetFacts) -> str:
    """Return what follows in a refusal: the field that says which outputs answer which class, with an example."""
    known, first = Names(names, facts.num_classes), dataset.class_names[:2]
    example: dict[str, object] = {}
    for place, name in enumerate(first):
        near = known.nearest(name)
        example[name] = (near[0] if near else names[place]) if names and place < len(names) else place
    text = f"; class_map says which of its outputs answer each class, such as {_json(example)}"
    if names is None:
        return f"{text} (numbers of outputs, because the names of its classes are not known)"
    unknown = [name for name in dataset.class_names if len(known.find(name)[0]) != 1]
    if unknown and len(unknown) < dataset.num_classes:
        text += (
            f"; {len(unknown)} of {dataset.num_classes} classes have no one output of their name, first {unknown[0]!r}"
        )
    return text


def _given(
    class_map: ClassMap, teacher: Teacher, facts: ModelFacts, dataset: DatasetFacts, pointer: str
) -> tuple[Outputs, list[Fault]]:
    """Return the outputs of a map, by the data's classes, and its faults. `pointer` is the map's.

    Until the names of the data's classes are known, only the teacher's half is compared, and no outputs are returned.
    """
    known, own = Names(class_names(teacher, facts), facts.num_classes), Names(dataset.class_names, dataset.num_classes)
    faults: list[Fault] = []
    outputs: dict[int, tuple[int, ...]] = {}
    taken: dict[int, str] = {}
    exact = {name: places[0] for name, places in _places(dataset.class_names).items()}
    for name, listed in class_map.items():
        if len(faults) >= _TOLD:
            break
        at = f"{pointer}/{name.replace('~', '~0').replace('/', '~1')}"
        places: list[int] = []
        for one in listed if isinstance(listed, tuple) else (listed,):
            if len(faults) >= _TOLD:
                break
            fault, place = _one_output(one, known, at)
            if fault is None and place in taken:
                output = f"output {place}" if one == place else f"output {place} ({one!r})"
                text = f"{output} answers {taken[place]!r} already, and can answer one class only"
                fault = Fault(at, text, "teacher_mismatch", "each output once", one)
            if fault is not None:
                faults.append(fault)
                continue
            taken[place] = name
            places.append(place)
        if not dataset.class_names:
            continue
        found = [exact[name]] if name in exact else own.find(name)[0]
        if len(found) != 1:
            near = own.nearest(name)
            text = f"the data set has no class {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            faults.append(Fault(at, text, "teacher_mismatch", near or dataset.class_names[:10], name))
        elif found[0] in outputs:
            text = f"the class {dataset.class_names[found[0]]!r} is in the map twice"
            faults.append(Fault(at, text, "teacher_mismatch", "each class once", name))
        else:
            outputs[found[0]] = tuple(places)
    missing = [name for place, name in enumerate(dataset.class_names) if place not in outputs]
    if missing and not faults:
        text = f"{len(missing)} of {dataset.num_classes} classes of the data set have no output, first {missing[0]!r}"
        faults.append(
            Fault(pointer, text, "teacher_mismatch", "one output or more for each class", list(class_map)[:10])
        )
    return tuple(outputs[place] for place in sorted(outputs)), faults


def _one_output(one: str | int, known: Names, pointer: str) -> tuple[Fault | None, int]:
    """Return the output that an entry of a map means, or its fault."""
    if isinstance(one, int):
        if one < known.count:
            return None, one
        text = f"the teacher has no output {one}: it has {known.count}, counted from 0"
        return Fault(pointer, text, "teacher_mismatch", f"0 to {known.count - 1}", one), -1
    found, _ = known.find(one)
    if len(found) == 1:
        return None, found[0]
    if found:
        text = f"{one!r} may be the teacher's output {' or '.join(map(str, found[:4]))}: give the number"
        return Fault(pointer, text, "teacher_mismatch", found[:4], one), -1
    near = known.nearest(one)
    if known.names is None:
        text = f"the names of the teacher's classes are not known: give an output's number for {one!r}, or class_names"
        return Fault(pointer, text, "teacher_mismatch", f"0 to {known.count - 1}", one), -1
    text = f"the teacher has no class {one!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    return Fault(pointer, text, "teacher_mismatch", near or list(known.names[:10]), one), -1


def outputs_of_map(teacher: Teacher, dataset: DatasetFacts) -> Outputs | None:
    """Return the map of a resolved teacher, by the data's classes; None if it has none."""
    if teacher.class_map is None:
        return None
    listed = [teacher.class_map[name] for name in dataset.class_names]
    return tuple(tuple(int(one) for one in (own if isinstance(own, tuple) else (own,))) for own in listed)


def as_numbers(outputs: Outputs, dataset: DatasetFacts) -> dict[str, tuple[int, ...]]:
    """Return a map as a resolved spec has it: the outputs' numbers for each class of the data, in its order."""
    return dict(zip(dataset.class_names, outputs, strict=True))


def map_example(class_map: Mapping[str, Sequence[int]], most: int = 20) -> str:
    """Return a map as JSON, cut after the first classes."""
    first = {
        name: outputs[0] if len(outputs) == 1 else list(outputs) for name, outputs in list(class_map.items())[:most]
    }
    return _json(first) + (f" … ({len(class_map)} in all)" if len(class_map) > most else "")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _places(names: Sequence[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    return places


def _plain(name: str) -> str:
    """Return a name without what differs between lists of the same classes: case, underscores, forms of Unicode."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").casefold().split())


def _nearest(name: str, names: Sequence[str]) -> list[str]:
    plain = {_plain(one): one for one in names[:_COMPARED]}
    return [plain[one] for one in get_close_matches(_plain(name), plain, n=3)]


@cache
def _imagenet_places() -> Mapping[str, frozenset[int]]:
    """Return the classes of ImageNet that have a name, by the name."""
    found: dict[str, set[int]] = {}
    for place, names in enumerate(imagenet.synonyms()):
        for name in names:
            found.setdefault(_plain(name), set()).add(place)
    return {name: frozenset(places) for name, places in found.items()}


def _denoted(name: str) -> frozenset[int]:
    """Return the classes of ImageNet that a name may mean."""
    numbered = _NUMBERED.fullmatch(name)
    return _imagenet_places().get(_plain(numbered[1] if numbered else name), frozenset())
