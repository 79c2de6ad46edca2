import httpx
import pytest

from client.errors import ApiError, UnexpectedAnswer, Unreachable, fault_line
from tests.client.fake import problem


def answer(response: httpx.Response) -> httpx.Response:
    response.request = httpx.Request("POST", "http://fake/v1/jobs")
    return response


def test_every_fault_is_a_line_with_its_pointer_and_what_would_work():
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


def test_what_the_message_says_already_is_not_said_again():
    fault = {"pointer": "/alpha", "message": "must be ≥ 0, not -1", "code": "x", "got": -1, "allowed": "≥ 0"}
    assert fault_line(fault) == "/alpha: must be ≥ 0, not -1"


def test_a_long_list_of_what_is_allowed_is_cut():
    line = fault_line({"pointer": "/a", "message": "no", "allowed": [f"name{i}" for i in range(1000)]})
    assert len(line) < 250
    assert line.endswith("…)")


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ({"code": "action_not_allowed", "allowed_actions": ["retry", "delete"]}, "  possible now: retry, delete"),
        ({"code": "action_not_allowed", "allowed_actions": []}, "  possible now: nothing"),
        ({"code": "unusable", "hint": "name the architecture"}, "  hint: name the architecture"),
        ({"code": "not_found", "allowed": ["dkd", "kd"]}, "  there are: dkd, kd"),
        ({"code": "unauthorized"}, "  give the key as DISTILLERY_API_KEY or --key"),
    ],
)
def test_a_refusal_says_what_would_work(extra: dict[str, object], line: str):
    assert line in ApiError({"title": "No", "detail": "so it is", **extra}, 409).lines()


def test_what_there_is_is_told_once():
    told = ApiError({"title": "No", "detail": "it made a, b", "code": "not_found", "allowed": ["a", "b"]}, 404)
    assert told.lines() == ["No: it made a, b"]


def test_our_own_faults_carry_the_request_id_for_the_log():
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
def test_what_is_no_problem_document_is_not_taken_for_one(response: httpx.Response):
    error = ApiError.of(answer(response))
    assert isinstance(error, UnexpectedAnswer)
    assert "is the URL right?" in str(error)


def test_an_absent_server_says_how_to_start_one():
    assert "./run up" in Unreachable("http://127.0.0.1:8000", "connection refused").lines()[1]
