"""No project learns anything of another: what another has is answered exactly as what nobody has.

The test of all routes reads the OpenAPI document, so that a new route is tried without being named here. A new kind of
id must be: `theirs` says what each parameter of a path names.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from store import registry, tables
from tests.api.conftest import SUPERVISED, Service

pytestmark = pytest.mark.anyio

PUBLIC = ("/v1/methods/{name}", "/v1/architectures")
"""Paths whose parameter names no row."""
LABELLED = {"json": {"labels": {"taken": "over"}}}
SENT: dict[str, dict[str, Any]] = {
    "/v1/jobs/{job_id}": LABELLED,
    "/v1/models/{name_or_id}": LABELLED,
    "/v1/datasets/{name_or_id}": LABELLED,
    "/v1/models/{name_or_id}/evaluations": {"json": {"dataset": "digits"}},
    "/v1/jobs/{job_id}/exports": {"json": {"export": "onnx"}},
    "/v1/webhooks/{webhook_id}": {"json": {"enabled": True}},
    "/v1/jobs/{job_id}/predict": {"content": b"picture", "params": {"wait": 0}},
    "/v1/uploads/{upload_id}": {"content": b"more", "headers": {"Upload-Offset": "0"}},
}
"""What a request needs so that it is not refused for its form."""


@dataclass
class Two:
    """What project `theirs` has, and the clients of two members."""

    service: Service
    theirs: Service
    ours: Service
    job: str
    waiting: str
    digests: dict[str, str]
    model: dict[str, Any]
    dataset: dict[str, Any]
    open_upload: str
    upload: str
    blob: str
    key_id: str
    webhook: str
    delivery: str
    benchmark: str
    prediction: str

    def named(self, path: str) -> dict[str, str]:
        """The parameters of a path with their ids; KeyError for a parameter that is not known here."""
        entry = self.model if path.startswith("/v1/models") else self.dataset
        known = {
            "job_id": self.job,
            "upload_id": self.open_upload,
            "name_or_id": entry["id"],
            "key_id": self.key_id,
            "webhook_id": self.webhook,
            "delivery_id": self.delivery,
            "key": self.benchmark,
            "prediction_id": self.prediction,
            "name": "student.safetensors" if "/artifacts/" in path else "team-42",
        }
        return {name: known[name] for name in known if f"{{{name}}}" in path}


@pytest.fixture
async def two(service: Service) -> AsyncIterator[Two]:
    key = await service.key("admin", "team-42", "ann-42")
    ours = await service.key("admin", "ours", "bob-43")
    async with service.holder(key) as them, service.holder(ours) as us:
        job = await them.submit(name="their job")
        digests = await them.succeed(job)
        blob = await them.upload(b"their bytes")
        part = await them.http.post("/v1/uploads", headers={"Upload-Length": "10"})
        upload = await them.http.post("/v1/uploads", content=b"their other bytes")
        model = await them.http.post("/v1/models", json={"name": "their-model", "blob": blob})
        dataset = await them.http.post("/v1/datasets", json={"name": "digits", "blob": blob})
        network = {"architecture": "convnet4", "image_size": 8}
        benchmark = (await them.http.post("/v1/benchmarks", json=network)).json()["key"]
        keys = (await them.http.get("/v1/keys")).json()["data"]
        webhook = (await them.http.post("/v1/webhooks", json={"url": "https://example.org/team-42"})).json()["id"]
        delivery = (await them.http.post(f"/v1/webhooks/{webhook}/test")).json()["id"]
        await them.http.patch(f"/v1/webhooks/{webhook}", json={"enabled": False})  # Nothing changes by itself then.
        asked = await them.http.post(f"/v1/jobs/{job}/predict", content=b"their picture", params={"wait": 0})
        sheet = {"sha256": digests["report.json"], "side": 8, "columns": 1, "classes": [0]}
        row = tables.datasets.update().where(tables.datasets.c.id == dataset.json()["id"])
        await service.db.write(lambda connection: connection.execute(row.values(thumbnails=sheet)))
        yield Two(
            service, them, us, job, await them.submit(name="waits"), digests, model.json(), dataset.json(),
            part.json()["id"], upload.json()["id"], blob, keys[0]["id"], webhook, delivery, benchmark,
            asked.json()["id"],
        )  # fmt: skip


def unknown(id: str) -> str:
    """An id, name or digest of the same form and length that no row has."""
    head, mark, tail = id.rpartition("_") if "_" in id else id.rpartition(":")
    return head + mark + ("z" if mark == "_" else "0") * len(tail)


def comparable(answer: httpx.Response, *ids: str) -> tuple[int, str, dict[str, str]]:
    """Status, body and headers, without the request's id and what was asked for."""
    text = answer.text
    for one in ids:
        text = text.replace(one, "?")
    headers = {name: value for name, value in answer.headers.items() if name != "x-request-id"}
    return answer.status_code, text.replace(answer.headers["x-request-id"], "!"), headers


