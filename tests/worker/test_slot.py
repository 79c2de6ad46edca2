"""A slot proves that it consumes jobs, shows why it does not, survives faults of its disk, and backs off."""

import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from store import tables, workers
from store.settings import Settings
from tests.disks import with_disks
from tests.worker.conftest import CPU
from tests.worker.job_database import ENDED, OPTIONS, JobDatabase
from tests.worker.processes import until
from worker import slot as slot_module
from worker.context import WorkerContext
from worker.engine import EnginePool
from worker.slot import LONGEST_PAUSE_S, BackOff, Slot
from worker.worker import Worker
from worker.writer import AttemptWriter

Start = Callable[..., Worker]
TB = 10**12


def device_row(db: JobDatabase) -> workers.Device:
    """The one device of the one worker, as its row shows it."""
    (worker,) = until(lambda: worker_rows(db), "the row of a worker")
    (device,) = worker.devices
    return device


def worker_rows(db: JobDatabase) -> Sequence[workers.Worker]:
    with db.database.connect() as connection:
        return workers.list_workers(connection)


def test_slot_is_proven_by_its_polls_while_idle_and_by_heartbeats_while_busy(
    settings: Settings, db: JobDatabase, start_worker: Start
):
    start_worker()
    until(lambda: device_row(db).state == "idle", "the slot to poll")
    job_id = db.submit(steps=100_000)
    busy = until(lambda: (device := device_row(db)).state == "busy" and device, "the slot to be busy")
    assert busy.job == job_id
    db.until_checkpoint(job_id)
    assert device_row(db).seen_s < settings.lease_s
    with db.database.connect() as connection:
        assert connection.scalar(select(tables.workers.c.current_job)) == job_id


def test_slot_describe_is_stuck_after_a_lease_without_proof(context: WorkerContext, monkeypatch: pytest.MonkeyPatch):
    """Busy or idle: its thread may hang, or have ended."""
    now = slot_module.boottime()
    slot = Slot(context, CPU)
    monkeypatch.setattr(slot_module, "boottime", lambda: now + context.settings.lease_s - 0.1)
    assert slot.describe()["state"] == "idle"
    monkeypatch.setattr(slot_module, "boottime", lambda: now + context.settings.lease_s + 1)
    row = slot.describe()
    assert row["state"] == "stuck"
    assert row["seen_s"] == pytest.approx(context.settings.lease_s + 1, abs=0.5)
    slot.job = "job_1"
    assert slot.describe()["state"] == "stuck"


def test_slot_starts_no_job_without_disk_space_and_logs_it(
    settings: Settings, db: JobDatabase, start_worker: Start, caplog: pytest.LogCaptureFixture
):
    job_id = db.submit(steps=2)
    worker = start_worker(settings.model_copy(update={"min_free_bytes": 1000 * TB}))
    until(lambda: device_row(db).state == "out_of_disk_space", "the slot to show it")
    assert db.job(job_id).status == "queued"
    assert "1000000000 MB are needed (DISTILLERY_MIN_FREE_BYTES)" in caplog.text
    worker.context.settings = settings
    db.assert_trained(job_id, 2)
    assert caplog.text.count("no job is started") == 1
    assert "there is enough disk space again" in caplog.text


def test_slot_starts_no_job_while_it_can_hardly_open_files(
    db: JobDatabase, start_worker: Start, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(slot_module, "free_descriptors", lambda: slot_module.DESCRIPTORS - 1)
    worker = start_worker()
    job_id = db.submit(steps=2)
    until(lambda: device_row(db).state == "stuck", "the slot to see it")
    assert db.job(job_id).status == "queued"
    monkeypatch.setattr(slot_module, "free_descriptors", lambda: None)
    worker.wake_up()
    db.assert_trained(job_id, 2)


def test_slot_makes_a_home_again_that_is_gone(settings: Settings, db: JobDatabase, start_worker: Start):
    worker = start_worker()
    until(lambda: worker.has_polled, "the first poll")
    settings.home.rename(settings.home.with_name("away"))
    job_id = db.submit(steps=2)
    db.assert_trained(job_id, 2)


def test_slot_survives_a_home_that_is_a_file_and_names_it(
    settings: Settings, db: JobDatabase, start_worker: Start, caplog: pytest.LogCaptureFixture
):
    settings.home.write_text("not a folder")
    job_id = db.submit(steps=2)
    start_worker()
    until(lambda: device_row(db).state == "out_of_disk_space", "the slot to show it")
    assert f"{settings.home}" in caplog.text and "cannot be used" in caplog.text
    settings.home.unlink()
    db.assert_trained(job_id, 2)


@with_disks
@pytest.mark.parametrize("small", ["home", "files"])
def test_slot_disk_fault_checks_each_of_two_disks(tmp_path: Path, small: str):
    """One of 64 MB, for a floor of 100 MB."""
    (tmp_path / small).mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "distillery", str(tmp_path / small)], check=True)
    settings = Settings(home=tmp_path / "home", files=tmp_path / "files", min_free_bytes=100 * 10**6)
    context = WorkerContext(settings, OPTIONS, wake_workers=lambda: None)
    try:
        fault = Slot(context, CPU)._disk_fault() or ""
        assert fault.startswith("67 MB are free for ") and f" {tmp_path / small}" in fault
    finally:
        context.close()
        subprocess.run(["umount", str(tmp_path / small)], check=True)


