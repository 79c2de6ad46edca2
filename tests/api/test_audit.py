"""Who did what: an entry for each change, in its transaction, and for what was refused for lack of rights."""

import time
from typing import Any

import pytest
from pydantic import TypeAdapter
from starlette.responses import Response

from api import audit as audit_of_requests
from api.audit import action_of
from api.auth import READS
from api.dependencies import Caller
from base.wire import AuditView
from store import audit, jobs
from tests.api.conftest import SUPERVISED, Service, problem

pytestmark = pytest.mark.anyio


async def entries(service: Service, **query: Any) -> list[dict[str, Any]]:
    answer = await service.http.get("/v1/audit", params={"limit": 100, **query})
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = TypeAdapter(list[AuditView]).validate_python(answer.json()["data"], strict=True)
    return rows[::-1]


async def actions(service: Service, **query: Any) -> list[str]:
    return [row["action"] for row in await entries(service, **query)]


async def test_entry_says_who_what_where_and_when(service: Service) -> None:
    admin = await service.key("admin")
    async with service.holder(await service.key("member", name="ann")) as ann, service.holder(admin) as reads:
        sent = await ann.http.post("/v1/jobs", json=SUPERVISED, headers={"X-Request-Id": "mine-1"})
        (entry,) = await entries(reads, action="job.submit")
    assert (entry["project"], entry["key_name"], entry["role"]) == ("default", "ann", "member")
    assert (entry["resource"], entry["request_id"], entry["outcome"]) == (sent.json()["id"], "mine-1", "done")
    assert entry["key_id"].startswith("key_") and entry["address"] == "127.0.0.1" and entry["at"].endswith("Z")
    assert entry["details"] == {"name": "first light"}


async def test_changes_have_an_entry_each(service: Service) -> None:
    job_id = await service.submit()
    for verb in ("pause", "resume", "cancel", "retry", "cancel"):
        await service.http.post(f"/v1/jobs/{job_id}/{verb}")
    await service.http.delete(f"/v1/jobs/{job_id}")
    blob = await service.upload(b"weights")
    model = (await service.http.post("/v1/models", json={"name": "big", "blob": blob})).json()
    await service.http.post("/v1/models/big/evaluations", json={"dataset": "digits"})
    await service.http.delete("/v1/models/big")
    await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob})
    await service.http.delete("/v1/datasets/mine")
    await service.http.patch("/v1/projects/default", json={"limits": {"jobs_queued": 5}})
    assert await actions(service) == [
        "job.submit", "job.pause", "job.resume", "job.cancel", "job.retry", "job.cancel", "job.delete",
        "upload.create", "upload.complete", "model.register", "evaluation.submit", "model.delete",
        "dataset.register", "dataset.delete", "project.change",
    ]  # fmt: skip
    assert {row["resource"] for row in await entries(service) if row["action"].startswith("job.")} == {job_id}
    assert [row["resource"] for row in await entries(service, resource=model["id"])] == [model["id"]] * 2


async def test_what_changes_nothing_has_no_entry(service: Service) -> None:
    headers = {"Idempotency-Key": "k"}
    for _ in range(2):
        await service.http.post("/v1/jobs", json=SUPERVISED, headers=headers)
    await service.http.get("/v1/jobs")
    await service.http.post("/v1/jobs/validate", json=SUPERVISED)
    await service.http.post("/v1/jobs", json={})
    await service.http.post("/v1/jobs/job_0/cancel")
    assert await actions(service) == ["job.submit"]


