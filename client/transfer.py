"""Files to and from the service: in parts, taken up where they broke, and whole only when their SHA-256 says so."""

import hashlib
import os
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import httpx

from client.answers import Artifact, Upload
from client.connection import Connection
from client.errors import ApiError, Damaged, UnexpectedAnswer, Unreachable, Unusable

CHUNK_BYTES = 8 << 20
READ_S = 60.0
BREAKS = 5
"""Breaks in a row, without a byte in between, before we give up."""

Tell = Callable[[int, int], None]
"""Called with the bytes done and all of them."""


def digest_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def upload(
    connection: Connection, path: Path, *, resume: str | None = None, tell: Tell | None = None, chunk_bytes: int
) -> str:
    """Send a file; returns its blob, `sha256:<hex>`. With the id of a broken upload it goes on from there."""
    size = _size(path)
    digest = digest_of(path)
    state = _resumed(connection, resume, path, size) if resume else _begun(connection, path, size, digest)
    with _opened(path) as file:
        idle = 0
        while state["status"] != "complete":
            offset = state["offset"]
            if tell:
                tell(offset, size)
            file.seek(offset)
            state = _send(connection, state, file.read(chunk_bytes), idle)
            idle = 0 if state["offset"] > offset else idle + 1
    if tell:
        tell(size, size)
    blob = state["blob"] or ""
    if blob != f"sha256:{digest}":
        raise Damaged(f"the upload of {path}", digest, blob.removeprefix("sha256:"))
    return blob


def _begun(connection: Connection, path: Path, size: int, digest: str) -> Upload:
    begun: Upload = connection.json(
        "POST",
        "/v1/uploads",
        params={"filename": path.name, "sha256": digest},
        headers={"Upload-Length": str(size)},
        # An upload that was begun and not heard of again holds no bytes.
        repeatable=True,
    )
    return begun


def _resumed(connection: Connection, upload_id: str, path: Path, size: int) -> Upload:
    state: Upload = connection.json("GET", f"/v1/uploads/{upload_id}")
    if state["bytes"] != size:
        raise Unusable(f"upload {upload_id} is of a file of {state['bytes']} bytes; {path} has {size}")
    return state


def _send(connection: Connection, state: Upload, chunk: bytes, idle: int) -> Upload:
    """One part. What became of a part that broke, the server says."""
    path = f"/v1/uploads/{state['id']}"
    try:
        sent: Upload = connection.json(
            "PATCH", path, content=chunk, headers={"Upload-Offset": str(state["offset"])}, timeout=READ_S * 5
        )
        return sent
    except ApiError as refused:
        if not (refused.passes or refused.code in ("offset_conflict", "upload_busy")) or idle >= BREAKS:
            raise
    except Unreachable:
        if idle >= BREAKS:
            raise
    connection.pause(idle)
    known: Upload = connection.json("GET", path)
    return known


def download(connection: Connection, artifact: Artifact, target: Path, *, tell: Tell | None = None) -> Path:
    """Fetch a file to `target`. What is there under that name is replaced only by the whole, checked file."""
    digest, size = artifact["sha256"], artifact["bytes"]
    if target.is_file() and target.stat().st_size == size and digest_of(target) == digest:
        return target
    part = target.with_name(f".{target.name}.{digest[:16]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch_all(connection, artifact, part, tell)
        found = digest_of(part)
        if found != digest:
            part.unlink()
            raise Damaged(str(target), digest, found)
        part.replace(target)
    except OSError as error:
        raise Unusable(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _fetch_all(connection: Connection, artifact: Artifact, part: Path, tell: Tell | None) -> None:
    """Bytes until they are all there; each break is followed by a request for the rest."""
    part.touch()
    idle = 0
    while (have := part.stat().st_size) < artifact["bytes"]:
        try:
            _fetch(connection, artifact, part, have, tell)
            why: object = "the file ended too early"
        except httpx.TransportError as error:
            why = error
        idle = 0 if part.stat().st_size > have else idle + 1
        if idle >= BREAKS:
            raise Unreachable(connection.base_url, why)
        if idle:
            connection.pause(idle)


def _fetch(connection: Connection, artifact: Artifact, part: Path, have: int, tell: Tell | None) -> None:
    etag = f'"{artifact["sha256"]}"'
    headers = {"Range": f"bytes={have}-", "If-Range": etag} if have else {}
    with connection.stream(artifact["href"], headers=headers, read_s=READ_S) as answer:
        appended = answer.status_code == httpx.codes.PARTIAL_CONTENT
        if appended and not answer.headers.get("content-range", "").startswith(f"bytes {have}-"):
            raise UnexpectedAnswer(answer)
        with part.open("ab" if appended else "wb") as file:
            for done in _written(answer, file, have if appended else 0):
                if tell:
                    tell(done, artifact["bytes"])
                if done >= artifact["bytes"]:
                    break
            file.flush()
            os.fsync(file.fileno())


def _written(answer: httpx.Response, file: BinaryIO, done: int) -> Iterator[int]:
    for chunk in answer.iter_bytes():
        file.write(chunk)
        done += len(chunk)
        yield done


def _size(path: Path) -> int:
    if path.is_dir():
        raise Unusable(f"{path} is a folder; pack it first: tar cf {path.name}.tar -C {path} .")
    with _opened(path) as file:
        size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise Unusable(f"{path} is empty")
    return size


def _opened(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise Unusable(f"cannot read {path}: {error.strerror}") from error
