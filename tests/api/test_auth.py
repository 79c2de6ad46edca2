"""Without any key callers on this machine are accepted; from the first key on, the holders of keys."""

import asyncio
import hashlib
import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import select, update

from api import auth
from store import keys, tables
from store.records import database_now
from store.settings import Settings
from tests.api.conftest import SUPERVISED, Service, problem, serving

pytestmark = pytest.mark.anyio

KEY = "dk_a_long_random_key"
HASH = hashlib.sha256(KEY.encode()).hexdigest()


@pytest.fixture(autouse=True)
def short_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "WRONG_KEY_S", 0.001)


async def test_member_without_a_key_is_operator_on_this_machine(service: Service) -> None:
    assert (await service.http.get("/v1/jobs")).status_code == 200
    assert (await service.http.get("/v1/projects")).json()["data"][0]["name"] == "default"


@pytest.mark.parametrize("host", ["distillery.example", "10.0.0.5:8000", "localhost.example"])
async def test_member_without_a_key_refuses_other_host_names(service: Service, host: str) -> None:
    """A page that makes its own name point here (DNS rebinding) must not read or send jobs."""
    problem(await service.http.get("/v1/jobs", headers={"Host": host}), 403, "forbidden")


async def test_member_without_a_key_accepts_names_below_localhost(service: Service) -> None:
    answer = await service.http.get("/v1/jobs", headers={"Host": "distillery.localhost:8000"})
    assert answer.status_code == 200


async def test_member_without_a_key_refuses_other_origins(service: Service) -> None:
    problem(await service.http.post("/v1/jobs", headers={"Origin": "https://evil.example"}, json={}), 403, "forbidden")
    own = await service.http.get("/v1/jobs", headers={"Origin": "http://127.0.0.1:8000"})
    assert own.status_code == 200


@pytest.mark.parametrize("header", [None, "Bearer wrong", f"Basic {KEY}", "Bearer", f"Bearer {HASH}"])
async def test_member_with_a_key_refuses_wrong_keys(settings: Settings, header: str | None) -> None:
    async with serving(settings.model_copy(update={"admin_key_hash": HASH})) as service:
        headers = {"Authorization": header} if header else {}
        answer = await service.http.get("/v1/jobs", headers=headers)
        body = problem(answer, 401, "unauthorized")
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert HASH not in str(body)


async def test_member_with_a_key_accepts_any_host_name(settings: Settings) -> None:
    async with serving(settings.model_copy(update={"admin_key_hash": HASH})) as service:
        headers = {"Authorization": f"Bearer {KEY}", "Host": "distillery.example"}
        assert (await service.http.get("/v1/jobs", headers=headers)).status_code == 200
        assert (await service.http.get("/metrics", headers={"Host": "distillery.example"})).status_code == 401
        for open_to_all in ("/healthz", "/readyz", "/", "/docs", "/static/app.js"):
            assert (await service.http.get(open_to_all)).status_code == 200


async def test_any_key_makes_keys_needed_on_this_machine_too(service: Service) -> None:
    key = await service.key("reader")
    problem(await service.http.get("/v1/jobs"), 401, "unauthorized")
    async with service.holder(key) as reader:
        assert (await reader.http.get("/v1/jobs")).status_code == 200
    await service.db.write(lambda connection: connection.execute(update(tables.keys).values(revoked_at=1.0)))
    service.app.state.authentication.forget()
    problem(await service.http.get("/v1/jobs"), 401, "unauthorized")


@pytest.mark.parametrize("how", ["revoked", "expired", "another secret", "unknown", "other form", "surrogate"])
async def test_wrong_keys_of_every_kind_have_the_same_answer(service: Service, how: str) -> None:
    key = await service.key("operator")
    if how == "revoked":
        await service.db.write(lambda connection: connection.execute(update(tables.keys).values(revoked_at=1.0)))
    elif how == "expired":
        old = update(tables.keys).values(expires_at=database_now() - 1)
        await service.db.write(lambda connection: connection.execute(old))
    sent = {
        "another secret": key[:-1] + ("0" if key[-1] != "0" else "1"),
        "unknown": keys.new_key()[0],
        "other form": "hello",
        "surrogate": b"Bearer \xff\xfe",
    }.get(how, key)
    header = sent if isinstance(sent, bytes) else f"Bearer {sent}"
    answer = await service.http.get("/v1/jobs", headers={"Authorization": header})
    body = problem(answer, 401, "unauthorized")
    assert body["detail"] == "this key is not known, or is not valid any more"


