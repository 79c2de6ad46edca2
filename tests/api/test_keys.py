"""Keys by their routes: shown once, of the own project, and never more than the caller's own role."""

import pytest

from store.settings import Settings
from tests.api.conftest import SUPERVISED, Service, problem, serving
from tests.api.test_auth import HASH, KEY

pytestmark = pytest.mark.anyio


async def test_create_shows_the_key_once(service: Service) -> None:
    answer = await service.http.post("/v1/keys", json={"name": "root", "role": "operator"})
    assert answer.status_code == 201
    made = answer.json()
    assert answer.headers["location"] == f"/v1/keys/{made['id']}"
    assert answer.headers["cache-control"] == "no-store"
    assert made["key"].startswith(f"dk_{made['prefix']}_")
    assert (made["name"], made["role"], made["project"], made["created_by"]) == ("root", "operator", "default", "local")
    problem(await service.http.get("/v1/keys"), 401, "unauthorized")
    async with service.holder(made["key"]) as root:
        listed = (await root.http.get("/v1/keys")).json()["data"]
        shown = {name: value for name, value in made.items() if name != "key"}
        assert listed == [shown | {"last_used_at": listed[0]["last_used_at"]}]
        assert (await root.http.get(answer.headers["location"])).json().keys() == shown.keys()


async def test_first_key_must_be_the_operators(service: Service) -> None:
    """A member's key alone would lock everybody out of making another one."""
    for role in ("admin", "member", "reader"):
        refused = await service.http.post("/v1/keys", json={"name": "ann", "role": role})
        assert problem(refused, 409, "operator_key_needed")["needs"] == "operator"
    assert (await service.http.get("/v1/keys")).json()["data"] == []
    root = (await service.http.post("/v1/keys", json={"name": "root", "role": "operator"})).json()["key"]
    async with service.holder(root) as operator:
        assert (await operator.http.post("/v1/keys", json={"name": "ann"})).json()["role"] == "member"


async def test_operator_of_the_settings_makes_a_projects_first_key(settings: Settings) -> None:
    async with serving(settings.model_copy(update={"admin_key_hash": HASH}), Authorization=f"Bearer {KEY}") as service:
        problem(await service.http.post("/v1/keys", json={"name": "a", "project": "vision"}), 404, "not_found")
        assert (await service.http.post("/v1/projects", json={"name": "vision"})).status_code == 201
        made = await service.http.post("/v1/keys", json={"name": "ann", "role": "admin", "project": "vision"})
        assert (made.json()["project"], made.json()["created_by"]) == ("vision", "operator")
        async with service.holder(made.json()["key"]) as ann:
            second = await ann.http.post("/v1/keys", json={"name": "ben"})
            assert (second.json()["project"], second.json()["created_by"]) == ("vision", "ann")
            async with service.holder(second.json()["key"]) as ben:
                job = (await ben.http.post("/v1/jobs", json=SUPERVISED)).json()
                assert job["created_by"] == {"key_id": second.json()["id"], "key_name": "ben"}
            assert [key["name"] for key in (await ann.http.get("/v1/keys")).json()["data"]] == ["ben", "ann"]
        everyones = (await service.http.get("/v1/keys")).json()["data"]
        assert [key["name"] for key in everyones] == ["ben", "ann"]
        assert (await service.http.get("/v1/keys", params={"project": "default"})).json()["data"] == []


async def test_admin_makes_and_takes_no_more_than_it_has(service: Service) -> None:
    operator = await service.key("operator", name="root")
    async with service.holder(await service.key("admin", name="ann")) as admin:
        root, own = sorted((await admin.http.get("/v1/keys")).json()["data"], key=lambda key: key["name"], reverse=True)
        problem(await admin.http.post("/v1/keys", json={"name": "x", "role": "operator"}), 403, "role_forbidden")
        problem(await admin.http.post("/v1/keys", json={"name": "x", "project": "other"}), 403, "role_forbidden")
        problem(await admin.http.get("/v1/keys", params={"project": "other"}), 403, "role_forbidden")
        problem(await admin.http.post(f"/v1/keys/{root['id']}/rotate"), 403, "role_forbidden")
        problem(await admin.http.delete(f"/v1/keys/{root['id']}"), 403, "role_forbidden")
        async with service.holder(operator) as root_itself:
            assert (await root_itself.http.get("/v1/keys")).status_code == 200
        assert (await admin.http.delete(f"/v1/keys/{own['id']}")).status_code == 204, "its own key it may end"
        assert (await admin.http.get("/v1/keys")).status_code == 401


