"""Who may ask: everybody on this machine without a key, whoever holds it with one."""

import hashlib

import pytest

from store.settings import Settings
from tests.api.conftest import Service, problem, serving

pytestmark = pytest.mark.anyio

KEY = "dk_a_long_random_key"
HASH = hashlib.sha256(KEY.encode()).hexdigest()


async def test_without_a_key_this_machine_is_the_admin(service: Service) -> None:
    assert (await service.http.get("/v1/jobs")).status_code == 200


@pytest.mark.parametrize("host", ["distillery.example", "10.0.0.5:8000", "localhost.example"])
async def test_without_a_key_no_other_name_is_answered(service: Service, host: str) -> None:
    """A page that makes its own name point here (DNS rebinding) must not read or send jobs."""
    problem(await service.http.get("/v1/jobs", headers={"Host": host}), 403, "forbidden")


async def test_without_a_key_any_name_that_browsers_hold_for_this_machine_will_do(service: Service) -> None:
    answer = await service.http.get("/v1/jobs", headers={"Host": "distillery.localhost:8000"})
    assert answer.status_code == 200


async def test_without_a_key_no_page_of_another_origin_is_answered(service: Service) -> None:
    problem(await service.http.post("/v1/jobs", headers={"Origin": "https://evil.example"}, json={}), 403, "forbidden")
    own = await service.http.get("/v1/jobs", headers={"Origin": "http://127.0.0.1:8000"})
    assert own.status_code == 200


@pytest.mark.parametrize("header", [None, "Bearer wrong", f"Basic {KEY}", "Bearer", f"Bearer {HASH}"])
async def test_with_a_key_nobody_else_is_let_in(settings: Settings, header: str | None) -> None:
    async with serving(settings.model_copy(update={"admin_key_hash": HASH})) as service:
        headers = {"Authorization": header} if header else {}
        answer = await service.http.get("/v1/jobs", headers=headers)
        told = problem(answer, 401, "unauthorized")
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert HASH not in str(told)


async def test_with_the_key_any_host_name_will_do(settings: Settings) -> None:
    async with serving(settings.model_copy(update={"admin_key_hash": HASH})) as service:
        headers = {"Authorization": f"Bearer {KEY}", "Host": "distillery.example"}
        assert (await service.http.get("/v1/jobs", headers=headers)).status_code == 200
        assert (await service.http.get("/metrics", headers={"Host": "distillery.example"})).status_code == 401
        for open_to_all in ("/healthz", "/readyz", "/", "/docs", "/static/app.js"):
            assert (await service.http.get(open_to_all)).status_code == 200
