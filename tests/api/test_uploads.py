"""Uploads: in one request, in parts, too large, with another checksum than announced."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from pydantic import TypeAdapter

from api.routes import uploads as route
from base.wire import UploadView
from store import uploads
from store.file_store import FileStore
from store.idempotency import Once
from store.settings import Settings
from tests.api.conftest import SUPERVISED, Service, problem, serving

pytestmark = pytest.mark.anyio

CONTENT = bytes(range(256)) * 10
DIGEST = hashlib.sha256(CONTENT).hexdigest()


async def chunks(content: bytes, size: int = 700) -> AsyncIterator[bytes]:
    for begin in range(0, len(content), size):
        yield content[begin : begin + size]


def left_over(service: Service) -> list[str]:
    return [path.name for path in (service.files.folder / "uploads").glob("*")]


async def begin(service: Service, length: int = len(CONTENT), **query: str) -> str:
    answer = await service.http.post("/v1/uploads", headers={"Upload-Length": str(length)}, params=query)
    assert answer.status_code == 201, answer.text
    assert answer.headers["upload-offset"] == "0"
    return answer.headers["location"]


async def test_create_upload_in_one_request(service: Service) -> None:
    query = {"filename": "weights.pt", "sha256": DIGEST}
    answer = await service.http.post("/v1/uploads", content=CONTENT, params=query)
    body = answer.json()
    assert answer.status_code == 201
    assert (body["blob"], body["status"], body["offset"], body["bytes"]) == (f"sha256:{DIGEST}", "complete", 2560, 2560)
    assert body["filename"] == "weights.pt"
    assert TypeAdapter(UploadView).validate_python(body, strict=True)
    assert service.files.path(DIGEST).read_bytes() == CONTENT
    assert left_over(service) == []
    assert (await service.http.get(answer.headers["location"])).json() == body


async def test_create_upload_of_unannounced_length(service: Service) -> None:
    answer = await service.http.post("/v1/uploads", content=chunks(CONTENT))
    assert answer.json()["blob"] == f"sha256:{DIGEST}"


async def test_create_upload_of_the_same_bytes_is_the_same_blob(service: Service) -> None:
    assert await service.upload(CONTENT) == await service.upload(CONTENT)


async def test_create_upload_refuses_another_checksum_and_leaves_nothing(service: Service) -> None:
    answer = await service.http.post("/v1/uploads", content=CONTENT, params={"sha256": "0" * 64})
    problem(answer, 422, "checksum_mismatch")
    assert not service.files.exists(DIGEST)
    assert left_over(service) == []


async def test_create_upload_refuses_a_malformed_digest(service: Service) -> None:
    body = problem(await service.http.post("/v1/uploads?sha256=abc", content=b"x"), 422, "invalid_request")
    assert body["errors"][0]["pointer"] == "?sha256"


async def test_create_upload_refuses_an_empty_body(service: Service) -> None:
    problem(await service.http.post("/v1/uploads"), 400, "malformed_body")


async def test_create_upload_refuses_more_than_upload_max_bytes(settings: Settings) -> None:
    async with serving(settings.model_copy(update={"upload_max_bytes": 1000})) as service:
        for content in (CONTENT, chunks(CONTENT)):
            body = problem(await service.http.post("/v1/uploads", content=content), 413, "too_large")
            assert body["limit_bytes"] == 1000
        problem(await service.http.post("/v1/uploads", headers={"Upload-Length": "1001"}), 413, "too_large")
        assert left_over(service) == []


async def test_append_upload_in_parts(service: Service) -> None:
    upload = await begin(service, sha256=DIGEST)
    for offset in (0, 1000, 2000):
        part = CONTENT[offset : offset + 1000]
        answer = await service.http.patch(upload, content=part, headers={"Upload-Offset": str(offset)})
        assert answer.status_code == 200, answer.text
        assert answer.headers["upload-offset"] == str(offset + len(part))
        assert (answer.json()["status"] == "complete") == (offset == 2000)
    assert answer.json()["blob"] == f"sha256:{DIGEST}"
    assert service.files.path(DIGEST).read_bytes() == CONTENT


async def test_upload_progress_by_head_and_get(service: Service) -> None:
    upload = await begin(service)
    await service.http.patch(upload, content=CONTENT[:1000], headers={"Upload-Offset": "0"})
    head = await service.http.head(upload)
    assert (head.headers["upload-offset"], head.headers["upload-length"]) == ("1000", "2560")
    body = (await service.http.get(upload)).json()
    assert (body["offset"], body["status"], body["blob"]) == (1000, "open", None)


async def test_append_upload_refuses_another_offset(service: Service) -> None:
    upload = await begin(service)
    await service.http.patch(upload, content=CONTENT[:1000], headers={"Upload-Offset": "0"})
    for wrong in ("0", "500", "1001"):
        answer = await service.http.patch(upload, content=b"x", headers={"Upload-Offset": wrong})
        assert problem(answer, 409, "offset_conflict")["offset"] == 1000
    problem(await service.http.patch(upload, content=b"x"), 422, "invalid_request")


async def test_append_upload_refuses_more_than_announced(service: Service) -> None:
    upload = await begin(service, length=10)
    problem(await service.http.patch(upload, content=b"x" * 11, headers={"Upload-Offset": "0"}), 413, "too_large")
    problem(
        await service.http.patch(upload, content=chunks(b"x" * 11, 4), headers={"Upload-Offset": "0"}), 413, "too_large"
    )
    assert (await service.http.get(upload)).json()["offset"] == 0


async def test_append_upload_refuses_a_complete_upload(service: Service) -> None:
    upload = await begin(service, length=1)
    await service.http.patch(upload, content=b"x", headers={"Upload-Offset": "0"})
    problem(await service.http.patch(upload, content=b"x", headers={"Upload-Offset": "1"}), 409, "offset_conflict")


async def test_append_upload_counts_bytes_before_a_disconnect(service: Service) -> None:
    """The client disconnects after 1,000 of 2,560 bytes: the ASGI server then sends `http.disconnect`."""
    upload = await begin(service)
    events = iter([{"type": "http.request", "body": CONTENT[:1000], "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> dict[str, object]:
        return next(events)

    async def send(message: object) -> None:
        del message

    headers = [(b"host", b"127.0.0.1:8000"), (b"upload-offset", b"0"), (b"content-length", b"2560")]
    scope = {
        "type": "http", "method": "PATCH", "path": upload, "raw_path": upload.encode(), "query_string": b"",
        "headers": headers, "scheme": "http", "server": ("127.0.0.1", 8000), "client": ("127.0.0.1", 1),
        "asgi": {"version": "3.0"}, "http_version": "1.1", "root_path": "",
    }  # fmt: skip
    await service.app(scope, receive, send)  # type: ignore[arg-type]
    assert (await service.http.get(upload)).json()["offset"] == 1000
    rest = await service.http.patch(upload, content=CONTENT[1000:], headers={"Upload-Offset": "1000"})
    assert rest.json()["blob"] == f"sha256:{DIGEST}"


@asynccontextmanager
async def listening(service: Service) -> AsyncIterator[int]:
    """The same server behind a socket; yields its port."""
    config = uvicorn.Config(service.app, port=0, lifespan="off", log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        assert not serving.done()
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


async def test_append_upload_disconnects_a_silent_client(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket stays open, as if the client had lost its network: 1,000 of 2,560 bytes, and then nothing."""
    monkeypatch.setattr(route, "SILENCE_S", 0.2)
    upload = await begin(service)
    async with listening(service) as port:
        answered, silent = await asyncio.open_connection("127.0.0.1", port)
        head = f"PATCH {upload} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpload-Offset: 0\r\nContent-Length: 2560\r\n\r\n"
        silent.write(head.encode() + CONTENT[:1000])
        async with asyncio.timeout(60):
            assert await answered.readline() == b"HTTP/1.1 200 OK\r\n"
        rest = await service.http.patch(upload, content=CONTENT[1000:], headers={"Upload-Offset": "1000"})
        silent.close()
    assert rest.json()["blob"] == f"sha256:{DIGEST}"


