"""Many hands put, name and forget the same few bytes while collectors run; rows and files are compared from outside.

A day is as long as the oldest request that is under way, so that the collectors are as hasty as they may ever be: what
lies in the trash goes as soon as all have ended that could have met it in its place.
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

from store import jobs, lifecycle, models, tables, uploads
from store.artifacts import NewArtifact
from store.blobs import BlobStore
from store.collector import Collector, Retention
from store.database import Database
from store.errors import ActionNotAllowed, NotFound
from tests.store.scene import at_once, submitted

CONTENTS = [f"weights {number}".encode() for number in range(8)]
DIGESTS = [hashlib.sha256(content).hexdigest() for content in CONTENTS]
CLOCK_TICK_S = 0.05
"""Files are stamped by a clock that ticks a few times a second at worst."""
NO_AGE = Retention(after_s=0, checkpoints_s=0, uploads_s=86_400)


@dataclass
class Requests:
    """Which are under way, and since when."""

    since: dict[object, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def one(self) -> Iterator[None]:
        me = object()
        with self.lock:
            self.since[me] = time.time()
        try:
            yield
        finally:
            with self.lock:
                del self.since[me]

    def oldest(self) -> float:
        with self.lock:
            return min([*self.since.values(), time.time()]) - CLOCK_TICK_S


@dataclass
class Hasty(Collector):
    requests: Requests = field(default_factory=Requests)

    def _before(self, age_s: float) -> float:
        return self.requests.oldest()


@dataclass
class Reckless(Hasty):
    """Moves to the trash whatever no row names, however young."""

    filling: bool = False

    def fill_trash(self) -> None:
        self.filling = True
        super().fill_trash()

    def _before(self, age_s: float) -> float:
        return float("inf") if self.filling else super()._before(age_s)


@dataclass
class Hand:
    """One thread of requests."""

    database: Database
    files: BlobStore
    requests: Requests
    chance: random.Random
    named: int = 0

    def work(self, moves: int) -> None:
        doings = [self.submit, self.register, self.upload, self.publish, self.delete_job, self.delete_model, self.read]
        for _ in range(moves):
            with self.requests.one():
                try:
                    self.chance.choice(doings)()
                except (NotFound, ActionNotAllowed):
                    continue

    def hesitate(self) -> None:
        time.sleep(self.chance.random() * 0.02)

    def submit(self) -> None:
        sha256 = self.chance.choice(DIGESTS)
        if self.files.exists(sha256):
            self.hesitate()
            self.name(lambda connection: _submit(connection, sha256), sha256)

    def register(self) -> None:
        sha256 = self.chance.choice(DIGESTS)
        if self.files.exists(sha256):
            self.hesitate()
            name = f"model {self.chance.random()}"
            self.name(lambda connection: models.register(connection, "ours", name, sha256, {}), sha256)

    def upload(self) -> None:
        content = self.chance.choice(CONTENTS)
        with self.database.begin() as connection:
            begun = uploads.create(connection, "ours")
        with uploads.part(self.files, begun) as file:
            file.write(content)
        with self.database.begin() as connection:
            sent = uploads.append(connection, "ours", begun.id, offset=0, length=len(content))
        blob = uploads.adopt(self.files, sent)
        self.hesitate()
        self.name(lambda connection: uploads.complete(connection, "ours", sent.id, blob), blob.sha256)
        with self.database.begin() as connection:
            connection.execute(tables.uploads.delete().where(tables.uploads.c.id == sent.id))

    def publish(self) -> None:
        content = self.chance.choice(CONTENTS)
        with self.database.begin() as connection:
            claim = lifecycle.claim(connection, "worker", 30, rescue=False)
        if claim is None:
            return
        blob = self.files.put_stream([content])
        self.hesitate()
        made = [NewArtifact("student", blob.sha256, blob.bytes, "application/octet-stream")]
        self.name(
            lambda connection: lifecycle.finish_succeeded(connection, claim.job.id, claim.fence, {}, made), blob.sha256
        )

    def delete_job(self) -> None:
        with self.database.connect() as connection:
            ended = jobs.list_page(connection, project="ours", limit=5, status="succeeded")[0]
        if ended:
            with self.database.begin() as connection:
                jobs.delete(connection, self.chance.choice(ended).id)

    def delete_model(self) -> None:
        with self.database.begin() as connection:
            known = models.list_page(connection, "ours", limit=5)[0]
            if known:
                models.delete(connection, "ours", self.chance.choice(known).id)

    def read(self) -> None:
        sha256 = self.chance.choice(DIGESTS)
        # Nobody need have put it yet, nor need it be named any more.
        with suppress(FileNotFoundError):
            assert hashlib.sha256(self.files.path(sha256).read_bytes()).hexdigest() == sha256

    def name(self, write: Callable[[Connection], Any], sha256: str) -> None:
        with self.database.begin() as connection:
            write(connection)
        self.named += 1
        require_all_that_is_named(self.database, self.files)


def _submit(connection: Connection, sha256: str) -> None:
    resolved = {"dataset": {"source": f"blob:sha256:{sha256}"}}
    spec = {"spec": {}, "resolved": resolved, "spec_sha256": sha256}
    jobs.submit(connection, project="ours", name=None, method="kd", max_attempts=3, **spec)


def named_by_rows(database: Database) -> set[str]:
    """Read without the code under test, and in one statement."""
    specs = cast(tables.jobs.c.resolved_spec, Text).label("said")
    asked = select(specs).union_all(
        *(select(table.c.sha256) for table in (tables.artifacts, tables.models, tables.uploads))
    )
    with database.connect() as connection:
        said = [row.said for row in connection.execute(asked) if row.said]
    return {sha256 for sha256 in DIGESTS if any(sha256 in one for one in said)}


def lies_somewhere(files: BlobStore, sha256: str) -> bool:
    places = [files.folder / "blobs" / sha256[:2] / sha256, files.folder / "trash" / sha256]
    for path in places:
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest() == sha256
        except FileNotFoundError:
            continue
    return False


def require_all_that_is_named(database: Database, files: BlobStore) -> None:
    """A file that moves while it is looked for, and a row that goes meanwhile, are looked at again."""
    missing = named_by_rows(database)
    for _ in range(20):
        missing = {sha256 for sha256 in missing & named_by_rows(database) if not lies_somewhere(files, sha256)}
    assert not missing, "a row names a blob that is nowhere"


@pytest.mark.parametrize("collectors", [[Reckless], [Hasty, Hasty]], ids=["reckless", "two at once"])
def test_no_row_ever_names_a_blob_that_is_gone_and_at_rest_no_other_is_left(
    database: Database, tmp_path: Path, collectors: list[type[Hasty]]
):
    files, requests, over = BlobStore(tmp_path / "files"), Requests(), threading.Event()
    for _ in range(5):
        submitted(database)
    of_nobody = files.put_stream([b"of nobody"]).sha256
    hands = [Hand(database, files, requests, random.Random(seed)) for seed in range(3)]

    def collect(kind: type[Hasty]) -> None:
        while not over.is_set():
            collecting = kind(database, files, NO_AGE, requests=requests)
            collecting.run()
            assert collecting.faults == []
            over.wait(0.01)

    threads = [lambda hand=hand: hand.work(20) for hand in hands]

    def work() -> None:
        try:
            assert at_once(threads) == [None] * len(threads)
        finally:
            over.set()

    assert at_once([work, *[lambda kind=kind: collect(kind) for kind in collectors]]) == [None] * (1 + len(collectors))
    assert sum(hand.named for hand in hands) > 5
    time.sleep(2 * CLOCK_TICK_S)
    for _ in range(3):
        Hasty(database, files, NO_AGE, requests=Requests()).run()
        time.sleep(2 * CLOCK_TICK_S)
    left = {path.name for path in files.folder.rglob("*") if path.is_file()}
    assert left == named_by_rows(database)
    assert of_nobody not in left


def test_without_the_wait_the_same_checks_find_it_out(database: Database, tmp_path: Path):
    files = BlobStore(tmp_path / "files")
    sha256 = files.put_stream([CONTENTS[0]]).sha256
    assert files.exists(sha256)
    hurried = Collector(database, files, NO_AGE)
    hurried.fill_trash()
    hurried.empty_trash()
    with database.begin() as connection:
        _submit(connection, sha256)
    with pytest.raises(AssertionError, match="a row names a blob that is nowhere"):
        require_all_that_is_named(database, files)
