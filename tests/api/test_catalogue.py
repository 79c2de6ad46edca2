"""What the engine can do, as the API tells it: methods and architectures."""

import pytest

from api.routes.architectures import ArchitectureView
from api.routes.methods import MethodView
from api.schemas import Page
from kdcore.catalog import ARCHITECTURES, METHODS
from tests.api.conftest import Service, problem

pytestmark = pytest.mark.anyio


async def test_every_method_tells_its_options_as_a_schema(service: Service) -> None:
    told = (await service.http.get("/v1/methods")).json()
    assert [method["name"] for method in told["data"]] == sorted(METHODS)
    assert Page[MethodView].model_validate(told, strict=True)
    kd = (await service.http.get("/v1/methods/kd")).json()
    assert kd["options"]["properties"]["form"]["default"] == "kl"
    assert kd["needs_teacher"] is True


async def test_an_unknown_method_is_told_beside_the_known_ones(service: Service) -> None:
    assert problem(await service.http.get("/v1/methods/kdd"), 404, "not_found")["allowed"] == sorted(METHODS)


async def test_every_architecture_with_its_count(service: Service) -> None:
    told = (await service.http.get("/v1/architectures")).json()
    assert {facts["name"] for facts in told["data"]} == set(ARCHITECTURES)
    assert Page[ArchitectureView].model_validate(told)


async def test_parameters_are_counted_for_the_classes_asked_for(service: Service) -> None:
    """ResNet-20 of the CIFAR family: 272,474 parameters for ten classes, 90 x 65 = 5,850 more for a hundred."""
    query = {"family": ARCHITECTURES["resnet20"].family, "source": "kdcore", "classes": 100}
    told = (await service.http.get("/v1/architectures", params=query)).json()["data"]
    assert {facts["name"]: facts["parameters_counted"] for facts in told}["resnet20"] == 272_474 + 5_850
    problem(await service.http.get("/v1/architectures?classes=1"), 422, "invalid_request")
