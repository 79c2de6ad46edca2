"""Errors of the framework have the form of all problems."""

from typing import Any

import pytest

from tests.api.conftest import Service, problem

pytestmark = pytest.mark.anyio


async def test_problem_for_an_unknown_address(service: Service) -> None:
    assert "/v1/nothing" in problem(await service.http.get("/v1/nothing"), 404, "not_found")["detail"]
    problem(await service.http.get("/static/nothing.js"), 404, "not_found")


async def test_problem_for_another_http_method(service: Service) -> None:
    answer = await service.http.put("/v1/jobs")
    problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, HEAD, POST"


async def test_problem_for_a_body_that_is_not_json(service: Service) -> None:
    headers = {"Content-Type": "application/json"}
    answer = await service.http.post("/v1/models", content=b'{"name": ', headers=headers)
    body = problem(answer, 400, "malformed_body")
    assert body["errors"][0]["code"] == "malformed_json"


async def test_problem_for_a_body_without_content_type(service: Service) -> None:
    answer = await service.http.post("/v1/models", content=b"name=x")
    problem(answer, 422, "invalid_request")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rezise": "crop"}, "there is no field 'rezise' here; did you mean 'resize'?"),
        ({"class_names": "a,b"}, "a list belongs here"),
        ({"resize": "stretch"}, "Input should be 'crop', 'squash' or 'pad'"),
        ({"image_size": True}, "a whole number belongs here, got true"),
        ({"image_size": "32"}, 'a whole number belongs here, got "32", which is text: write it without quotes'),
        ({"skip_unreadable": 1}, "true or false belongs here, got 1"),
    ],
)
async def test_problem_for_a_mistyped_field_says_what_would_work(
    service: Service, wrong: dict[str, Any], said: str
) -> None:
    body = {"name": "x", "blob": "sha256:" + "0" * 64, **wrong}
    answer = problem(await service.http.post("/v1/datasets", json=body), 422, "invalid_request")
    assert answer["errors"][0]["message"] == said and answer["errors"][0]["pointer"] == f"/{next(iter(wrong))}"