async def test_append_upload_completes_what_a_killed_process_left(service: Service) -> None:
    """All bytes are acknowledged and are a blob; the process was killed before it completed the row."""
    upload = await begin(service, sha256=DIGEST)
    project, upload_id = "default", upload.rpartition("/")[2]
    row = await service.db.read(uploads.get, project, upload_id)
    with uploads.open_part(service.files, row) as file:
        file.write(CONTENT)
    row = await service.db.write(uploads.append, project, upload_id, offset=0, length=len(CONTENT))
    uploads.adopt(service.files, row)
    answer = await service.http.patch(upload, content=b"", headers={"Upload-Offset": str(len(CONTENT))})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["status"], answer.json()["blob"]) == ("complete", f"sha256:{DIGEST}")
    assert left_over(service) == []


async def test_upload_that_does_not_exist_is_not_found(service: Service) -> None:
    problem(await service.http.get("/v1/uploads/up_0"), 404, "not_found")
    problem(
        await service.http.patch("/v1/uploads/up_0", content=b"x", headers={"Upload-Offset": "0"}), 404, "not_found"
    )


async def rows(service: Service, **query: str) -> list[str]:
    answer = await service.http.get("/v1/uploads", params=query)
    assert answer.status_code == 200, answer.text
    return [row["id"] for row in answer.json()["data"]]