@with_disks
def test_slot_disk_fault_names_a_read_only_home(tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "distillery", str(home)], check=True)
    context = WorkerContext(Settings(home=home), OPTIONS, wake_workers=lambda: None)
    try:
        slot = Slot(context, CPU)
        assert slot._disk_fault() is None
        subprocess.run(["mount", "-o", "remount,ro", str(home)], check=True)
        assert slot._disk_fault() == f"{home / 'scratch'} cannot be written: it is read-only, or another user's"
        subprocess.run(["mount", "-o", "remount,rw", str(home)], check=True)
        assert slot._disk_fault() is None
    finally:
        context.close()
        subprocess.run(["umount", str(home)], check=True)


def test_slot_on_which_all_jobs_fail_pauses_and_leaves_them_to_others(
    settings: Settings, db: JobDatabase, start_worker: Start
):
    """Its engine ends at once with every job."""
    ids = [db.submit(max_attempts=1, steps=2) for _ in range(3)]
    broken = OPTIONS.model_copy(update={"engine": ("false",)})
    faulty = Worker(settings.model_copy(update={"look_s": 60}), broken, listens=False, devices=[CPU])
    faulty.start()
    assert [db.until(job_id, *ENDED).status for job_id in ids[:2]] == ["failed"] * 2
    until(lambda: faulty.slots[0].describe()["state"] == "stuck", "the slot to pause")
    assert not faulty.is_idle()
    faulty.wake_up()
    start_worker()
    db.assert_trained(ids[2], 2)
    assert faulty.stop()


def test_slot_does_not_pause_after_jobs_that_failed_after_progress(db: JobDatabase, start_worker: Start):
    ids = [db.submit(max_attempts=1, at={"1": "exit_three"}) for _ in range(3)]
    worker = start_worker()
    assert [db.until(job_id, *ENDED).status for job_id in ids] == ["failed"] * 3
    assert worker.slots[0]._back_off.pause_s == 0


@pytest.mark.parametrize("place", [EnginePool, AttemptWriter], ids=["before the claim", "after it"])
def test_slot_survives_a_host_without_a_free_thread(
    short_lease: Settings, db: JobDatabase, start_worker: Start, monkeypatch: pytest.MonkeyPatch, place: type
):
    """Once. After the claim, the lease of the attempt expires."""
    name = "refill" if place is EnginePool else "__enter__"
    before, refused = getattr(place, name), threading.Event()

    def refuse_once(self: Any) -> Any:
        if not refused.is_set():
            refused.set()
            raise RuntimeError("can't start new thread")
        return before(self)

    monkeypatch.setattr(place, name, refuse_once)
    job_id = db.submit(steps=2)
    start_worker(short_lease)
    db.assert_trained(job_id, 2)
    assert refused.is_set()


def test_back_off_begins_with_the_second_job_and_doubles():
    back_off = BackOff("cpu", 5)
    pauses = []
    for job_id in ("job_1", "job_2", "job_3", "job_3"):
        back_off.record(job_id, "failed_early")
        pauses.append(back_off.pause_s)
    assert pauses == [0, 5, 10, 20]


def test_back_off_has_a_longest_pause():
    back_off = BackOff("cpu", 5)
    for number in range(2000):
        back_off.record(f"job_{number}", "failed_early")
    assert back_off.pause_s == LONGEST_PAUSE_S == 600


def test_back_off_does_not_begin_with_one_job_that_fails_again():
    back_off = BackOff("cpu", 5)
    for _ in range(10):
        back_off.record("job_1", "failed_early")
    assert back_off.pause_s == 0


def test_back_off_is_ended_by_progress_only(caplog: pytest.LogCaptureFixture):
    back_off = BackOff("cpu", 5)
    for job_id in ("job_1", "job_2", "job_3"):
        back_off.record(job_id, "failed_early")
    back_off.record("job_4", "neither")
    assert back_off.pause_s == 10
    back_off.record("job_5", "progressed")
    back_off.record("job_6", "failed_early")
    assert back_off.pause_s == 0
    assert caplog.text.count("several jobs in a row failed") == caplog.text.count("jobs make progress again") == 1
