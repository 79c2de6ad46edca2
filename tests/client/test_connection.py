import httpx
import pytest

from client.connection import Connection
from client.errors import ApiError, UnexpectedAnswer, Unreachable
from tests.client.fake import Fake, problem


def connect(fake: Fake, **settings: object) -> Connection:
    return Connection("http://fake/", "key", transport=httpx.MockTransport(fake), pause_s=0, **settings)  # type: ignore[arg-type]


def test_the_key_goes_with_every_request():
    fake = Fake({"GET /x": {}})
    connect(fake).json("GET", "/x")
    assert fake.requests[0].headers["authorization"] == "Bearer key"


@pytest.mark.parametrize("broken", [httpx.ReadError("cut"), httpx.ConnectError("refused"), problem(503, "unavailable")])
def test_what_failed_on_the_way_is_asked_again(broken: object):
    fake = Fake({"GET /x": [broken, {"good": True}]})
    assert connect(fake).json("GET", "/x") == {"good": True}


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (httpx.ReadError("cut"), Unreachable),
        (problem(502, "bad_gateway"), ApiError),
        # The database's answer to the commit may have been lost, and not the commit.
        (problem(503, "unavailable"), ApiError),
        (problem(504, "gateway_timeout"), ApiError),
    ],
)
def test_a_move_that_may_have_been_made_is_made_again_only_where_twice_is_once(broken: object, told: type[Exception]):
    fake = Fake({"POST /x": [broken, {"good": True}]})
    with pytest.raises(told):
        connect(fake).json("POST", "/x")
    assert len(fake.requests) == 1
    again = Fake({"POST /x": [broken, {"good": True}]})
    assert connect(again).json("POST", "/x", repeatable=True) == {"good": True}


@pytest.mark.parametrize("never_made", [httpx.ConnectError("refused"), problem(429, "too_many_requests")])
def test_a_move_that_was_surely_not_made_is_tried_again(never_made: object):
    fake = Fake({"POST /x": [never_made, {"good": True}]})
    assert connect(fake).json("POST", "/x") == {"good": True}


def test_what_is_gone_when_it_is_deleted_again_was_deleted_by_the_request_whose_answer_was_lost():
    fake = Fake({"DELETE /x": [httpx.ReadError("cut"), problem(404, "not_found")]})
    connect(fake).ask("DELETE", "/x")
    assert len(fake.requests) == 2


def test_what_never_was_cannot_be_deleted():
    with pytest.raises(ApiError, match="not found"):
        connect(Fake({"DELETE /x": problem(404, "not_found")})).ask("DELETE", "/x")


@pytest.mark.parametrize("status", [429, 503])
def test_one_that_is_busy_is_given_the_time_that_it_asks_for(status: int, monkeypatch: pytest.MonkeyPatch):
    slept: list[float] = []
    monkeypatch.setattr("client.connection.time.sleep", slept.append)
    busy = problem(status, "busy")
    busy.headers["retry-after"] = "2"
    fake = Fake({"POST /x": [busy, problem(status, "busy"), {"good": True}]})
    patient = Connection("http://fake", transport=httpx.MockTransport(fake), pause_s=0.25)
    assert patient.json("POST", "/x", repeatable=True) == {"good": True}
    assert slept == [2.0, 0.5], "as asked, then by its own measure"


def test_a_refusal_is_final():
    fake = Fake({"GET /x": problem(409, "action_not_allowed")})
    with pytest.raises(ApiError, match="action not allowed"):
        connect(fake).json("GET", "/x")
    assert len(fake.requests) == 1


def test_in_the_end_it_gives_up():
    fake = Fake({"GET /x": httpx.ConnectError("refused")})
    with pytest.raises(Unreachable, match="refused"):
        connect(fake, retries=3).json("GET", "/x")
    assert len(fake.requests) == 4


def test_another_server_is_told_from_ours():
    fake = Fake({"GET /x": httpx.Response(200, text="<html>")})
    with pytest.raises(UnexpectedAnswer):
        connect(fake).json("GET", "/x")


@pytest.mark.parametrize("url", ["localhost:8000", "http://[", "ftp://x"])
def test_an_address_that_is_none(url: str):
    with pytest.raises(Unreachable):
        Connection(url, pause_s=0).json("GET", "/x")