async def test_every_route_answers_another_projects_ids_as_unknown_ones(two: Two) -> None:
    document = two.service.app.openapi()
    tried = 0
    before = await everything(two)
    for path, verbs in document["paths"].items():
        if "{" not in path or path in PUBLIC:
            continue
        named = two.named(path)
        assert path.count("{") == len(named), f"{path}: Two.named() must say what its parameters name"
        verbs_here = [verb for verb in verbs if verb in ("get", "post", "put", "patch", "delete")]
        for verb in [*verbs_here, "head"] if "get" in verbs_here else verbs_here:
            sent = SENT.get(path, {}) if verb in ("post", "patch", "put") else {}
            first = next(iter(named))
            their_id, no_id = named[first], unknown(named[first])
            theirs = await two.ours.http.request(verb, path.format(**named), **sent)
            nobodys = await two.ours.http.request(verb, path.format(**{**named, first: no_id}), **sent)
            assert comparable(theirs, their_id) == comparable(nobodys, no_id), (verb, path)
            assert theirs.status_code in (403, 404, 405), (verb, path, theirs.text)
            tried += 1
    assert tried > 25
    assert await everything(two) == before


async def everything(two: Two) -> list[Any]:
    """What the other project's member sees: a request of ours must not have changed it."""
    paths = ["/v1/jobs", f"/v1/jobs/{two.job}", f"/v1/jobs/{two.waiting}", "/v1/models", "/v1/datasets"]
    paths += [f"/v1/webhooks/{two.webhook}", f"/v1/webhooks/{two.webhook}/deliveries?status=failed"]
    paths += [f"/v1/uploads/{two.open_upload}", f"/v1/uploads/{two.upload}", f"/v1/jobs/{two.job}/artifacts"]
    return [(await two.theirs.http.get(path)).json() for path in paths]


async def test_registered_names_are_those_of_the_own_project(two: Two) -> None:
    for path, entry in (("/v1/models", two.model), ("/v1/datasets", two.dataset)):
        name = "their-model" if path == "/v1/models" else "nothing-here"
        answer = await two.ours.http.get(f"{path}/{name}")
        nobodys = await two.ours.http.get(f"{path}/other-model")
        assert comparable(answer, name)[:2] == comparable(nobodys, "other-model")[:2]
        assert entry["id"]


async def test_lists_have_nothing_of_another_project(two: Two) -> None:
    marks = [
        two.job,
        two.waiting,
        two.model["id"],
        two.dataset["id"],
        two.open_upload,
        two.upload,
        two.key_id,
        two.webhook,
    ]
    marks += [two.blob, *two.digests.values(), "their job", "their-model", "team-42", "ann-42"]
    for path, verbs in two.service.app.openapi()["paths"].items():
        if "get" not in verbs or "{" in path:
            continue
        answer = await two.ours.http.get(path)
        found = [mark for mark in marks if mark in answer.text]
        assert not found, (path, found)


