"""What the engine can do: each method, what it matches, needs and goes with, and its options as a schema."""

from functools import cache
from typing import Any, Literal, get_args

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.responses import Response

from api.dependencies import Caller
from api.problems import NotFound, responses
from api.schemas import Json, Page, View, page
from kdcore.catalog import METHODS, MethodFacts, ModelFacts, architecture, named_facts
from kdcore.spec import Known, Method, parse, read, resolve

router = APIRouter(prefix="/v1/methods", tags=["catalogue"])

Companion = Literal["several_teachers", "program", "assistants", "unlabelled", "mix"]

COMPANIONS: dict[Companion, dict[str, Any]] = {
    "several_teachers": {"teacher": [{"checkpoint": "model:one"}, {"checkpoint": "model:other"}]},
    "program": {"teacher": {"program": "blob:sha256:" + "0" * 64}},
    "assistants": {"assistants": ["resnet32"]},
    "unlabelled": {"unlabelled": "my-images"},
    "mix": {"training": {"mix": "mixup"}},
}


class MethodExample(View):
    """A job of the method alone, as short as it can be."""

    spec: dict[str, Any] = Field(description="What is sent; the teacher is a ResNet-56.")
    resolved: dict[str, Any] = Field(description="What becomes of its method, temperature, alpha and beta.")


class MethodView(MethodFacts):
    """What a method is, what it goes with, and how it is called."""

    works_with: list[Companion] = Field(
        description="What else a job of this method may have, its options as they are by default: several teachers, a "
        "torch.export program for a teacher, assistants, unlabelled images, mixed images."
    )
    sums_with: list[str] = Field(description="Other methods that a list may hold beside it.")
    options: dict[str, Any] = Field(
        description="JSON schema of the object that stands for the method in a job: each option with its bounds, its "
        "default, and whose default it is. The name alone stands for all defaults."
    )
    example: MethodExample


def _models() -> dict[str, type[BaseModel]]:
    return {model.model_fields["name"].default: model for model in get_args(get_args(Method)[0])}


OPTIONS = {name: model.model_json_schema() for name, model in _models().items()}


@router.get("", response_model=Page[MethodView])
async def listing(caller: Caller) -> Response:
    """Every method, by name."""
    return page([_view(name) for name in sorted(METHODS)])


@router.get("/{name}", response_model=MethodView, responses=responses(NotFound))
async def one(name: str, caller: Caller) -> Response:
    """A method: paper, what it matches, what it needs, its options with their defaults, and an example."""
    if name not in METHODS:
        raise NotFound(f"there is no method {name!r}", allowed=sorted(METHODS))
    return Json(_view(name))


@cache
def _view(name: str) -> dict[str, Any]:
    spec = _job(name)
    return {
        **METHODS[name].model_dump(mode="json"),
        "works_with": [companion for companion, more in COMPANIONS.items() if _is_sound({**spec, **more})],
        "sums_with": [other for other in sorted(METHODS) if other != name and _is_sound(_job(name, other))],
        "options": OPTIONS[name],
        "example": {"spec": spec, "resolved": _resolved(spec)},
    }


def _job(*names: str) -> dict[str, Any]:
    """A job of these methods with whatever they need, and nothing else."""
    spec: dict[str, Any] = {"dataset": "cifar100", "student": "resnet20"}
    schemes = {METHODS[name].scheme for name in names}
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
