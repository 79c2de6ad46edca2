"""Disk usage by project and of all, and the collector on request."""

import asyncio
import os

import pytest
from pydantic import TypeAdapter
from sqlalchemy import update

from base.wire import CollectionView, StorageView
from store import collections, tables
from store.records import database_now
from tests.api.conftest import Service, problem

pytestmark = pytest.mark.anyio


async def test_storage_counts_files_by_kind(service: Service) -> None:
    await service.upload(b"twelve bytes")
    await service.upload(b"seven b")
    half = await service.http.post("/v1/uploads", headers={"Upload-Length": "10"})
    await service.http.patch(f"/v1/uploads/{half.json()['id']}", headers={"Upload-Offset": "0"}, content=b"four")
    log = service.files.log_path("job_1", 1)
    log.parent.mkdir(parents=True)
    log.write_bytes(b"hello\n")
    cached = service.settings.home / "cache" / "digits" / "images"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(bytes(100))
    body = (await service.http.get("/v1/storage")).json()
    assert TypeAdapter(StorageView).validate_python(body, strict=True)
    nothing = {"files": 0, "bytes": 0}
    assert body["usage"] == {
        "blobs": {"files": 2, "bytes": 19},
        "checkpoints": nothing,
        "logs": {"files": 1, "bytes": 6},
        "uploads": {"files": 1, "bytes": 4},
        "trash": nothing,
        "cache": {"files": 1, "bytes": 100},
    }
    assert body["free_bytes"] > 0
    assert (body["min_free_bytes"], body["collections"]) == (0, [])


async def test_storage_lists_the_newest_collections_first(service: Service) -> None:
    removed = {"blobs": {"count": 3, "bytes": 300}}
    ids = []
    for _ in range(3):
        began = await service.db.write(collections.begin, "host-7", 0.0)
        assert began is not None
        ids.append(began)
        # Ids of one millisecond have no order.
        await asyncio.sleep(0.005)
    await service.db.write(collections.end, ids[0], removed, "logs: busy")
    body = (await service.http.get("/v1/storage")).json()
    assert TypeAdapter(StorageView).validate_python(body, strict=True)
    assert [one["id"] for one in body["collections"]] == ids[::-1]
    last = body["collections"][-1]
    assert (last["host"], last["removed"], last["error"]) == ("host-7", removed, "logs: busy")
    assert last["ended_at"] >= last["began_at"]
    assert body["collections"][0]["ended_at"] is None
    fewer = (await service.http.get("/v1/storage", params={"limit": 1})).json()["collections"]
    assert [one["id"] for one in fewer] == ids[:1:-1]
    problem(await service.http.get("/v1/storage", params={"limit": 101}), 422, "invalid_request")


async def aged(service: Service) -> None:
    """The database has collected for long: it is the right one for these files."""
    began = await service.db.write(collections.begin, "host-7", 0.0)
    assert began is not None

    def long_ago(connection: object) -> None:
        rows = tables.collections
        connection.execute(update(rows).values(began_at=database_now() - 10 * 86_400, ended_at=database_now()))  # type: ignore[attr-defined]

    await service.db.write(long_ago)


async def test_collect_now_frees_what_no_row_names_and_keeps_the_rest(service: Service) -> None:
    await aged(service)
    kept = await service.upload(b"a model")
    assert (await service.http.post("/v1/models", json={"name": "kept", "blob": kept})).status_code == 201
    job_id = await service.submit()
    artifacts = await service.succeed(job_id)
    unnamed = service.files.put_stream([b"of a job that was deleted"])
    answer = await service.http.post("/v1/storage/collections")
    assert answer.status_code == 201, answer.text
    body = answer.json()
    assert TypeAdapter(CollectionView).validate_python(body, strict=True)
    assert body["removed"]["blobs"] == {"count": 1, "bytes": unnamed.bytes}
    assert body["error"] is None
    assert not service.files.trash_path(unnamed.sha256).exists() and not service.files.exists(unnamed.sha256)
    for digest in (kept.removeprefix("sha256:"), *artifacts.values()):
        assert service.files.exists(digest)
    newest = (await service.http.get("/v1/storage")).json()["collections"][0]
    assert newest == body


async def test_collect_now_spares_what_a_job_is_publishing(service: Service) -> None:
    """Its artifacts are blobs before the transaction that names them."""
    await aged(service)
    job_id = await service.submit()
    await service.claim(job_id)
    published = service.files.put_stream([b"student"])

    def publishing(connection: object) -> None:
        connection.execute(update(tables.jobs).values(phase="publishing"))  # type: ignore[attr-defined]

    await service.db.write(publishing)
    await service.http.post("/v1/storage/collections")
    assert service.files.exists(published.sha256)
    os.utime(service.files.path(published.sha256), (0, 0))
    await service.http.post("/v1/storage/collections")
    assert not service.files.exists(published.sha256), "no job publishes for hours"
