"""Dependencies stay on the event loop; no route ignores a query parameter."""

import inspect
import re

import pytest

from api import auth, dependencies
from api.routes import jobs
from tests.api.conftest import Service

HELD = ("Config", "Db", "Files", "InspectionsDep", "WakeWorkers")


@pytest.mark.parametrize(
    "dependency",
    [
        auth.member,
        auth.admin,
        auth.operator,
        dependencies.references,
        dependencies.known_parameters,
        jobs.body,
        *(getattr(dependencies, name).__metadata__[0].dependency for name in HELD),
    ],
)
def test_dependencies_are_coroutines(dependency: object) -> None:
    """A plain function as a dependency is run in a thread: half of a cheap request's time."""
    assert inspect.iscoroutinefunction(dependency)


@pytest.mark.anyio
async def test_every_route_refuses_a_parameter_that_it_does_not_have_and_none_that_it_has(service: Service) -> None:
    """The document says which there are. An id that nothing has, so that nothing is done; a value of no type is
    refused, too, and then for another reason."""
    paths = (await service.http.get("/openapi.json")).json()["paths"]
    routes = [(path, method) for path in paths if path.startswith("/v1/") for method in paths[path]]
    assert len(routes) > 60
    for path, method in routes:
        declared = [one["name"] for one in paths[path][method].get("parameters", []) if one["in"] == "query"]
        address = re.sub(r"{[^}]*}", "absent", path)
        query = "&".join(f"{name}=1" for name in [*declared, "bogus"])
        answer = await service.http.request(method.upper(), f"{address}?{query}", content=b"{}")
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), (method, path)
        (fault,) = answer.json()["errors"]
        assert (fault["pointer"], fault["code"], fault["got"]) == ("?bogus", "extra_forbidden", "1"), (method, path)
        assert fault["allowed"] == sorted(declared), (method, path)


@pytest.mark.anyio
async def test_a_parameter_that_is_misspelt_is_named_with_the_one_that_was_meant(service: Service) -> None:
    answer = await service.http.get("/v1/uploads?stauts=open&limit=3&x=1&x=2")
    assert answer.json()["detail"] == (
        "?stauts: there is no parameter 'stauts' here; did you mean 'status'?; ?x: there is no parameter 'x' here"
    )
    assert (await service.http.get("/v1/uploads?status=open&limit=3")).status_code == 200
    many = await service.http.get("/v1/jobs?" + "&".join(f"p{number}=1" for number in range(60)))
    assert [fault["code"] for fault in many.json()["errors"]][-2:] == ["extra_forbidden", "more_faults"]
