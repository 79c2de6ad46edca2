"""A valid spec, the facts of what it names, and the faults of changed specs."""

from typing import Any

from base.errors import Fault
from kdcore.catalog import DatasetFacts, ModelFacts
from kdcore.catalog.facts import LogitsFacts, ProgramFacts
from kdcore.spec import JobSpec, Known, as_typed, each_teacher, fit, parse, read, resolve

SOUND = {
    "dataset": "mine",
    "teacher": {"checkpoint": "model:big"},
    "student": "resnet20",
    "method": "kd",
}
PROGRAM = {"program": "blob:sha256:" + "0" * 64}
LOGITS = {"logits": "blob:sha256:" + "1" * 64}
ONE, OTHER = {"checkpoint": "model:one"}, {"checkpoint": "model:other"}
PEERS: dict[str, Any] = {"teacher": None, "student": ["resnet20", "resnet20"]}

DATA = DatasetFacts(
    kind="arrays", num_classes=3, class_names=["a", "b", "c"], channels=3, image_size=(32, 32), train=1000, test=100,
    mean=[0.4, 0.5, 0.6], std=[0.1, 0.2, 0.3],
)  # fmt: skip
POOL = DATA.model_copy(update={"labelled": False, "num_classes": 0, "class_names": [], "train": 500, "test": 0})
TEACHER = ModelFacts(architecture="resnet56", num_classes=3, channels=3, parameters=1, bytes=4, format="pytorch")
STORED = LogitsFacts(num_classes=3, bytes=4, train=1000)
TRACED = ProgramFacts(num_classes=3, channels=3, parameters=1, bytes=4, image_size=(32, 32))

Faults = list[tuple[str, str, str]]
"""Pointer, code and message of each fault."""


def body(**changes: Any) -> dict[str, Any]:
    return {**SOUND, **changes}


def rule_faults(**changes: Any) -> Faults:
    """The faults of a changed spec before anything is looked up."""
    return as_tuples(read(body(**changes))[2])


def known(spec: dict[str, Any], network: ModelFacts | str = TEACHER, **more: Any) -> Known:
    """The facts of all that a spec names. Each checkpoint holds the same network."""
    _, fields, _ = read(spec)
    facts = network if isinstance(network, ModelFacts) else TEACHER.model_copy(update={"architecture": network})
    teachers = {
        at: TRACED if teacher.program is not None else STORED if teacher.logits is not None else facts
        for at, teacher in each_teacher(fields)
    }
    found: dict[str, Any] = {
        "dataset": DATA,
        "teachers": teachers,
        "unlabelled": POOL if "unlabelled" in spec else None,
    }
    return Known(**{**found, **more})


def fit_faults(*, network: ModelFacts | str = TEACHER, more: dict[str, Any] | None = None, **changes: Any) -> Faults:
    """The faults of a changed spec after all that it names was found."""
    spec = body(**changes)
    assert rule_faults(**changes) == []
    return as_tuples(as_typed(fit(read(spec)[1], known(spec, network, **(more or {}))), spec))


def resolved(*, network: ModelFacts | str = TEACHER, more: dict[str, Any] | None = None, **changes: Any) -> JobSpec:
    spec = body(**changes)
    return resolve(parse(spec), known(spec, network, **(more or {})))


def as_tuples(faults: list[Fault]) -> Faults:
    return [(fault.pointer, fault.code, fault.message) for fault in faults]