async def test_references_to_another_project_are_those_to_nothing(two: Two) -> None:
    supervised, distilled = SUPERVISED, {**SUPERVISED, "method": "kd"}
    specs = [
        ({**distilled, "teacher": "job:{}"}, two.job),
        ({**distilled, "teacher": "job:{}"}, two.waiting),
        ({**distilled, "teacher": "model:{}"}, "their-model"),
        ({**distilled, "teacher": "model:{}"}, two.model["id"]),
        ({**distilled, "teacher": "blob:{}"}, two.blob),
        ({**distilled, "teacher": {"program": "blob:{}"}}, two.blob),
        ({**distilled, "teacher": {"logits": "blob:{}"}}, two.blob),
        ({**supervised, "student": {"architecture": "convnet8", "checkpoint": "job:{}"}}, two.job),
        ({**supervised, "student": {"architecture": "convnet8", "checkpoint": "blob:{}"}}, two.blob),
        ({**supervised, "dataset": "{}"}, two.dataset["id"]),
        ({**supervised, "dataset": "blob:{}"}, two.blob),
        ({**supervised, "dataset": "blob:{}"}, f"sha256:{two.digests['student.safetensors']}"),
        ({**supervised, "unlabelled": "blob:{}"}, two.blob),
        ({**distilled, "teacher": "weights:resnet20", "baseline": "job:{}"}, two.job),
    ]
    for spec, name in specs:
        no_name = unknown(name) if ":" in name or "_" in name else "other-model"
        for path in ("/v1/jobs", "/v1/jobs/validate?probe=false"):
            theirs = await two.ours.http.post(path, json=filled(spec, name))
            nobodys = await two.ours.http.post(path, json=filled(spec, no_name))
            assert comparable(theirs, name) == comparable(nobodys, no_name), spec
            assert name in theirs.text
    for path in ("/v1/models", "/v1/datasets"):
        theirs = await two.ours.http.post(path, json={"name": "mine", "blob": two.blob})
        nobodys = await two.ours.http.post(path, json={"name": "mine", "blob": unknown(two.blob)})
        assert comparable(theirs, two.blob) == comparable(nobodys, unknown(two.blob))
        assert theirs.status_code == 404


def filled(spec: dict[str, Any], name: str) -> Any:
    return json.loads(json.dumps(spec).replace("{}", name))


async def test_bytes_that_a_project_uploads_itself_are_its_own(two: Two) -> None:
    """The same file in two projects is one file on disk, and each has it by its own upload."""
    assert await two.ours.upload(b"their bytes") == two.blob
    answer = await two.ours.http.post("/v1/models", json={"name": "their-model", "blob": two.blob})
    assert answer.status_code == 201, "a name is taken in its own project only"
    spec = {**SUPERVISED, "dataset": f"blob:{two.blob}"}
    assert (await two.ours.http.post("/v1/jobs/validate?probe=false", json=spec)).json()["valid"]


async def test_registered_digits_hides_the_built_in_one_in_its_own_project_only(two: Two) -> None:
    theirs = await two.theirs.http.post("/v1/jobs/validate?probe=false", json=SUPERVISED)
    ours = await two.ours.http.post("/v1/jobs/validate?probe=false", json=SUPERVISED)
    assert theirs.json()["resolved_spec"]["dataset"]["source"] == f"blob:{two.blob}"
    assert ours.json()["resolved_spec"]["dataset"]["source"] == "digits"


async def test_idempotency_keys_are_those_of_the_own_project(two: Two) -> None:
    headers = {"Idempotency-Key": "one"}
    theirs = await two.theirs.http.post("/v1/jobs", json={**SUPERVISED, "dataset": "digits"}, headers=headers)
    ours = await two.ours.http.post("/v1/jobs", json={**SUPERVISED, "name": "another body"}, headers=headers)
    assert (theirs.status_code, ours.status_code) == (201, 201)


async def test_workers_show_no_job_of_another_project(two: Two) -> None:
    from store import workers

    device = {"name": "cpu", "job": two.waiting, "state": "busy", "seen_s": 0.0, "memory_bytes": None}
    await two.service.db.write(workers.record_heartbeat, "w", "host", [device], two.waiting)
    for client, seen in ((two.theirs, two.waiting), (two.ours, None)):
        (worker,) = (await client.http.get("/v1/workers")).json()["data"]
        assert (worker["current_job"], worker["devices"][0]["job"]) == (seen, seen)
        assert worker["devices"][0]["state"] == "busy"


async def test_inspection_that_another_project_paid_for_tells_nothing(two: Two) -> None:
    """Facts by digest are shared, but only a project that has the bytes is shown them."""
    asked = len(two.service.inspector.requests)
    answer = await two.ours.http.post("/v1/models", json={"name": "mine", "blob": two.blob})
    assert answer.status_code == 404
    assert len(two.service.inspector.requests) == asked
    kept = await two.service.db.read(registry.models.list_page, "ours", registry.EntryQuery())
    assert kept == ([], None)