async def test_rotate_and_revoke_hold_at_once_in_the_same_process(service: Service) -> None:
    async with service.holder(await service.key("operator")) as root:
        made = (await root.http.post("/v1/keys", json={"name": "ann"})).json()
        async with service.holder(made["key"]) as ann:
            assert (await ann.http.get("/v1/jobs")).status_code == 200
            rotated = (await root.http.post(f"/v1/keys/{made['id']}/rotate")).json()
            assert (await ann.http.get("/v1/jobs")).status_code == 401
        async with service.holder(rotated["key"]) as ann:
            assert (await ann.http.get("/v1/jobs")).status_code == 200
            for _ in range(2):
                assert (await root.http.delete(f"/v1/keys/{made['id']}")).status_code == 204
            assert (await ann.http.get("/v1/jobs")).status_code == 401
        problem(await root.http.post(f"/v1/keys/{made['id']}/rotate"), 409, "key_ended")
        assert (await root.http.get(f"/v1/keys/{made['id']}")).json()["revoked_at"]
        problem(await root.http.delete("/v1/keys/key_none"), 404, "not_found")


async def test_create_gives_a_key_an_end(service: Service) -> None:
    async with service.holder(await service.key("operator")) as root:
        made = (await root.http.post("/v1/keys", json={"name": "ci", "expires_in_s": 3600})).json()
        assert made["expires_at"] > made["created_at"]
        for wrong in (0, 59, 1e12, "soon"):
            answer = await root.http.post("/v1/keys", json={"name": "ci", "expires_in_s": wrong})
            assert problem(answer, 422, "invalid_request")["errors"][0]["pointer"] == "/expires_in_s"


@pytest.mark.parametrize("body", [{}, {"name": ""}, {"name": "a\nb"}, {"name": "a", "role": "god"}, {"name": "\x00"}])
async def test_create_refuses_a_bad_body(service: Service, body: dict[str, str]) -> None:
    problem(await service.http.post("/v1/keys", json=body), 422, "invalid_request")


async def test_projects_are_made_listed_and_deleted(service: Service) -> None:
    made = await service.http.post("/v1/projects", json={"name": "vision"})
    assert (made.status_code, made.headers["location"]) == (201, "/v1/projects/vision")
    assert made.json().keys() == {"name", "created_at"}
    problem(await service.http.post("/v1/projects", json={"name": "vision"}), 409, "name_taken")
    names = [project["name"] for project in (await service.http.get("/v1/projects")).json()["data"]]
    assert names == ["default", "vision"]
    root = await service.key("operator")
    async with service.holder(root) as operator, service.holder(await service.key(project="vision")) as ann:
        await ann.upload(b"bytes")
        job = await ann.submit()
        refused = problem(await operator.http.delete("/v1/projects/vision"), 409, "project_not_empty")
        assert refused["holds"] == ["jobs", "uploads"]
        assert (await ann.http.get(f"/v1/jobs/{job}")).status_code == 200
        assert (await operator.http.post("/v1/projects", json={"name": "empty"})).status_code == 201
        async with service.holder(await service.key(project="empty")) as ben:
            assert (await ben.http.get("/v1/jobs")).status_code == 200
            assert (await operator.http.delete("/v1/projects/empty")).status_code == 204
            assert (await ben.http.get("/v1/jobs")).status_code == 401
        problem(await operator.http.get("/v1/projects/empty"), 404, "not_found")
        problem(await operator.http.delete("/v1/projects/default"), 409, "project_not_empty")


@pytest.mark.parametrize("name", ["", "A", "a b", "../x", "a/b", "a.b", "-a", "a" * 64, "é", "a\x00"])
async def test_project_names_are_those_of_folders(service: Service, name: str) -> None:
    answer = await service.http.post("/v1/projects", json={"name": name})
    assert problem(answer, 422, "invalid_request")["errors"][0]["pointer"] == "/name"


async def test_create_under_an_idempotency_key_shows_the_secret_once(service: Service) -> None:
    headers = {"Idempotency-Key": "k"}
    async with service.holder(await service.key("operator")) as op:
        first = await op.http.post("/v1/keys", json={"name": "ann", "role": "member"}, headers=headers)
        again = await op.http.post("/v1/keys", json={"role": "member", "name": "ann"}, headers=headers)
        other = await op.http.post("/v1/keys", json={"name": "bob"}, headers=headers)
        listed = (await op.http.get("/v1/keys")).json()["data"]
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["key"] and again.json() == {**first.json(), "key": None}
    assert again.headers["idempotent-replayed"] == "true"
    problem(other, 422, "idempotency_conflict")
    assert [one["name"] for one in listed].count("ann") == 2  # And the operator's own, of this name.


async def test_create_project_under_an_idempotency_key_is_done_once(service: Service) -> None:
    headers = {"Idempotency-Key": "k"}
    first = await service.http.post("/v1/projects", json={"name": "team"}, headers=headers)
    again = await service.http.post("/v1/projects", json={"name": "team"}, headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    problem(await service.http.post("/v1/projects", json={"name": "team"}), 409, "name_taken")
    problem(
        await service.http.post("/v1/projects", json={"name": "other"}, headers=headers), 422, "idempotency_conflict"
    )
