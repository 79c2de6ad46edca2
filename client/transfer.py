"""Uploads and downloads in parts. A broken transfer is continued; the SHA-256 of the whole file is checked.

A folder is packed into a file first: the same files make the same bytes, and so the same digest.
"""

import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import httpx

from base.files import sha256_of
from base.wire import ArtifactView, UploadView
from client.connection import Connection
from client.errors import ApiError, Damaged, InvalidInput, UnexpectedAnswer, Unreachable

CHUNK_BYTES = 8 << 20
READ_TIMEOUT_S = 60.0
MAX_BREAKS = 5
"""The number of breaks in a row, without a new byte in between, after which a transfer fails."""

OnProgress = Callable[[int, int], None]
"""A callback that gets the number of transferred bytes and the size of the file."""


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. Raises InvalidInput if it cannot be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error


def upload(
    connection: Connection,
    path: Path,
    *,
    resume: str | None = None,
    on_progress: OnProgress | None = None,
    chunk_bytes: int,
) -> str:
    """Send a file and return its blob, `sha256:<hex>`. `resume` is the id of an upload to continue."""
    size = _size(path)
    digest = digest_of(path)
    state = _existing_upload(connection, resume, path, size) if resume else _new_upload(connection, path, size, digest)
    with _open(path) as file:
        breaks = 0
        while state["status"] != "complete":
            offset = state["offset"]
            if on_progress:
                on_progress(offset, size)
            file.seek(offset)
            state = _send_chunk(connection, state, file.read(chunk_bytes), breaks)
            breaks = 0 if state["offset"] > offset else breaks + 1
    if on_progress:
        on_progress(size, size)
    blob = state["blob"] or ""
    if blob != f"sha256:{digest}":
        raise Damaged(f"the upload of {path}", digest, blob.removeprefix("sha256:"))
    return blob


@contextmanager
def packed(path: Path, on_progress: OnProgress | None = None) -> Iterator[Path]:
    """Give a file as it is, and a folder as a .zip of its files, which is deleted at the end.

    The files are stored without compression (pictures do not get smaller), in the order of their names, without times
    and owners. Hidden files and those of operating systems are left out; links are followed. Raises InvalidInput.
    """
    if not path.is_dir():
        yield path
        return
    files = _files_in(path)
    with tempfile.TemporaryDirectory(prefix="distillery-") as place:
        target = Path(place) / f"{path.resolve().name or 'folder'}.zip"
        try:
            _pack(files, target, on_progress)
        except OSError as error:
            raise InvalidInput(
                f"cannot pack {path} into {target}: {error.strerror or error}; TMPDIR names another place"
            ) from error
        yield target


def _files_in(folder: Path) -> dict[str, Path]:
    """Return all files below a folder by their names in the archive, sorted. An empty folder's name ends with `/`."""
    found: dict[str, Path] = {}
    entered: dict[Path, Path] = {}

    def failed(error: OSError) -> None:
        raise InvalidInput(f"cannot read {error.filename}: {error.strerror}") from error

    for here, folders, names in os.walk(folder, onerror=failed, followlinks=True):
        place = Path(here)
        entered[place] = place.resolve()
        if entered[place] in (entered.get(above) for above in place.parents):
            raise InvalidInput(f"{place} is a link to a folder that it is in; remove the link")
        folders[:] = [name for name in folders if not _is_clutter(name)]
        inside = [name for name in names if not _is_clutter(name)]
        below = place.relative_to(folder)
        for name in inside:
            file = place / name
            if not stat.S_ISREG(_stat(file).st_mode):
                raise InvalidInput(f"{file} is no file, and cannot be packed")
            found[(below / name).as_posix()] = file
        if not inside and not folders and place != folder:
            found[f"{below.as_posix()}/"] = place
    if all(name.endswith("/") for name in found):
        raise InvalidInput(f"{folder} holds no files")
    for name in found:
        if not name.isascii() and not _is_unicode(name):
            raise InvalidInput(f"the name {name!a} in {folder} is not UTF-8; rename the file")
    return dict(sorted(found.items()))


