"""Threads put, name and delete the same few blobs while collectors run; then rows and files are compared.

A retention of a day is as short here as the oldest request that is running. So the collectors delete as early as they
ever may: a blob in the trash goes as soon as every request has ended that could have found it before.
"""

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, cast, select
from sqlalchemy.types import Text

from store import jobs, lifecycle, registry, tables, uploads
from store.artifacts import NewArtifact
from store.collector import Collector, Retention
from store.database import Database
from store.errors import ActionNotAllowed, NotFound
from store.file_store import FileStore
from store.registry import NewEntry
from tests.store.helpers import new_job, run_concurrently, submitted

CONTENTS = [f"weights {number}".encode() for number in range(8)]
DIGESTS = [hashlib.sha256(content).hexdigest() for content in CONTENTS]
CLOCK_TICK_S = 0.05
"""Files are stamped by a clock that ticks a few times a second at worst."""
NO_AGE = Retention(after_s=0, checkpoints_s=0, uploads_s=86_400, open_uploads_s=86_400, inspections_s=86_400)


@dataclass
class Requests:
    """The running requests, and when each began."""

    since: dict[object, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def one(self) -> Iterator[None]:
        request = object()
        with self.lock:
            self.since[request] = time.time()
        try:
            yield
        finally:
            with self.lock:
                del self.since[request]

    def oldest(self) -> float:
        with self.lock:
            return min([*self.since.values(), time.time()]) - CLOCK_TICK_S


@dataclass
class EarlyCollector(Collector):
    requests: Requests = field(default_factory=Requests)

    def _before(self, age_s: float) -> float:
        return self.requests.oldest()


@dataclass
class TrashingCollector(EarlyCollector):
    """Moves every blob that no row names to the trash, however lately it was used."""

    filling: bool = False

    def fill_trash(self) -> None:
        self.filling = True
        super().fill_trash()

    def _before(self, age_s: float) -> float:
        return float("inf") if self.filling else super()._before(age_s)


@dataclass
class Client:
    """One thread of requests."""

    database: Database
    files: FileStore
    requests: Requests
    chance: random.Random
    named: int = 0

    def work(self, requests_count: int) -> None:
        requests = [
            self.submit,
            self.register,
            self.upload,
            self.publish,
            self.delete_job,
            self.delete_model,
            self.read,
        ]
        for _ in range(requests_count):
            with self.requests.one():
                try:
                    self.chance.choice(requests)()
                except (NotFound, ActionNotAllowed):
                    continue

    def pause(self) -> None:
        time.sleep(self.chance.random() * 0.02)

    def submit(self) -> None:
        sha256 = self.chance.choice(DIGESTS)
        if self.files.exists(sha256):
            self.pause()
            self.name(lambda connection: _submit(connection, sha256), sha256)

    def register(self) -> None:
        sha256 = self.chance.choice(DIGESTS)
        if self.files.exists(sha256):
            self.pause()
            name = f"model {self.chance.random()}"
            self.name(
                lambda connection: registry.models.register(
                    connection, NewEntry("ours", name, sha256, {}, {}), "server", 30.0
                ),
                sha256,
            )

    def upload(self) -> None:
        content = self.chance.choice(CONTENTS)
        with self.database.begin() as connection:
            created = uploads.create(connection, "ours")
        with uploads.open_part(self.files, created) as file:
            file.write(content)
        with self.database.begin() as connection:
            upload = uploads.append(connection, "ours", created.id, offset=0, length=len(content))
        blob = uploads.adopt(self.files, upload)
        self.pause()
        self.name(lambda connection: uploads.complete(connection, "ours", upload.id, blob), blob.sha256)
        with self.database.begin() as connection:
            connection.execute(tables.uploads.delete().where(tables.uploads.c.id == upload.id))

    def publish(self) -> None:
        content = self.chance.choice(CONTENTS)
        with self.database.begin() as connection:
            claim = lifecycle.claim(connection, "worker", 30, takeover=False)
        if claim is None:
            return
        blob = self.files.put_stream([content])
        self.pause()
        made = [NewArtifact("student", blob.sha256, blob.bytes, "application/octet-stream")]
        self.name(
            lambda connection: lifecycle.finish_succeeded(connection, claim.job.id, claim.fence, {}, made), blob.sha256
        )

    def delete_job(self) -> None:
        with self.database.connect() as connection:
            ended = jobs.list_jobs(connection, "ours", jobs.JobQuery(limit=5, status="succeeded"))[0]
        if ended:
            with self.database.begin() as connection:
                jobs.delete(connection, self.chance.choice(ended).id)

    def delete_model(self) -> None:
        with self.database.begin() as connection:
            known = registry.models.list_page(connection, "ours", registry.EntryQuery(limit=5))[0]
            if known:
                registry.models.delete(connection, "ours", self.chance.choice(known).id)

    def read(self) -> None:
        sha256 = self.chance.choice(DIGESTS)
        # It may not have been put yet, or may be deleted again.
        with suppress(FileNotFoundError):
            assert hashlib.sha256(self.files.path(sha256).read_bytes()).hexdigest() == sha256

    def name(self, write: Callable[[Connection], Any], sha256: str) -> None:
        with self.database.begin() as connection:
            write(connection)
        self.named += 1
        check_named_blobs_exist(self.database, self.files)


def _submit(connection: Connection, sha256: str) -> None:
    jobs.submit(connection, new_job(resolved_spec={"dataset": {"source": f"blob:sha256:{sha256}"}}))


def named_by_rows(database: Database) -> set[str]:
    """Read the named digests in one statement, without the code under test."""
    specs = cast(tables.jobs.c.resolved_spec, Text).label("text")
    texts = select(specs).union_all(
        *(select(table.c.sha256) for table in (tables.artifacts, tables.models, tables.uploads))
    )
    with database.connect() as connection:
        rows = [row.text for row in connection.execute(texts) if row.text]
    return {sha256 for sha256 in DIGESTS if any(sha256 in row for row in rows)}


def is_stored(files: FileStore, sha256: str) -> bool:
    paths = [files.folder / "blobs" / sha256[:2] / sha256, files.folder / "trash" / sha256]
    for path in paths:
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest() == sha256
        except FileNotFoundError:
            continue
    return False


def check_named_blobs_exist(database: Database, files: FileStore) -> None:
    """Repeat the check for files that are being moved and rows that are being deleted."""
    missing = named_by_rows(database)
    for _ in range(20):
        missing = {sha256 for sha256 in missing & named_by_rows(database) if not is_stored(files, sha256)}
    assert not missing, "a row names a blob that does not exist"


@pytest.mark.parametrize("collectors", [[TrashingCollector], [EarlyCollector, EarlyCollector]], ids=["trashing", "two"])
def test_run_concurrently_deletes_exactly_the_blobs_that_no_row_names(
    database: Database, tmp_path: Path, collectors: list[type[EarlyCollector]]
):
    files, requests, ended = FileStore(tmp_path / "files"), Requests(), threading.Event()
    for _ in range(5):
        submitted(database)
    not_named = files.put_stream([b"not named"]).sha256
    clients = [Client(database, files, requests, random.Random(seed)) for seed in range(3)]

    def collect(kind: type[EarlyCollector]) -> None:
        while not ended.is_set():
            collection = kind(database, files, NO_AGE, requests=requests)
            collection.run()
            assert collection.faults == []
            ended.wait(0.01)

    threads = [lambda client=client: client.work(20) for client in clients]

    def work() -> None:
        try:
            assert run_concurrently(threads) == [None] * len(threads)
        finally:
            ended.set()

    assert run_concurrently([work, *[lambda kind=kind: collect(kind) for kind in collectors]]) == [None] * (
        1 + len(collectors)
    )
    assert sum(client.named for client in clients) > 5
    time.sleep(2 * CLOCK_TICK_S)
    for _ in range(3):
        EarlyCollector(database, files, NO_AGE, requests=Requests()).run()
        time.sleep(2 * CLOCK_TICK_S)
    left = {path.name for path in files.folder.rglob("*") if path.is_file()}
    assert left == named_by_rows(database)
    assert not_named not in left


def test_check_finds_a_blob_that_was_deleted_too_early(database: Database, tmp_path: Path):
    files = FileStore(tmp_path / "files")
    sha256 = files.put_stream([CONTENTS[0]]).sha256
    assert files.exists(sha256)
    collector = Collector(database, files, NO_AGE)
    collector.fill_trash()
    collector.empty_trash()
    with database.begin() as connection:
        _submit(connection, sha256)
    with pytest.raises(AssertionError, match="a row names a blob that does not exist"):
        check_named_blobs_exist(database, files)
