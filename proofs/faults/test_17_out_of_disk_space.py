"""Row 17: a disk is full or read-only while a job trains. The job waits; no bit is lost and no attempt is spent.

A quota that is used up: `tests/store/test_blobs.py`. The engine's own disk: `tests/kdcore/`.
"""

import hashlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from proofs.faults.workers import LONG_LEASE, SHORT_LEASE, Workers
from tests.disks import disk, with_disks
from tests.worker.processes import until

JOB = {"steps": 20, "checkpoint_every": 5, "at": {"7": "wait"}}


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """Fill the disk to the last byte."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            with suppress(OSError):
                while True:
                    file.write(b"x" * size)
    yield
    ballast.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Files that are opened from now on cannot be written."""
    _mount("--bind", folder, folder)
    _mount("-o", "remount,bind,ro", folder)
    yield
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("fault", [full, read_only])
@with_disks
def test_out_of_disk_space_for_files(
    tmp_path: Path, sqlite_template: Path, fault: Callable[[Path], AbstractContextManager[None]]
):
    """A checkpoint that cannot be stored is a warning; a result that cannot be stored waits; the last one stays."""
    url, gate = _database(sqlite_template, tmp_path), tmp_path / "gate"
    with (
        disk(tmp_path / "disk") as own,
        Workers(tmp_path, url, files=own.folder, **LONG_LEASE) as workers,
    ):
        workers.start_process(DISTILLERY_ROOM_WAIT_S="0.3")
        job_id = workers.db.submit(**JOB, gate=str(gate), max_attempts=1)
        workers.db.until_checkpoint(job_id)
        with fault(own.folder):
            gate.touch()
            until(lambda: _count(workers, job_id, "storage_full"), "the job to be postponed")
            (kept,) = workers.checkpoints(job_id)
            assert kept.step == 5
            assert hashlib.sha256((own.folder / kept.path).read_bytes()).hexdigest() == kept.sha256
            assert _count(workers, job_id, "checkpoint_not_kept") >= 3
            assert workers.db.job(job_id).attempts_without_progress <= 1
            assert not list(own.folder.rglob("*.tmp"))
        workers.db.assert_trained(job_id, 20)
        *postponed, last = workers.db.attempts(job_id)
        assert ({attempt.how for attempt in postponed}, last.how) == ({"released"}, "succeeded")
        workers.assert_nothing_left()


@pytest.mark.parametrize(
    ("moment", "code", "hows"),
    [
        ("blob.written=full:2", "checkpoint_not_kept", ["succeeded"]),
        ("blob.written=full:5", "storage_full", ["released", "succeeded"]),
    ],
)
def test_out_of_disk_space_for_one_write(
    tmp_path: Path, sqlite_database_url: str, moment: str, code: str, hows: list[str]
):
    """The write of the second checkpoint, or of the first result. Needs no right to mount a disk."""
    with Workers(tmp_path, sqlite_database_url, **LONG_LEASE) as workers:
        workers.start_process(moment, DISTILLERY_ROOM_WAIT_S="0.3")
        job_id = workers.db.submit(steps=20, checkpoint_every=5, max_attempts=1)
        workers.assert_succeeded(job_id, 20, hows)
        assert _count(workers, job_id, code) == 1
        assert not list(workers.db.files.folder.rglob("*.tmp"))
        workers.assert_nothing_left()


@with_disks
def test_out_of_disk_space_for_the_database(tmp_path: Path, sqlite_template: Path):
    """Every heartbeat fails for longer than a lease. Another worker that polls takes nothing over."""
    gate = tmp_path / "gate"
    with (
        disk(tmp_path / "disk") as own,
        Workers(tmp_path, _database(sqlite_template, own.folder), **SHORT_LEASE) as workers,
    ):
        job_id = workers.db.submit(**JOB, gate=str(gate))
        workers.start_process()
        workers.db.until_checkpoint(job_id)
        workers.start(home=tmp_path / "elsewhere")
        with full(own.folder):
            until(lambda: _expired_for(workers, job_id) > SHORT_LEASE["lease_s"], "the lease to be expired for long")
            gate.touch()
            until(lambda: "the database cannot be written" in workers.log, "a write that fails")
        workers.assert_succeeded(job_id, 20, ["succeeded"])
        workers.assert_nothing_left()


def _database(template: Path, folder: Path) -> str:
    return f"sqlite:///{shutil.copy(template, folder / 'distillery.db')}"


def _count(workers: Workers, job_id: str, code: str) -> int:
    """The number of events with this code, as a warning or as an error."""
    codes = [event.data.get("error", event.data).get("code") for event in workers.db.events(job_id)]
    return codes.count(code)


def _expired_for(workers: Workers, job_id: str) -> float:
    """Seconds by the clock of this process, which is also SQLite's."""
    return time.time() - (workers.db.job(job_id).lease_until or 0)


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)
