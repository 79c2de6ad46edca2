"""Without a key callers on this machine are accepted; with a key, its holders."""

import hashlib

import pytest

from store.settings import Settings
from tests.api.conftest import Service, problem, serving

pytestmark = pytest.mark.anyio

KEY = "dk_a_long_random_key"
HASH = hashlib.sha256(KEY.encode()).hexdigest()


async def test_member_without_a_key_is_admin_on_this_machine(service: Service) -> None:
    assert (await service.http.get("/v1/jobs")).status_code == 200


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
