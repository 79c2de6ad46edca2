"""Row 17: a disk is full, or takes no more writes, while a job trains. That costs waiting, and neither bit nor attempt.

A quota that is used up speaks as both do: `tests/store/test_blobs.py`. The engine's own disk: `tests/kdcore/`.
"""

import hashlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from tests.faults.workers import PATIENT, QUICK, Night
from tests.store.disks import disk, with_disks
from tests.worker.processes import until

JOB = {"steps": 20, "checkpoint_every": 5, "at": {"7": "wait"}}


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """Not a byte is left."""
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
    """For whatever is opened from now on."""
    _mount("--bind", folder, folder)
    _mount("-o", "remount,bind,ro", folder)
    yield
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("without_room", [full, read_only])
@with_disks
def test_files(tmp_path: Path, sqlite_template: Path, without_room: Callable[[Path], AbstractContextManager[None]]):
    """A checkpoint that cannot be kept is a warning, a result that cannot be kept waits; the last whole one stays."""
    url, gate = _database(sqlite_template, tmp_path), tmp_path / "gate"
    with (
        disk(tmp_path / "disk") as own,
        Night(tmp_path, url, files=own.folder, **PATIENT) as night,
    ):
        night.process(DISTILLERY_ROOM_WAIT_S="0.3")
        job_id = night.db.submit(**JOB, gate=str(gate), max_attempts=1)
        night.db.until_checkpoint(job_id)
        with without_room(own.folder):
            gate.touch()
            until(lambda: _told(night, job_id, "storage_full"), "the job to be put off")
            (kept,) = night.checkpoints(job_id)
            assert kept.step == 5
            assert hashlib.sha256((own.folder / kept.path).read_bytes()).hexdigest() == kept.sha256
            assert _told(night, job_id, "checkpoint_not_kept") >= 3
            assert night.db.job(job_id).attempts_without_progress <= 1
            assert not list(own.folder.rglob("*.tmp"))
        night.db.assert_trained(job_id, 20)
        *put_off, last = night.db.attempts(job_id)
        assert ({attempt.how for attempt in put_off}, last.how) == ({"released"}, "succeeded")
        night.assert_nothing_left()


@pytest.mark.parametrize(
    ("moment", "code", "hows"),
    [
        ("blob.written=full:2", "checkpoint_not_kept", ["succeeded"]),
        ("blob.written=full:5", "storage_full", ["released", "succeeded"]),
    ],
)
def test_no_room_for_one_write(tmp_path: Path, sqlite_database_url: str, moment: str, code: str, hows: list[str]):
    """The second checkpoint's, and the first result's after four of them. Also where no disk may be mounted."""
    with Night(tmp_path, sqlite_database_url, **PATIENT) as night:
        night.process(moment, DISTILLERY_ROOM_WAIT_S="0.3")
        job_id = night.db.submit(steps=20, checkpoint_every=5, max_attempts=1)
        night.assert_ended_well(job_id, 20, hows)
        assert _told(night, job_id, code) == 1
        assert not list(night.db.files.folder.rglob("*.tmp"))
        night.assert_nothing_left()


@with_disks
def test_the_database(tmp_path: Path, sqlite_template: Path):
    """Every beat fails for longer than a lease. Whoever looks on can tell, and takes nothing over."""
    gate = tmp_path / "gate"
    with disk(tmp_path / "disk") as own, Night(tmp_path, _database(sqlite_template, own.folder), **QUICK) as night:
        job_id = night.db.submit(**JOB, gate=str(gate))
        night.process()
        night.db.until_checkpoint(job_id)
        night.worker(home=tmp_path / "elsewhere")
        with full(own.folder):
            until(lambda: _lapsed_for(night, job_id) > QUICK["lease_s"], "the lease to be over for long")
            gate.touch()
            until(lambda: "the table cannot be written" in night.log, "a write that finds no room")
        night.assert_ended_well(job_id, 20, ["succeeded"])
        night.assert_nothing_left()


def _database(template: Path, folder: Path) -> str:
    return f"sqlite:///{shutil.copy(template, folder / 'distillery.db')}"


def _told(night: Night, job_id: str, code: str) -> int:
    """How often the feed says so, in a warning or as an error."""
    said = [event.data.get("error", event.data).get("code") for event in night.db.events(job_id)]
    return said.count(code)


def _lapsed_for(night: Night, job_id: str) -> float:
    """Seconds; by our own clock, which is SQLite's."""
    return time.time() - (night.db.job(job_id).lease_until or 0)


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)
