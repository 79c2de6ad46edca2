"""What is kept and what was collected, counted from real files and rows."""

import asyncio

import pytest

from api.schemas import StorageView
from store import collections
from tests.api.conftest import Service, problem

pytestmark = pytest.mark.anyio


async def test_files_are_counted_by_kind(service: Service) -> None:
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
    told = (await service.http.get("/v1/storage")).json()
    assert StorageView.model_validate(told, strict=True)
    nothing = {"files": 0, "bytes": 0}
    assert told["usage"] == {
        "blobs": {"files": 2, "bytes": 19},
        "checkpoints": nothing,
        "logs": {"files": 1, "bytes": 6},
        "uploads": {"files": 1, "bytes": 4},
        "trash": nothing,
        "cache": {"files": 1, "bytes": 100},
    }
    assert told["free_bytes"] > 0
    assert (told["min_free_bytes"], told["collections"]) == (0, [])


async def test_collections_are_told_the_newest_first(service: Service) -> None:
    removed = {"blobs": {"count": 3, "bytes": 300}}
    ids = []
    for _ in range(3):
        began = await service.db.write(collections.begin, "host-7", 0.0)
        assert began is not None
        ids.append(began)
        # Two of one millisecond have no order.
        await asyncio.sleep(0.005)
    await service.db.write(collections.end, ids[0], removed, "logs: busy")
    told = (await service.http.get("/v1/storage")).json()
    assert StorageView.model_validate(told, strict=True)
    assert [one["id"] for one in told["collections"]] == ids[::-1]
    last = told["collections"][-1]
    assert (last["host"], last["removed"], last["error"]) == ("host-7", removed, "logs: busy")
    assert last["ended_at"] >= last["began_at"]
    assert told["collections"][0]["ended_at"] is None
    fewer = (await service.http.get("/v1/storage", params={"limit": 1})).json()["collections"]
    assert [one["id"] for one in fewer] == ids[:1:-1]
    problem(await service.http.get("/v1/storage", params={"limit": 101}), 422, "invalid_request")
