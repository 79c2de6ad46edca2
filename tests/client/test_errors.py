import httpx
import pytest

from client.errors import ApiError, UnexpectedAnswer, Unreachable, fault_line
from tests.client.fake_service import problem


def answer(response: httpx.Response) -> httpx.Response:
    response.request = httpx.Request("POST", "http://fake/v1/jobs")
    return response


def test_api_error_lines_list_every_fault():
    faults = [
        {"pointer": "/student", "message": "unknown network", "code": "x", "got": "resnet21", "allowed": ["resnet20"]},
        {"pointer": "", "message": "the body is empty", "code": "y"},
    ]
    error = ApiError.of(answer(problem(422, "spec_invalid", "two faults", errors=faults)))
    assert error.lines() == [
        "spec invalid",
        "  /student: unknown network (given: resnet21; allowed: resnet20)",
        "  the whole body: the body is empty",
    ]


def test_fault_line_does_not_repeat_what_the_message_quotes():
    fault = {"pointer": "/alpha", "message": "must be ≥ 0, not -1", "code": "x", "got": -1, "allowed": "≥ 0"}
    assert fault_line(fault) == "/alpha: must be ≥ 0, not -1"


def test_fault_line_does_not_repeat_a_list_that_the_message_names():
    near = "there is no network 'resnt20'; did you mean resnet20 or resnet32?"
    assert fault_line({"pointer": "/student", "message": near, "allowed": ["resnet32", "resnet20"]}).endswith("?")
    assert fault_line({"pointer": "/student", "message": near, "allowed": ["resnet20", "resnet"]}).endswith(
        "? (allowed: resnet20, resnet)"
    )


def test_fault_line_cuts_a_long_list():
    line = fault_line({"pointer": "/a", "message": "no", "allowed": [f"name{i}" for i in range(1000)]})
    assert len(line) < 250
    assert line.endswith("…)")


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ({"code": "action_not_allowed", "allowed_actions": ["retry", "delete"]}, "  allowed actions: retry, delete"),
        ({"code": "action_not_allowed", "allowed_actions": []}, "  allowed actions: none"),
        ({"code": "unusable", "hint": "name the architecture"}, "  hint: name the architecture"),
        ({"code": "not_found", "allowed": ["dkd", "kd"]}, "  allowed: dkd, kd"),
        ({"code": "unauthorized"}, "  set DISTILLERY_API_KEY or --key"),
    ],
)
def test_api_error_lines_hint_at_what_is_allowed(extra: dict[str, object], line: str):
    assert line in ApiError({"title": "No", "detail": "so it is", **extra}, 409).lines()


def test_api_error_lines_do_not_repeat_what_the_message_quotes():
    error = ApiError({"title": "No", "detail": "it made a, b", "code": "not_found", "allowed": ["a", "b"]}, 404)
    assert error.lines() == ["No: it made a, b"]


def test_api_error_lines_of_a_server_error_have_the_request_id():
    error = ApiError.of(answer(problem(500, "internal", "an unforeseen error")))
    assert error.lines() == ["internal: an unforeseen error (request req_1)"]


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(502, text="<h1>Bad gateway</h1>", headers={"content-type": "text/html"}),
        httpx.Response(404, json=["nothing"]),
        httpx.Response(404, json={"detail": "Not Found"}),
    ],
)
def test_api_error_of_another_document_is_unexpected_answer(response: httpx.Response):
    error = ApiError.of(answer(response))
    assert isinstance(error, UnexpectedAnswer)
    assert "is the URL right?" in str(error)


def test_unreachable_lines_tell_how_to_start_a_server():
    assert "./run up" in Unreachable("http://127.0.0.1:8000", "connection refused").lines()[1]
