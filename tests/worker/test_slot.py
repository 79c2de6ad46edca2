"""A slot proves that it consumes, says why it does not, and outlives whatever its disk does to it."""

import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from store import tables, workers
from store.settings import Settings
from tests.store.disks import with_disks
from tests.worker.conftest import CPU
from tests.worker.processes import until
from tests.worker.table import ENDED, OPTIONS, Table
from worker import slot as slots
from worker.desk import Desk
from worker.engines import Engines
from worker.ledger import Ledger
from worker.service import Worker
from worker.slot import Slot

Start = Callable[..., Worker]
TB = 10**12


@pytest.fixture
def desk(settings: Settings) -> Iterator[Desk]:
    desk = Desk(settings, OPTIONS, ring=lambda: None)
    yield desk
    desk.close()


def shown(table: Table) -> workers.Device:
    """The one device of the one worker, as the table knows it."""
    (worker,) = until(lambda: known(table), "a worker to say that it is here")
    (device,) = worker.devices
    return device


def known(table: Table) -> Sequence[workers.Worker]:
    with table.database.connect() as connection:
        return workers.list_workers(connection)


def test_an_idle_slot_is_proven_by_its_looks_and_a_busy_one_by_its_heart(
    settings: Settings, table: Table, start_worker: Start
):
    start_worker()
    until(lambda: shown(table).state == "idle", "the slot to look")
    job_id = table.submit(steps=100_000)
    busy = until(lambda: (device := shown(table)).state == "busy" and device, "the slot to be busy")
    assert busy.job == job_id
    table.until_checkpoint(job_id)
    assert shown(table).seen_s < settings.lease_s
    with table.database.connect() as connection:
        assert connection.scalar(select(tables.workers.c.current_job)) == job_id


def test_a_slot_that_proved_nothing_for_a_lease_is_stuck(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    """Whatever it is at: its thread may hang, or have ended."""
    now = slots.boottime()
    slot = Slot(desk, CPU)
    monkeypatch.setattr(slots, "boottime", lambda: now + desk.settings.lease_s - 0.1)
    assert slot.told()["state"] == "idle"
    monkeypatch.setattr(slots, "boottime", lambda: now + desk.settings.lease_s + 1)
    told = slot.told()
    assert told["state"] == "stuck"
    assert told["seen_s"] == pytest.approx(desk.settings.lease_s + 1, abs=0.5)
    slot.job = "job_1"
    assert slot.told()["state"] == "stuck"


def test_below_the_floor_nothing_is_started_and_that_is_told(
    settings: Settings, table: Table, start_worker: Start, caplog: pytest.LogCaptureFixture
):
    job_id = table.submit(steps=2)
    worker = start_worker(settings.model_copy(update={"min_free_bytes": 1000 * TB}))
    until(lambda: shown(table).state == "out_of_disk_space", "the slot to say so")
    assert table.job(job_id).status == "queued"
    assert "1000000000 MB are needed (DISTILLERY_MIN_FREE_BYTES)" in caplog.text
    worker.desk.settings = settings
    table.assert_trained(job_id, 2)
    assert caplog.text.count("no job is started") == 1
    assert "there is room again" in caplog.text


def test_a_home_that_is_gone_is_made_again(settings: Settings, table: Table, start_worker: Start):
    worker = start_worker()
    until(lambda: worker.looked, "the first look")
    settings.home.rename(settings.home.with_name("away"))
    job_id = table.submit(steps=2)
    table.assert_trained(job_id, 2)


def test_a_home_that_is_a_file_is_named_and_survived(
    settings: Settings, table: Table, start_worker: Start, caplog: pytest.LogCaptureFixture
):
    settings.home.write_text("not a folder")
    job_id = table.submit(steps=2)
    start_worker()
    until(lambda: shown(table).state == "out_of_disk_space", "the slot to say so")
    assert f"{settings.home}" in caplog.text and "cannot be used" in caplog.text
    settings.home.unlink()
    table.assert_trained(job_id, 2)


@with_disks
@pytest.mark.parametrize("small", ["home", "files"])
def test_of_two_disks_each_must_have_room(tmp_path: Path, small: str):
    """One of 64 MB, for a floor of 100 MB."""
    (tmp_path / small).mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "distillery", str(tmp_path / small)], check=True)
    settings = Settings(home=tmp_path / "home", files=tmp_path / "files", min_free_bytes=100 * 10**6)
    desk = Desk(settings, OPTIONS, ring=lambda: None)
    try:
        fault = Slot(desk, CPU)._want_of_room() or ""
        assert fault.startswith("67 MB are free for ") and f" {tmp_path / small}" in fault
    finally:
        desk.close()
        subprocess.run(["umount", str(tmp_path / small)], check=True)


@with_disks
def test_a_read_only_home_is_named_and_survived(tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "distillery", str(home)], check=True)
    desk = Desk(Settings(home=home), OPTIONS, ring=lambda: None)
    try:
        slot = Slot(desk, CPU)
        assert slot._want_of_room() is None
        subprocess.run(["mount", "-o", "remount,ro", str(home)], check=True)
        assert slot._want_of_room() == f"{home / 'scratch'} cannot be written: it is read-only, or another user's"
        subprocess.run(["mount", "-o", "remount,rw", str(home)], check=True)
        assert slot._want_of_room() is None
    finally:
        desk.close()
        subprocess.run(["umount", str(home)], check=True)


def test_a_slot_on_which_all_jobs_fail_rests_and_leaves_them_to_others(
    settings: Settings, table: Table, start_worker: Start
):
    """Its engine ends at once, whatever the job."""
    ids = [table.submit(max_attempts=1, steps=2) for _ in range(3)]
    broken = OPTIONS.model_copy(update={"engine": ("false",)})
    sick = Worker(settings.model_copy(update={"look_s": 60}), broken, listens=False, devices=[CPU])
    sick.start()
    assert [table.until(job_id, *ENDED).status for job_id in ids[:2]] == ["failed"] * 2
    until(lambda: sick.slots[0].told()["state"] == "stuck", "the slot to rest")
    assert not sick.is_idle()
    sick.ring()
    start_worker()
    table.assert_trained(ids[2], 2)
    assert sick.stop()


def test_jobs_that_fail_once_they_have_begun_show_a_sound_slot(table: Table, start_worker: Start):
    ids = [table.submit(max_attempts=1, at={"1": "exit_three"}) for _ in range(3)]
    worker = start_worker()
    assert [table.until(job_id, *ENDED).status for job_id in ids] == ["failed"] * 3
    assert worker.slots[0]._health.pause_s == 0


@pytest.mark.parametrize("place", [Engines, Ledger], ids=["before the claim", "after it"])
def test_a_slot_outlives_a_host_that_has_no_thread_left(
    short_lease: Settings, table: Table, start_worker: Start, monkeypatch: pytest.MonkeyPatch, place: type
):
    """Once. The lease of an attempt whose lines nobody could write lapses."""
    name = "keep_one" if place is Engines else "__enter__"
    before, refused = getattr(place, name), threading.Event()

    def refuse_once(self: Any) -> Any:
        if not refused.is_set():
            refused.set()
            raise RuntimeError("can't start new thread")
        return before(self)

    monkeypatch.setattr(place, name, refuse_once)
    job_id = table.submit(steps=2)
    start_worker(short_lease)
    table.assert_trained(job_id, 2)
    assert refused.is_set()
