"""Registrations are rows: they outlive the request and the server, and end with DELETE."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from api.inspections import Refused, while_wanted
from api.places import AskerBusy, Busy, Places
from api.registrations import LOST, MAX_ATTEMPTS, Registrations
from api.routes import datasets, models
from api.schemas import DatasetView, ModelView
from kdcore.spec import DataOptions
from store import tables
from tests.api.conftest import DATASET, MODEL, Service, problem

pytestmark = pytest.mark.anyio


@pytest.fixture
async def slow(service: Service) -> AsyncIterator[Service]:
    """A service whose inspections wait for `service.inspector.gate`, and whose requests do not wait for them."""
    service.inspector.gate = asyncio.Event()
    service.inspector.counted = [(1, 10), (4, 10)]
    registrations(service).wait_s = 0.01
    yield service
    service.inspector.gate.set()


def registrations(service: Service) -> Registrations:
    found: Registrations = service.app.state.registrations
    return found


async def add(service: Service, name: str = "mine", *, content: bytes = b"pictures", **more: Any) -> httpx.Response:
    return await service.http.post("/v1/datasets", json={"name": name, "blob": await service.upload(content), **more})


async def shown(service: Service, path: str = "/v1/datasets/mine") -> Any:
    answer = await service.http.get(path)
    return answer.json() if answer.status_code == 200 else None


async def when(service: Service, state: str | None, path: str = "/v1/datasets/mine") -> Any:
    """Wait until the row has this state; None: until it is gone."""
    for _ in range(200):
        row = await shown(service, path)
        if (row and row["state"]) == state:
            return row
        await asyncio.sleep(0.01)
    raise AssertionError(row)


async def running(service: Service, number: int) -> None:
    for _ in range(200):
        if service.inspector.running == number:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(service.inspector.running)


def open_gate(service: Service) -> None:
    assert service.inspector.gate is not None
    service.inspector.gate.set()


async def change(service: Service, **values: Any) -> None:
    def write(connection: Any) -> None:
        rows = tables.datasets
        connection.execute(update(rows).where(rows.c.state == "inspecting").values(**values))

    await service.db.write(write)


async def test_register_answers_202_for_a_long_inspection_and_the_row_becomes_ready(slow: Service) -> None:
    answer = await add(slow)
    row = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (202, f"/v1/datasets/{row['id']}")
    assert (row["state"], row["facts"], row["error"]) == ("inspecting", None, None)
    assert DatasetView.model_validate(row)
    await running(slow, 1)
    await registrations(slow).once()
    assert (await shown(slow))["progress"] == {"done": 4, "total": 10}
    listed = (await slow.http.get("/v1/datasets")).json()["data"]
    assert [one["state"] for one in listed if one["id"]] == ["inspecting"]
    open_gate(slow)
    row = await when(slow, "ready")
    assert row["facts"] == DATASET.model_dump(mode="json") and row["progress"] is None


async def test_register_model_answers_202_and_keeps_what_was_stated(slow: Service) -> None:
    blob = await slow.upload(b"weights")
    body = {"name": "mine", "blob": blob, "class_names": list("abcdefghij")}
    answer = await slow.http.post("/v1/models", json=body)
    assert answer.status_code == 202 and ModelView.model_validate(answer.json())
    open_gate(slow)
    assert (await when(slow, "ready", "/v1/models/mine"))["facts"]["class_names"] == list("abcdefghij")


async def test_register_keeps_a_refusal_after_202_and_the_name_is_free(slow: Service) -> None:
    blob = await slow.upload(b"junk")
    refused = Refused("dataset_unreadable", "3.png is cut short", "replace it")
    slow.inspector.answers[blob.removeprefix("sha256:")] = refused
    assert (await add(slow, content=b"junk")).status_code == 202
    problem(await add(slow), 409, "name_taken")
    open_gate(slow)
    row = await when(slow, "refused")
    fault = {"pointer": "/blob", "message": "3.png is cut short", "code": "dataset_unreadable"}
    expected = {"code": "unusable", "message": "3.png is cut short", "hint": "replace it"}
    assert {name: row["error"][name] for name in expected} == expected
    assert row["error"]["errors"][0].items() >= fault.items()
    assert DatasetView.model_validate(row) and row["facts"] is None
    answer = await add(slow)
    assert answer.json()["id"] != row["id"]
    assert (await when(slow, "ready"))["id"] == answer.json()["id"]


async def test_register_with_strict_is_refused_for_a_warning_after_202(slow: Service) -> None:
    blob = await slow.upload(b"pictures")
    slow.inspector.answers[blob.removeprefix("sha256:")] = DATASET.model_copy(update={"test_carved": True})
    await add(slow, strict=True)
    open_gate(slow)
    error = (await when(slow, "refused"))["error"]
    assert error["code"] == "warning_refused" and "test_split_carved" in error["errors"][0]["message"]


async def test_register_whose_model_does_not_fit_what_was_stated_is_refused_after_202(slow: Service) -> None:
    blob = await slow.upload(b"weights")
    await slow.http.post("/v1/models", json={"name": "mine", "blob": blob, "class_names": ["a", "b"]})
    open_gate(slow)
    error = (await when(slow, "refused", "/v1/models/mine"))["error"]
    assert [one["pointer"] for one in error["errors"]] == ["/class_names"] and MODEL.num_classes == 10


async def test_register_of_the_same_bytes_and_options_inspects_once(slow: Service) -> None:
    await asyncio.gather(*(add(slow, name, image_size=8) for name in ("one", "two")))
    await add(slow, "three", image_size=16)
    await running(slow, 2)
    open_gate(slow)
    for name in ("one", "two", "three"):
        await when(slow, "ready", f"/v1/datasets/{name}")
    assert [given["image_size"] for *_, given in slow.inspector.requests] == [8, 16]


async def test_delete_cancels_an_inspection_that_nobody_else_needs(slow: Service) -> None:
    object.__setattr__(slow.app.state.inspections, "linger_s", 0.0)
    for name in ("mine", "other"):
        await add(slow, name)
    await running(slow, 1)
    assert (await slow.http.delete("/v1/datasets/mine")).status_code == 204
    await asyncio.sleep(0.05)
    assert slow.inspector.running == 1, "the other one needs it"
    await slow.http.delete("/v1/datasets/other")
    await running(slow, 0)
    assert await shown(slow) is None
    assert slow.app.state.inspections._runs == {}


async def test_register_waits_for_the_start_of_its_child_if_it_starts_at_once(slow: Service, monkeypatch) -> None:
    slow.inspector.counted = []
    adding = asyncio.create_task(add(slow))
    await running(slow, 1)
    await asyncio.sleep(0.1)
    assert not adding.done(), "the file is not opened yet"
    (held,) = registrations(slow)._held.values()
    held.count(0, 0)
    assert (await adding).json()["progress"] is None
    monkeypatch.setattr(slow.inspector, "is_free", lambda kind: False)
    assert (await add(slow, "second", image_size=8)).status_code == 202


async def test_delete_ends_the_wait_of_the_registration(slow: Service) -> None:
    registrations(slow).wait_s = 30
    adding = asyncio.create_task(add(slow))
    await running(slow, 1)
    assert (await slow.http.delete("/v1/datasets/mine")).status_code == 204
    problem(await adding, 404, "not_found")


async def test_once_ends_the_inspection_of_a_row_that_another_server_deleted(slow: Service) -> None:
    object.__setattr__(slow.app.state.inspections, "linger_s", 0.0)
    await add(slow)
    await running(slow, 1)
    await slow.db.write(datasets.KIND.registry.delete, "default", "mine")
    await registrations(slow).once()
    await running(slow, 0)
    assert await shown(slow) is None


async def test_once_takes_over_a_model_with_the_weights_that_were_chosen(slow: Service) -> None:
    other = Registrations(slow.db, slow.app.state.inspections, slow.settings, (models.KIND, datasets.KIND))
    blob = await slow.upload(b"averaged and raw")
    sent = {"name": "mine", "blob": blob, "part": "student", "averaged": False, "image_size": 32}
    assert (await slow.http.post("/v1/models", json=sent)).status_code == 202
    await running(slow, 1)

    def expire(connection: Any) -> None:
        connection.execute(update(tables.models).values(lease_until=1.0))

    await slow.db.write(expire)
    await registrations(slow).stop()
    await other.once()
    await running(slow, 1)
    chosen = {"part": "student", "averaged": False}
    asked = [options for kind, _, options in slow.inspector.requests if kind == "model"]
    assert asked and all(options == chosen for options in asked)
    open_gate(slow)
    assert (await when(slow, "ready", "/v1/models/mine"))["facts"]["image_size"] == [32, 32]
    await other.stop()


async def test_once_takes_over_the_inspections_of_a_server_that_died(slow: Service) -> None:
    """A second server on the same database; the first one still runs, but has lost the row."""
    other = Registrations(slow.db, slow.app.state.inspections, slow.settings, (models.KIND, datasets.KIND))
    await add(slow)
    await running(slow, 1)
    await other.once()
    assert other._held == {}, "its lease has not expired"
    await change(slow, lease_until=1.0)
    await other.once()
    assert len(other._held) == 1
    await registrations(slow).once()
    assert registrations(slow)._held == {}, "it has noticed"
    open_gate(slow)
    assert (await when(slow, "ready"))["facts"]["train"] == DATASET.train
    await other.stop()


async def test_inspection_that_crashes_is_tried_again_and_refused_at_last(slow: Service, monkeypatch) -> None:
    monkeypatch.setattr("api.registrations.RETRY_S", 0.0)
    blob = await slow.upload(b"bomb")
    crashed = Refused("internal", "the inspection ended with signal 9", final=False)
    slow.inspector.answers[blob.removeprefix("sha256:")] = crashed
    await add(slow, content=b"bomb")
    open_gate(slow)
    for attempt in range(1, MAX_ATTEMPTS):
        for _ in range(200):
            if len(slow.inspector.requests) == attempt and not registrations(slow)._held:
                break
            await asyncio.sleep(0.01)
        row = await shown(slow)
        assert (row["state"], row["error"]) == ("inspecting", None)
        await registrations(slow).once()
    row = await when(slow, "refused")
    assert row["error"]["message"] == crashed.message and len(slow.inspector.requests) == MAX_ATTEMPTS


async def test_row_whose_servers_died_again_and_again_is_refused(slow: Service) -> None:
    await add(slow)
    await change(slow, lease_until=1.0, attempts=MAX_ATTEMPTS, owner="a server that died")
    await registrations(slow).once()
    assert (await when(slow, "refused"))["error"]["message"] == LOST["message"]


async def test_stop_lets_other_servers_begin_at_once_and_does_not_count(slow: Service) -> None:
    await add(slow)
    await running(slow, 1)
    await registrations(slow).stop()
    other = Registrations(slow.db, slow.app.state.inspections, slow.settings, (models.KIND, datasets.KIND))
    await asyncio.sleep(0.01)
    await other.once()
    (held,) = other._held.values()
    assert held.entry.attempts == 1
    open_gate(slow)
    await when(slow, "ready")


async def test_refusal_while_the_request_waits_leaves_no_row(service: Service) -> None:
    blob = await service.upload(b"bomb")
    service.inspector.answers[blob.removeprefix("sha256:")] = Refused("internal", "signal 9", final=False)
    problem(await add(service, content=b"bomb"), 422, "unusable")
    assert await shown(service) is None


@pytest.mark.parametrize(
    ("state", "values", "text"),
    [
        ("inspecting", {"progress": {"done": 1200, "total": 60000}}, "inspected (1,200 of 60,000 images)"),
        ("inspecting", {}, "GET /v1/datasets/mine says ready"),
        (
            "refused",
            {"state": "refused", "lease_until": None, "error": {**LOST, "message": "no pictures"}},
            "no pictures",
        ),
    ],
)
async def test_job_that_names_a_data_set_that_is_not_ready_is_refused(
    slow: Service, monkeypatch, state, values, text
) -> None:
    monkeypatch.setattr("api.references.WAIT_S", 0.0)
    await add(slow)
    if values:
        await change(slow, **values)
    answer = await slow.http.post("/v1/jobs", json={"dataset": "mine", "student": "convnet4", "method": "supervised"})
    (fault,) = problem(answer, 422, "spec_invalid")["errors"]
    assert (fault["pointer"], fault["code"], fault["got"]) == ("/dataset", "not_ready", f"state: {state}")
    assert text in fault["message"]


async def test_job_waits_for_an_inspection_that_counts_no_images_yet(slow: Service) -> None:
    await add(slow)
    body = {"dataset": "mine", "student": "convnet4", "method": "supervised"}
    submitting = asyncio.create_task(slow.http.post("/v1/jobs", json=body))
    await running(slow, 1)
    open_gate(slow)
    assert (await submitting).status_code == 201


async def test_job_and_evaluation_that_name_a_model_that_is_not_ready_are_refused(slow: Service, monkeypatch) -> None:
    monkeypatch.setattr("api.references.WAIT_S", 0.0)
    await slow.http.post("/v1/models", json={"name": "mine", "blob": await slow.upload(b"weights")})
    spec = {"dataset": "digits", "student": "convnet4", "method": "kd", "teacher": {"checkpoint": "model:mine"}}
    (fault,) = problem(await slow.http.post("/v1/jobs", json=spec), 422, "spec_invalid")["errors"]
    assert (fault["pointer"], fault["code"]) == ("/teacher/checkpoint", "not_ready")
    student = {"architecture": "convnet4", "checkpoint": "model:mine"}
    spec = {"dataset": "digits", "student": student, "method": "supervised"}
    (fault,) = problem(await slow.http.post("/v1/jobs", json=spec), 422, "spec_invalid")["errors"]
    assert (fault["pointer"], fault["code"]) == ("/student/checkpoint", "not_ready")
    answer = await slow.http.post("/v1/models/mine/evaluations", json={"dataset": "digits"})
    assert "still being inspected" in problem(answer, 409, "not_ready")["detail"]


async def test_inspection_of_a_submit_ends_when_its_client_is_gone(slow: Service, monkeypatch) -> None:
    monkeypatch.setattr("api.inspections.GONE_S", 0.01)
    object.__setattr__(slow.app.state.inspections, "linger_s", 0.0)
    digest = (await slow.upload(b"pictures")).removeprefix("sha256:")
    gone = asyncio.Event()

    async def client_gone() -> bool:
        return gone.is_set()

    work = slow.app.state.inspections.dataset(digest, DataOptions())
    asking = asyncio.create_task(while_wanted(work, client_gone))
    await running(slow, 1)
    gone.set()
    with pytest.raises(Refused, match="closed the connection"):
        await asking
    await running(slow, 0)


async def test_thumbnails_of_a_data_set_that_is_not_ready_or_has_none(slow: Service) -> None:
    await add(slow)
    problem(await slow.http.get("/v1/datasets/mine/thumbnails"), 409, "not_ready")
    open_gate(slow)
    assert (await when(slow, "ready"))["thumbnails"] is None
    problem(await slow.http.get("/v1/datasets/mine/thumbnails"), 404, "not_found")


async def test_register_is_refused_if_too_many_inspections_wait(slow: Service, monkeypatch) -> None:
    """The answer says when to come again, and there is no row."""

    class Full(Places):
        def require_room(self, asker: str) -> None:
            raise error

    monkeypatch.setattr(slow.inspector, "_places_of_data", Full(1))
    blob = await slow.upload(b"pictures")
    body = {"name": "mine", "blob": blob}
    for error, status, code in (
        (AskerBusy("32 inspections of yours wait already"), 429, "too_many_inspections"),
        (Busy("128 inspections wait already"), 503, "inspections_busy"),
    ):
        answer = await slow.http.post("/v1/datasets", json=body)
        assert problem(answer, status, code)["detail"] == str(error)
        assert int(answer.headers["retry-after"]) > 0
    assert await shown(slow) is None


@pytest.mark.parametrize("where", ["jobs", "jobs/validate"])
async def test_job_whose_data_cannot_wait_for_an_inspection_is_told_so(slow: Service, monkeypatch, where: str) -> None:
    async def full(*_: Any, **__: Any) -> None:
        raise AskerBusy("32 inspections of yours wait already")

    monkeypatch.setattr(slow.inspector, "inspect", full)
    blob = await slow.upload(b"pictures")
    spec = {"dataset": f"blob:{blob}", "student": "convnet4", "method": "supervised"}
    problem(await slow.http.post(f"/v1/{where}", json=spec), 429, "too_many_inspections")


async def test_registration_that_was_taken_over_and_finds_no_place_waits(slow: Service, monkeypatch) -> None:
    async def full(*_: Any, **__: Any) -> None:
        raise Busy("128 inspections wait already")

    await add(slow)
    await registrations(slow).stop()
    monkeypatch.setattr(slow.inspector, "inspect", full)
    await change(slow, lease_until=1.0)
    await registrations(slow).once()
    for _ in range(100):
        row = await shown(slow)
        if row["error"] or not registrations(slow)._held:
            break
        await asyncio.sleep(0.01)
    assert (await shown(slow))["state"] == "inspecting"


async def test_register_has_turns_by_key_and_project(slow: Service) -> None:
    askers = []
    given = slow.inspector.inspect

    async def inspect(*subject: Any, asker: str = "", **options: Any) -> Any:
        askers.append(asker)
        return await given(*subject, **options)

    slow.inspector.inspect = inspect  # type: ignore[method-assign]
    await add(slow)
    await running(slow, 1)
    assert askers == ["default/"]
    open_gate(slow)
    await when(slow, "ready")