async def test_list_uploads_newest_first_by_status(service: Service) -> None:
    first = (await service.http.post("/v1/uploads", content=CONTENT)).json()
    await asyncio.sleep(0.002)  # ids of one millisecond have no order
    second = (await begin(service)).rpartition("/")[2]
    assert await rows(service) == [second, first["id"]]
    assert await rows(service, status="complete") == [first["id"]]
    page = (await service.http.get("/v1/uploads", params={"limit": 1})).json()
    assert await rows(service, after=page["next"]) == [first["id"]]
    assert page["data"][0]["status"] == "open"
    problem(await service.http.get("/v1/uploads?status=lost"), 422, "invalid_request")


@pytest.mark.parametrize("query", [{}, {"sha256": "0" * 64}])
async def test_create_upload_that_fails_leaves_no_row(service: Service, query: dict[str, str]) -> None:
    content = CONTENT if query else b""
    assert (await service.http.post("/v1/uploads", content=content, params=query)).is_client_error
    assert await rows(service) == []


async def test_append_upload_with_another_checksum_deletes_it(service: Service) -> None:
    upload = await begin(service, sha256="0" * 64)
    answer = await service.http.patch(upload, content=CONTENT, headers={"Upload-Offset": "0"})
    problem(answer, 422, "checksum_mismatch")
    problem(await service.http.get(upload), 404, "not_found")
    assert (left_over(service), await rows(service)) == ([], [])


async def test_delete_upload_frees_its_bytes(service: Service) -> None:
    upload = await begin(service)
    await service.http.patch(upload, content=CONTENT[:1000], headers={"Upload-Offset": "0"})
    whole = await service.http.post("/v1/uploads", content=CONTENT)
    for address in (upload, whole.headers["location"]):
        assert (await service.http.delete(address)).status_code == 204
        problem(await service.http.delete(address), 404, "not_found")
    files = [path for path in service.files.folder.rglob("*") if path.is_file()]
    assert files == []


async def test_delete_upload_keeps_bytes_that_something_else_names(service: Service) -> None:
    first, second = [await service.http.post("/v1/uploads", content=CONTENT) for _ in range(2)]
    assert (await service.http.delete(first.headers["location"])).status_code == 204
    assert service.files.exists(DIGEST)
    assert (await service.http.post("/v1/models", json={"name": "m", "blob": f"sha256:{DIGEST}"})).status_code == 201
    assert (await service.http.delete(second.headers["location"])).status_code == 204
    assert service.files.exists(DIGEST)


async def test_delete_upload_while_a_part_arrives_is_busy(service: Service) -> None:
    upload = await begin(service)
    row = await service.db.read(uploads.get, "default", upload.rpartition("/")[2])
    with uploads.open_part(service.files, row):
        problem(await service.http.delete(upload), 409, "upload_busy")
    assert (await service.http.delete(upload)).status_code == 204


