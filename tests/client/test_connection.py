import httpx
import pytest

from client.connection import Connection
from client.errors import ApiError, UnexpectedAnswer, Unreachable
from tests.client.fake_service import FakeService, problem


def connect(fake: FakeService, **settings: object) -> Connection:
    return Connection("http://fake/", "key", transport=httpx.MockTransport(fake), pause_s=0, **settings)  # type: ignore[arg-type]


def test_connection_sends_the_api_key():
    fake = FakeService({"GET /x": {}})
    connect(fake).json("GET", "/x")
    assert fake.requests[0].headers["authorization"] == "Bearer key"


@pytest.mark.parametrize("broken", [httpx.ReadError("cut"), httpx.ConnectError("refused"), problem(503, "unavailable")])
def test_request_is_repeated_after_a_failed_transmission(broken: object):
    fake = FakeService({"GET /x": [broken, {"good": True}]})
    assert connect(fake).json("GET", "/x") == {"good": True}


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        (httpx.ReadError("cut"), Unreachable),
        (problem(502, "bad_gateway"), ApiError),
        # The database's answer to the commit may have been lost, and not the commit.
        (problem(503, "unavailable"), ApiError),
        (problem(504, "gateway_timeout"), ApiError),
    ],
)
def test_request_that_may_have_been_executed_is_repeated_only_if_idempotent(broken: object, error: type[Exception]):
    fake = FakeService({"POST /x": [broken, {"good": True}]})
    with pytest.raises(error):
        connect(fake).json("POST", "/x")
    assert len(fake.requests) == 1
    again = FakeService({"POST /x": [broken, {"good": True}]})
    assert connect(again).json("POST", "/x", idempotent=True) == {"good": True}


@pytest.mark.parametrize("never_made", [httpx.ConnectError("refused"), problem(429, "too_many_requests")])
def test_request_that_was_not_executed_is_repeated(never_made: object):
    fake = FakeService({"POST /x": [never_made, {"good": True}]})
    assert connect(fake).json("POST", "/x") == {"good": True}


def test_request_repeated_delete_accepts_404():
    fake = FakeService({"DELETE /x": [httpx.ReadError("cut"), problem(404, "not_found")]})
    connect(fake).request("DELETE", "/x")
    assert len(fake.requests) == 2


def test_request_first_delete_raises_on_404():
    with pytest.raises(ApiError, match="not found"):
        connect(FakeService({"DELETE /x": problem(404, "not_found")})).request("DELETE", "/x")


@pytest.mark.parametrize("status", [429, 503])
def test_pause_is_as_long_as_the_server_requests(status: int, monkeypatch: pytest.MonkeyPatch):
    slept: list[float] = []
    monkeypatch.setattr("client.connection.time.sleep", slept.append)
    busy = problem(status, "busy")
    busy.headers["retry-after"] = "2"
    fake = FakeService({"POST /x": [busy, problem(status, "busy"), {"good": True}]})
    patient = Connection("http://fake", transport=httpx.MockTransport(fake), pause_s=0.25)
    assert patient.json("POST", "/x", idempotent=True) == {"good": True}
    assert slept == [2.0, 0.5], "as requested, then twice the first pause"


def test_request_is_not_repeated_after_a_refusal():
    fake = FakeService({"GET /x": problem(409, "action_not_allowed")})
    with pytest.raises(ApiError, match="action not allowed"):
        connect(fake).json("GET", "/x")
    assert len(fake.requests) == 1


def test_request_raises_unreachable_after_all_retries():
    fake = FakeService({"GET /x": httpx.ConnectError("refused")})
    with pytest.raises(Unreachable, match="refused"):
        connect(fake, retries=3).json("GET", "/x")
    assert len(fake.requests) == 4


def test_json_raises_on_the_answer_of_another_server():
    fake = FakeService({"GET /x": httpx.Response(200, text="<html>")})
    with pytest.raises(UnexpectedAnswer):
        connect(fake).json("GET", "/x")


@pytest.mark.parametrize("url", ["localhost:8000", "http://[", "ftp://x"])
def test_connection_to_an_invalid_address_is_unreachable(url: str):
    with pytest.raises(Unreachable):
        Connection(url, pause_s=0).json("GET", "/x")
