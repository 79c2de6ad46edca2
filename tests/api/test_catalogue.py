"""The catalogue: methods and architectures."""

from typing import Any

import pytest

from api.routes.architectures import ArchitectureView
from api.routes.methods import MethodView
from api.schemas import Page
from kdcore.catalog import ARCHITECTURES
from kdcore.spec import METHODS, read
from tests.api.conftest import Service, problem

pytestmark = pytest.mark.anyio


async def body(service: Service) -> dict[str, dict[str, Any]]:
    return {method["name"]: method for method in (await service.http.get("/v1/methods")).json()["data"]}


async def test_methods_listing_is_complete(service: Service) -> None:
    listed = (await service.http.get("/v1/methods")).json()
    assert [method["name"] for method in listed["data"]] == sorted(METHODS)
    assert Page[MethodView].model_validate(listed, strict=True)
    crd = (await service.http.get("/v1/methods/crd")).json()
    assert crd == (await body(service))["crd"]
    assert (crd["teacher"], crd["scheme"], crd["taps"]) == ("required", "offline", "embedding")
    assert (crd["alpha"], crd["beta"], crd["temperature"]) == (1, 0.8, None)
    assert "CRD's code" in crd["defaults_from"] and "ICLR 2020" in crd["paper"]


async def test_methods_options_have_descriptions_and_bounds(service: Service) -> None:
    for name, method in (await body(service)).items():
        schema = method["options"]
        assert schema["required"] == ["name"] and schema["properties"]["name"]["const"] == name
        assert schema["description"]
        for option, field in schema["properties"].items():
            if option == "name":
                continue
            assert field["description"] and "default" in field, (name, option)
            for part in (field, *field.get("anyOf", ())):
                if part.get("type") in ("number", "integer") and "enum" not in part:
                    assert {"minimum", "exclusiveMinimum"} & set(part), (name, option)
                    assert {"maximum", "exclusiveMaximum"} & set(part), (name, option)


@pytest.mark.parametrize("name", sorted(METHODS))
async def test_methods_example_is_a_valid_spec(service: Service, name: str) -> None:
    method = (await service.http.get(f"/v1/methods/{name}")).json()
    spec, resolved = method["example"]["spec"], method["example"]["resolved"]
    assert spec["method"] == name
    again, _, faults = read({**spec, **resolved})
    assert again is not None and faults == []
    assert (resolved["alpha"], resolved["beta"], resolved["temperature"]) == (
        method["alpha"], method["beta"], method["temperature"],
    )  # fmt: skip
    assert set(resolved["method"]) == set(method["options"]["properties"])


async def test_methods_works_with_follows_the_rules(service: Service) -> None:
    methods = await body(service)
    assert methods["kd"]["works_with"] == ["several_teachers", "program", "assistants", "unlabelled", "mix"]
    assert methods["dkd"]["works_with"] == ["several_teachers", "program", "assistants", "unlabelled"]
    assert methods["attention"]["works_with"] == ["unlabelled", "mix"]
    assert methods["crd"]["works_with"] == ["unlabelled"]
    assert methods["born_again"]["works_with"] == ["several_teachers", "program", "mix"]
    assert methods["dml"]["works_with"] == ["mix"]


async def test_methods_sums_with_is_symmetric(service: Service) -> None:
    methods = await body(service)
    assert methods["supervised"]["sums_with"] == []
    on_logits, on_taps = {"dist", "dkd", "kd", "nkd"}, {"attention", "nst", "pkt", "rkd", "sp"}
    assert on_logits <= set(methods["one"]["sums_with"]) and not on_taps & set(methods["one"]["sums_with"])
    assert on_logits | on_taps <= set(methods["dml"]["sums_with"]) and "crd" not in methods["dml"]["sums_with"]
    assert "attention" in methods["kd"]["sums_with"] and "ofd" not in methods["born_again"]["sums_with"]
    assert all(name in methods[other]["sums_with"] for name in methods for other in methods[name]["sums_with"])


async def test_openapi_has_a_method_as_name_object_or_list(service: Service) -> None:
    document = (await service.http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    one, several = schemas["JobSpec"]["properties"]["method"]["oneOf"]
    plain, objects = one["anyOf"]
    assert several["items"] == one and (several["minItems"], several["maxItems"]) == (1, 8)
    assert set(plain["enum"]) == set(METHODS)
    assert objects["discriminator"]["mapping"]["crd"] == "#/components/schemas/Crd"
    assert {part["$ref"] for part in objects["oneOf"]} <= {f"#/components/schemas/{name}" for name in schemas}
    teacher = schemas["JobSpec"]["properties"]["teacher"]["anyOf"][0]["oneOf"]
    assert [part.get("$ref", part.get("type")) for part in teacher] == ["#/components/schemas/Teacher", "array"]
    body = schemas["MethodView"]["properties"]
    assert all("description" in body[name] for name in ("matches", "needs", "defaults_from", "works_with", "options"))


async def test_methods_unknown_name_is_answered_with_the_known_ones(service: Service) -> None:
    assert problem(await service.http.get("/v1/methods/kdd"), 404, "not_found")["allowed"] == sorted(METHODS)


async def test_architectures_listing_has_parameters(service: Service) -> None:
    body = (await service.http.get("/v1/architectures")).json()
    assert {facts["name"] for facts in body["data"]} == set(ARCHITECTURES)
    assert Page[ArchitectureView].model_validate(body)


async def test_architectures_listing_counts_for_requested_classes(service: Service) -> None:
    """ResNet-20 of the CIFAR family: 272,474 parameters for ten classes, 90 x 65 = 5,850 more for a hundred."""
    query = {"family": ARCHITECTURES["resnet20"].family, "source": "kdcore", "classes": 100}
    body = (await service.http.get("/v1/architectures", params=query)).json()["data"]
    assert {facts["name"]: facts["parameters_counted"] for facts in body}["resnet20"] == 272_474 + 5_850
    problem(await service.http.get("/v1/architectures?classes=1"), 422, "invalid_request")