async def test_entry_and_change_are_one_transaction(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = await service.submit()

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the entry cannot be written")

    monkeypatch.setattr(audit, "append", fails)
    assert (await service.http.post(f"/v1/jobs/{job_id}/cancel")).status_code == 500
    assert (await service.db.read(jobs.get, job_id)).status == "queued"


async def test_refusals_of_a_key_without_the_right_and_of_unknown_keys(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.auth.WRONG_KEY_S", 0.0)
    operator = await service.key("operator", name="op")
    async with service.holder(await service.key("reader", name="rob")) as rob:
        problem(await rob.http.post("/v1/jobs", json=SUPERVISED), 403, "role_forbidden")
        problem(await rob.http.get("/v1/audit"), 403, "role_forbidden")
    wrong = {"Authorization": "Bearer dk_0123456789_" + "0" * 32}
    problem(await service.http.get("/v1/jobs", headers=wrong), 401, "unauthorized")
    problem(await service.http.get("/v1/jobs"), 401, "unauthorized")
    async with service.holder(operator) as op:
        rows = await entries(op, outcome="refused")
    assert [(row["action"], row["key_name"], row["project"]) for row in rows] == [
        ("request.refused", "rob", "default"),
        ("request.refused", "rob", "default"),
        ("key.refused", None, None),
        ("key.refused", None, None),
    ]
    assert rows[0]["details"] == {"method": "POST", "path": "/v1/jobs"}
    assert [row["details"]["prefix"] for row in rows[2:]] == ["0123456789", None]
    assert "0" * 32 not in str(rows)


async def test_refusals_are_bounded_and_the_others_counted(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.auth.WRONG_KEY_S", 0.0)
    monkeypatch.setattr(audit_of_requests, "REFUSALS_AT_ONCE", 3)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    operator = await service.key("operator")
    for _ in range(9):
        await service.http.get("/v1/jobs")
    now += 21
    await service.http.get("/v1/jobs")
    async with service.holder(operator) as op:
        rows = await entries(op, action="key.refused")
    assert [row["details"].get("left_out") for row in rows] == [None, None, None, 6]


async def test_audit_is_read_by_admins_of_the_project_and_the_operator(service: Service) -> None:
    operator = await service.key("operator", name="op")
    ann, eve = await service.key("admin", "ours", "ann"), await service.key("admin", "theirs", "eve")
    async with service.holder(ann) as us, service.holder(eve) as them, service.holder(operator) as op:
        mine = await us.submit()
        theirs = await them.submit()
        assert [row["resource"] for row in await entries(us, action="job.submit")] == [mine]
        assert await entries(us, project="theirs") == await entries(us, project="none") == []
        assert [row["resource"] for row in await entries(op, action="job.submit")] == [mine, theirs]
        assert [row["resource"] for row in await entries(op, project="theirs", action="job.submit")] == [theirs]
        await op.http.patch("/v1/projects/ours", json={"limits": {"jobs_queued": 3}})
        (entry,) = await entries(us, action="project.change")
        assert (entry["key_name"], entry["details"]) == ("op", {"limits": {"jobs_queued": 3}})


async def test_audit_is_paged(service: Service) -> None:
    for _ in range(3):
        await service.submit()
    first = (await service.http.get("/v1/audit", params={"limit": 2})).json()
    second = (await service.http.get("/v1/audit", params={"limit": 2, "after": first["next"]})).json()
    assert (len(first["data"]), len(second["data"]), second["next"]) == (2, 1, None)


async def test_no_request_changes_the_audit_log(service: Service) -> None:
    methods = {method for path, one in service.app.openapi()["paths"].items() if "audit" in path for method in one}
    assert methods <= {"get", "head"}


async def test_every_route_that_changes_something_has_a_named_action(service: Service) -> None:
    named = {
        action_of(method.upper(), path)
        for path, operations in service.app.openapi()["paths"].items()
        for method in operations
        if method.upper() not in READS
    }
    verbs = {str(action).partition(".")[2] for action in named if action}
    assert all(action is None or (action.count(".") == 1 and len(action) <= 40) for action in named)
    assert {"submit", "cancel", "register", "delete", "create", "change"} <= verbs
    assert {"job.submit", "evaluation.submit", "key.rotate", "key.revoke", "project.create"} <= named


async def test_changes_of_routes_that_write_no_entry_are_written_after_the_answer(service: Service) -> None:
    async def poke(thing_id: str, caller: Caller, fail: bool = False) -> Response:
        return Response(status_code=409 if fail else 204)

    service.app.add_api_route("/v1/things/{thing_id}/poke", poke, methods=["POST"])
    await service.http.post("/v1/things/t1/poke", params={"fail": True})
    await service.http.post("/v1/things/t2/poke")
    (entry,) = await entries(service)
    assert (entry["action"], entry["resource"], entry["key_name"]) == ("thing.poke", "t2", "local")