async def test_wrong_key_is_delayed_and_logged_without_its_secret(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = await service.key("operator")
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    # Not asyncio's own: periodic tasks sleep as well.
    monkeypatch.setattr(auth, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
    wrong = key[:-4] + "zzzz"
    with caplog.at_level(logging.WARNING, "distillery.api"):
        for sent in (wrong, "my password", key):
            await service.http.get("/v1/jobs", headers={"Authorization": f"Bearer {sent}"})
    assert waits == [auth.WRONG_KEY_S] * 2, "the right key is not delayed"
    assert caplog.messages == [
        f"wrong key {keys.prefix_of(key)} from 127.0.0.1: GET",
        "wrong key of another form from 127.0.0.1: GET",
    ]


async def test_wrong_keys_beyond_the_bound_wait_for_nothing(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand guesses a second must not fill the process with sleepers."""
    await service.key("operator")
    monkeypatch.setattr(auth, "WAITING", 2)
    monkeypatch.setattr(auth, "WRONG_KEY_S", 0.2)
    wrong = {"Authorization": "Bearer wrong"}
    answers = [asyncio.create_task(service.http.get("/v1/jobs", headers=wrong)) for _ in range(5)]
    done, waiting = await asyncio.wait(answers, timeout=0.15)
    assert (len(done), len(waiting)) == (3, 2)
    assert {answer.status_code for answer in await asyncio.gather(*answers)} == {401}


READER_MAY = [("GET", "/v1/jobs"), ("GET", "/v1/datasets"), ("POST", "/v1/jobs/validate?probe=false")]
MEMBER_MAY = [("POST", "/v1/jobs"), ("POST", "/v1/uploads"), ("POST", "/v1/models"), ("DELETE", "/v1/models/none")]
ADMIN_MAY = [("GET", "/v1/keys"), ("POST", "/v1/keys"), ("DELETE", "/v1/keys/none")]
OPERATOR_MAY = [("GET", "/v1/projects"), ("POST", "/v1/projects"), ("POST", "/v1/storage/collections")]


@pytest.mark.parametrize("role", ["reader", "member", "admin", "operator"])
async def test_roles_may_do_this_and_no_more(service: Service, role: Any) -> None:
    order = ("reader", "member", "admin", "operator")
    async with service.holder(await service.key(role)) as holder:
        for needed, routes in zip(order, (READER_MAY, MEMBER_MAY, ADMIN_MAY, OPERATOR_MAY), strict=True):
            for verb, path in routes:
                body = {"json": SUPERVISED} if verb == "POST" else {}
                answer = await holder.http.request(verb, path, **body)
                if order.index(role) < order.index(needed):
                    refused = problem(answer, 403, "role_forbidden")
                    assert order.index(refused["needs"]) > order.index(role)
                else:
                    assert answer.status_code not in (401, 403), (verb, path, answer.text)


async def test_keys_are_known_for_some_seconds_and_then_read_again(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process revokes: it cannot tell this one. The clock is moved instead of waiting."""
    async with service.holder(await service.key("member")) as holder:
        assert (await holder.http.get("/v1/jobs")).status_code == 200
        await service.db.write(lambda connection: connection.execute(update(tables.keys).values(revoked_at=1.0)))
        assert (await holder.http.get("/v1/jobs")).status_code == 200, "it is still remembered"
        later = time.monotonic() + auth.FRESH_S
        monkeypatch.setattr(auth, "time", SimpleNamespace(monotonic=lambda: later, time=time.time))
        assert (await holder.http.get("/v1/jobs")).status_code == 401
    assert auth.FRESH_S + 1 <= 5


async def test_a_stream_ends_when_its_key_does(service: Service) -> None:
    async with service.holder(await service.key("member")) as holder:
        job = await holder.submit()
        stream = asyncio.create_task(holder.http.get(f"/v1/jobs/{job}/events/stream"))
        await asyncio.sleep(0.05)
        await service.db.write(lambda connection: connection.execute(update(tables.keys).values(revoked_at=1.0)))
        service.app.state.authentication.forget()
        answer = await asyncio.wait_for(stream, 10)
        assert (answer.status_code, "event: queued" in answer.text) == (200, True)


async def test_last_use_of_a_key_is_written_once_in_a_while(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async with service.holder(await service.key("member")) as holder:
        for _ in range(3):
            await holder.http.get("/v1/jobs")
        await service.app.state.authentication.close()
        used_at = await service.db.read(lambda connection: connection.scalar(select(tables.keys.c.last_used_at)))
        assert abs(used_at - time.time()) < 60
        service.app.state.authentication.forget()
        await holder.http.get("/v1/jobs")
        await service.app.state.authentication.close()
        again = await service.db.read(lambda connection: connection.scalar(select(tables.keys.c.last_used_at)))
        assert again == used_at, "not before a minute has passed"


async def test_sender_is_on_the_job(service: Service) -> None:
    local = await service.submit()
    job = (await service.http.get(f"/v1/jobs/{local}")).json()
    assert job["created_by"] == {"key_id": None, "key_name": "local"}
    async with service.holder(await service.key("member", name="ann")) as ann:
        sent = await ann.submit()
        job = (await ann.http.get(f"/v1/jobs/{sent}")).json()
        assert job["created_by"]["key_name"] == "ann"
        assert job["created_by"]["key_id"].startswith("key_")
        (listed, _) = (await ann.http.get("/v1/jobs")).json()["data"]
        assert listed["created_by"] == job["created_by"]


async def test_secrets_are_in_no_answer_and_no_log(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """Every GET of the document and every kind of refusal, with the key in each place where a client may put it."""
    caplog.set_level(logging.DEBUG)
    async with serving(settings.model_copy(update={"admin_key_hash": HASH}), Authorization=f"Bearer {KEY}") as service:
        made = await service.http.post("/v1/keys", json={"name": "ann", "role": "operator"})
        key = made.json()["key"]
        secrets = [KEY, HASH, key, key.rpartition("_")[2], keys.digest_of(key)]
        texts = []
        async with service.holder(key) as holder:
            for path, verbs in service.app.openapi()["paths"].items():
                if "get" in verbs and "{" not in path:
                    texts.append((await holder.http.get(path)).text)
            sent = {"json": {"name": key, "key": key, "role": key}}
            for path in ("/v1/jobs", "/v1/keys", "/v1/models"):
                await holder.http.post(path, **sent)  # What a client sends in a body, it may get back: not compared.
            texts.append((await holder.http.get("/v1/keys", params={"after": "x"})).text)
            texts.append((await holder.http.get(f"/v1/keys/{made.json()['id']}")).text)
            texts.append((await holder.http.post("/v1/keys/none/rotate")).text)
            service.app.state.authentication._known.clear()
            wrong = [{"Authorization": f"Bearer {text}"} for text in (key[:-1], f"{key}0", f"{key} x", KEY.upper())]
            texts += [(await holder.http.get("/v1/jobs", headers=header)).text for header in wrong]
            holder.app.state.database = None  # A bug: its traceback goes to the log.
            answer = await holder.http.get("/v1/jobs")
            assert answer.status_code == 500
            texts.append(answer.text)
            holder.app.state.database = service.db
        stored = await service.db.read(lambda connection: connection.execute(select(tables.keys)).all())
        shown = "\n".join([*texts, caplog.text])
    assert "wrong key" in caplog.text and "unexpected error" in caplog.text
    assert not [secret for secret in secrets if secret in shown]
    assert key.rpartition("_")[2] not in str(stored) and repr(service.app.state.settings).count(HASH) <= 1
