"""The routes of methods: facts, combinations, options as a schema, and an example of each."""

from functools import cache
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from api.dependencies import Caller
from api.problems import NotFound, responses
from api.schemas import Id, Json, Page, Schema, page
from kdcore.catalog import ModelFacts, architecture, named_facts
from kdcore.catalog.facts import Facts
from kdcore.spec import METHODS, Known, MethodFacts, parse, read, resolve

router = APIRouter(prefix="/v1/methods", tags=["catalogue"])

Companion = Literal["several_teachers", "program", "assistants", "unlabelled", "mix"]

COMPANIONS: dict[Companion, dict[str, Any]] = {
    "several_teachers": {"teacher": [{"checkpoint": "model:one"}, {"checkpoint": "model:other"}]},
    "program": {"teacher": {"program": "blob:sha256:" + "0" * 64}},
    "assistants": {"assistants": ["resnet32"]},
    "unlabelled": {"unlabelled": "my-images"},
    "mix": {"training": {"mix": "mixup"}},
}


class MethodExample(Schema):
    """The shortest job of the method alone."""

    spec: dict[str, Any] = Field(description="The spec that is sent; the teacher is a ResNet-56.")
    resolved: dict[str, Any] = Field(description="Its method, temperature, alpha and beta after they are resolved.")


class _Named(Facts):
    name: str
    """The name in a job spec."""


class MethodView(MethodFacts, _Named):
    """A method's facts, what it can be combined with, and its options."""

    works_with: list[Companion] = Field(
        description="Features that a job of this method with default options may use: several teachers, a torch.export "
        "program as a teacher, assistants, unlabelled images, mixed images."
    )
    sums_with: list[str] = Field(description="Other methods that a list may contain beside it.")
    options: dict[str, Any] = Field(
        description="JSON schema of the method's object in a job: each option with its bounds, its default and the "
        "source of the default. The name alone means all defaults."
    )
    example: MethodExample


@router.get("", response_model=Page[MethodView])
async def listing(caller: Caller) -> Response:
    """Every method, by name."""
    return page([_view(name) for name in sorted(METHODS)])


@router.get("/{name}", response_model=MethodView, responses=responses(NotFound))
async def one(name: Id, caller: Caller) -> Response:
    """A method: its paper, the quantity that it matches, its needs, its options with their defaults, and an example."""
    if name not in METHODS:
        raise NotFound(f"there is no method {name!r}", allowed=sorted(METHODS))
    return Json(_view(name))


@cache
def _view(name: str) -> dict[str, Any]:
    method, spec = METHODS[name], _job(name)
    return {
        "name": name,
        **method.facts.model_dump(mode="json"),
        "works_with": [companion for companion, more in COMPANIONS.items() if _is_sound({**spec, **more})],
        "sums_with": [other for other in sorted(METHODS) if other != name and _is_sound(_job(name, other))],
        "options": method.model_json_schema(),
        "example": {"spec": spec, "resolved": _resolved(spec)},
    }


def _job(*names: str) -> dict[str, Any]:
    """Return a job of these methods with the fields that they need, and no others."""
    spec: dict[str, Any] = {"dataset": "cifar100", "student": "resnet20"}
    schemes = {METHODS[name].facts.scheme for name in names}
    if schemes == {"offline"}:
        spec["teacher"] = {"checkpoint": "model:cifar100-resnet56"}
    if "mutual" in schemes:
        spec["student"] = ["resnet20", "resnet20"]
    return {**spec, "method": names[0] if len(names) == 1 else list(names)}


def _is_sound(spec: dict[str, Any]) -> bool:
    return not read(spec)[2]


def _resolved(spec: dict[str, Any]) -> dict[str, Any]:
    dataset, network = named_facts("cifar100"), architecture("resnet56")
    teacher = ModelFacts(
        architecture=network.name, num_classes=100, channels=3, parameters=network.parameters(100) or 0, bytes=0,
        format="safetensors",
    )  # fmt: skip
    resolved = resolve(parse(spec), Known(dataset=dataset, teachers={"/teacher": teacher})).as_json()
    return {field: resolved[field] for field in ("method", "temperature", "alpha", "beta")}