def _pack(files: dict[str, Path], target: Path, on_progress: OnProgress | None) -> None:
    sizes = {name: 0 if name.endswith("/") else _stat(file).st_size for name, file in files.items()}
    done, total = 0, sum(sizes.values())
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, file in files.items():
            member = zipfile.ZipInfo(name)
            member.create_system = 3
            member.external_attr = (0o40755 << 16 | 0x10) if name.endswith("/") else 0o100644 << 16
            if name.endswith("/"):
                archive.writestr(member, b"")
                continue
            member.file_size = sizes[name]
            with _open(file) as source, archive.open(member, "w") as content:
                shutil.copyfileobj(source, content, 1 << 20)
            done += sizes[name]
            if on_progress:
                on_progress(done, total)


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise InvalidInput(f"cannot read {file}: {error.strerror}") from error


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _new_upload(connection: Connection, path: Path, size: int, digest: str) -> UploadView:
    state: UploadView = connection.json(
        "POST",
        "/v1/uploads",
        params={"filename": path.name, "sha256": digest},
        headers={"Upload-Length": str(size), "Idempotency-Key": uuid4().hex},
        idempotent=True,
    )
    return state


def _existing_upload(connection: Connection, upload_id: str, path: Path, size: int) -> UploadView:
    state: UploadView = connection.json("GET", f"/v1/uploads/{upload_id}")
    if state["bytes"] != size:
        raise InvalidInput(f"upload {upload_id} is of a file of {state['bytes']} bytes; {path} has {size}")
    return state


def _send_chunk(connection: Connection, state: UploadView, chunk: bytes, breaks: int) -> UploadView:
    """Send one part. Returns the upload's new state; after a break, the state that the server reports."""
    path = f"/v1/uploads/{state['id']}"
    try:
        sent: UploadView = connection.json(
            "PATCH", path, content=chunk, headers={"Upload-Offset": str(state["offset"])}, timeout=READ_TIMEOUT_S * 5
        )
        return sent
    except ApiError as error:
        if not (error.transient or error.code in ("offset_conflict", "upload_busy")) or breaks >= MAX_BREAKS:
            raise
    except Unreachable:
        if breaks >= MAX_BREAKS:
            raise
    connection.pause(breaks)
    reported: UploadView = connection.json("GET", path)
    return reported


def download(
    connection: Connection, artifact: ArtifactView, target: Path, *, on_progress: OnProgress | None = None
) -> Path:
    """Fetch a file to `target`. An existing file is replaced only after the new one is complete and checked."""
    digest, size = artifact["sha256"], artifact["bytes"]
    if target.is_file() and target.stat().st_size == size and digest_of(target) == digest:
        return target
    part = target.with_name(f".{target.name}.{digest[:16]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch_all(connection, artifact, part, on_progress)
        actual = digest_of(part)
        if actual != digest:
            part.unlink()
            raise Damaged(str(target), digest, actual)
        part.replace(target)
    except OSError as error:
        raise InvalidInput(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _fetch_all(connection: Connection, artifact: ArtifactView, part: Path, on_progress: OnProgress | None) -> None:
    """Fetch until the file is complete; after each break, request the rest."""
    part.touch()
    breaks = 0
    while (offset := part.stat().st_size) < artifact["bytes"]:
        try:
            _fetch(connection, artifact, part, offset, on_progress)
            cause: object = "the file ended too early"
        except httpx.TransportError as error:
            cause = error
        breaks = 0 if part.stat().st_size > offset else breaks + 1
        if breaks >= MAX_BREAKS:
            raise Unreachable(connection.base_url, cause)
        if breaks:
            connection.pause(breaks)


def _fetch(
    connection: Connection, artifact: ArtifactView, part: Path, offset: int, on_progress: OnProgress | None
) -> None:
    etag = f'"{artifact["sha256"]}"'
    headers = {"Range": f"bytes={offset}-", "If-Range": etag} if offset else {}
    with connection.stream(artifact["href"], headers=headers, read_s=READ_TIMEOUT_S) as answer:
        partial = answer.status_code == httpx.codes.PARTIAL_CONTENT
        if partial and not answer.headers.get("content-range", "").startswith(f"bytes {offset}-"):
            raise UnexpectedAnswer(answer)
        with part.open("ab" if partial else "wb") as file:
            for written in _write(answer, file, offset if partial else 0):
                if on_progress:
                    on_progress(written, artifact["bytes"])
                if written >= artifact["bytes"]:
                    break
            file.flush()
            os.fsync(file.fileno())


def _write(answer: httpx.Response, file: BinaryIO, written: int) -> Iterator[int]:
    for chunk in answer.iter_bytes():
        file.write(chunk)
        written += len(chunk)
        yield written


def _size(path: Path) -> int:
    if path.is_dir():
        raise InvalidInput(f"{path} is a folder; only data sets may be folders")
    with _open(path) as file:
        size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise InvalidInput(f"{path} is empty")
    return size


def _open(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