async def test_uploads_stop_at_min_free_bytes_and_other_writes_go_on(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,000 bytes are free, of which 8,000 are kept."""
    upload = await begin(service)
    service.app.state.settings = service.settings.model_copy(update={"min_free_bytes": 8_000})
    monkeypatch.setattr(FileStore, "free_bytes", lambda self: 10_000)
    for content in (CONTENT, chunks(CONTENT)):
        body = problem(await service.http.post("/v1/uploads", content=content), 507, "storage_full")
        assert "10000 bytes are free" in body["detail"]
    problem(await service.http.post("/v1/uploads", headers={"Upload-Length": "2001"}), 507, "storage_full")
    problem(await service.http.patch(upload, content=CONTENT, headers={"Upload-Offset": "0"}), 507, "storage_full")
    assert (await service.http.get(upload)).json()["offset"] == 0
    assert await rows(service) == [upload.rpartition("/")[2]]
    small = await service.http.post("/v1/uploads", content=CONTENT[:2000])
    assert small.status_code == 201
    await service.submit()
    assert (await service.http.delete(upload)).status_code == 204


async def test_delete_upload_takes_the_bytes_from_its_project(service: Service) -> None:
    upload = await service.http.post("/v1/uploads", content=CONTENT)
    assert (await service.http.delete(upload.headers["location"])).status_code == 204
    named = await service.http.post("/v1/models", json={"name": "m", "blob": f"sha256:{DIGEST}"})
    problem(named, 404, "not_found")


# ── repeated requests, limits, the audit log ──


async def test_parts_under_an_idempotency_key_continue_one_upload(service: Service) -> None:
    headers = {"Upload-Length": "10", "Idempotency-Key": "k"}
    send = (service.http.post("/v1/uploads", params={"filename": "a"}, headers=headers) for _ in range(20))
    answers = await asyncio.gather(*send)
    assert sorted(answer.status_code for answer in answers) == [200] * 19 + [201]
    (upload_id,) = {answer.json()["id"] for answer in answers}
    await service.http.patch(f"/v1/uploads/{upload_id}", content=b"12345", headers={"Upload-Offset": "0"})
    again = await service.http.post("/v1/uploads", params={"filename": "a"}, headers=headers)
    assert (again.headers["upload-offset"], again.headers["idempotent-replayed"]) == ("5", "true")
    other = await service.http.post("/v1/uploads", headers={**headers, "Upload-Length": "11"})
    problem(other, 422, "idempotency_conflict")


async def test_whole_file_under_an_idempotency_key_is_stored_once(service: Service) -> None:
    headers = {"Idempotency-Key": "k"}
    first = await service.http.post("/v1/uploads", content=b"weights", headers=headers)
    again = await service.http.post("/v1/uploads", content=b"weights", headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json() and again.headers["idempotent-replayed"] == "true"
    other = await service.http.post("/v1/uploads", content=b"other weights", headers=headers)
    problem(other, 422, "idempotency_conflict")


async def test_whole_file_under_the_key_of_one_that_is_being_sent_is_refused(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is not at its end, or its server was killed."""
    once = Once.of("default", "k", "uploads", {"filename": None, "bytes": None, "sha256": None})
    sent, _ = await service.db.write(uploads.create_once, once, "default")
    headers = {"Idempotency-Key": "k"}
    problem(await service.http.post("/v1/uploads", content=b"weights", headers=headers), 409, "upload_busy")
    monkeypatch.setattr(route, "ABANDONED_S", 0.0)
    answer = await service.http.post("/v1/uploads", content=b"weights", headers=headers)
    assert answer.status_code == 201 and answer.json()["id"] != sent.id
    problem(await service.http.get(f"/v1/uploads/{sent.id}"), 404, "not_found")


async def test_whole_file_that_was_refused_leaves_its_key_free(service: Service) -> None:
    headers = {"Idempotency-Key": "k"}
    params = {"sha256": "0" * 64}
    answer = await service.http.post("/v1/uploads", content=b"weights", params=params, headers=headers)
    problem(answer, 422, "checksum_mismatch")
    assert (await service.http.post("/v1/uploads", content=b"weights", headers=headers)).status_code == 201


async def limited(service: Service, **limits: int) -> None:
    assert (await service.http.patch("/v1/projects/default", json={"limits": limits})).status_code == 200


async def test_upload_beyond_the_bytes_of_the_project_is_refused(service: Service) -> None:
    await limited(service, bytes_stored=20)
    await service.upload(b"0123456789")
    parts = await service.http.post("/v1/uploads", headers={"Upload-Length": "8"})
    assert parts.status_code == 201
    for sent in ({"content": b"123"}, {"headers": {"Upload-Length": "3"}}, {"content": pieces(b"123")}):
        answer = await service.http.post("/v1/uploads", **sent)
        body = problem(answer, 403, "quota_exceeded")
        assert (body["limit"], body["value"], body["used"]) == ("bytes_stored", 20, 18)
    await service.submit()
    await service.upload(b"12")
    problem(await service.http.post("/v1/jobs", json=SUPERVISED), 403, "quota_exceeded")
    await service.http.delete(f"/v1/uploads/{parts.json()['id']}")
    await service.submit()


async def pieces(content: bytes) -> AsyncIterator[bytes]:
    """A body without Content-Length."""
    yield content


async def test_upload_beyond_the_size_of_the_project_is_refused(service: Service) -> None:
    await limited(service, upload_bytes=5)
    problem(await service.http.post("/v1/uploads", content=b"123456"), 413, "too_large")
    problem(await service.http.post("/v1/uploads", content=pieces(b"123456")), 413, "too_large")
    problem(await service.http.post("/v1/uploads", headers={"Upload-Length": "6"}), 413, "too_large")
    await service.upload(b"12345")


async def test_upload_has_entries_of_the_audit_log(service: Service) -> None:
    upload = (await service.http.post("/v1/uploads", content=b"weights", params={"filename": "w.pt"})).json()
    await service.http.delete(f"/v1/uploads/{upload['id']}")
    rows = (await service.http.get("/v1/audit", params={"resource": upload["id"]})).json()["data"]
    assert [row["action"] for row in rows] == ["upload.delete", "upload.complete", "upload.create"]
    assert rows[1]["details"] == {"bytes": 7, "sha256": upload["blob"].removeprefix("sha256:")}
