"""One device slot: look, claim, run, look again. The bell wakes it; without a bell it looks by itself now and then."""

import logging
import os
import shutil
import threading
from typing import Any

from base.clock import boottime, jittered
from base.failpoints import failpoint
from store import lifecycle
from store.lifecycle import Claim
from worker.desk import AWAY, Desk
from worker.devices import Device
from worker.engines import Engines
from worker.health import Health
from worker.run_job import run_job

log = logging.getLogger("distillery.slot")


class Slot:
    def __init__(self, desk: Desk, device: Device) -> None:
        self._desk, self.device = desk, device
        self.engines = Engines(desk, device)
        self._rung = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"slot-{device.name}", daemon=True)
        self._short_of_room = False
        self._proven_at = boottime()
        self._health = Health(device.name, desk.settings.look_s)
        self._resting = False
        self.job: str | None = None
        self.looked = False

    def start(self) -> None:
        self._thread.start()

    def ring(self) -> None:
        """There may be something to do: look now, or after the job at hand."""
        self._rung.set()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end of a drained slot; False when it has not come in time."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def is_free(self) -> bool:
        """Whether a ring would find it with nothing to do."""
        return self.job is None and not self._resting

    def told(self) -> dict[str, Any]:
        """What the table is told of this slot: fields of `store.workers.Device`.

        It proves that it consumes by a look, or while it has a job by a heartbeat; without either for a lease it is
        stuck. So it is while it rests, because jobs fail here before they begin.
        """
        job, seen_s = self.job, boottime() - self._proven_at
        if seen_s > self._desk.settings.lease_s:
            state = "stuck"
        elif job is not None:
            state = "busy"
        elif self._resting:
            state = "stuck"
        else:
            state = "out_of_disk_space" if self._short_of_room else "idle"
        return {"name": self.device.name, "job": job, "state": state, "seen_s": round(seen_s, 3)}

    def _prove(self) -> None:
        self._proven_at = boottime()

    def _run(self) -> None:
        while not self._desk.drain.asked:
            # Before the look: a ring that comes during it says that there may be more than was seen.
            self._rung.clear()
            worked = self._try_to_work()
            self.looked = True
            if worked:
                self._rest(self._health.pause_s)
            else:
                self._rung.wait(jittered(self._desk.settings.look_s))
        self.engines.let_go()

    def _try_to_work(self) -> bool:
        try:
            self.engines.keep_one()
            return self._work()
        except Exception:
            # A slot must outlive whatever its host lacks (threads, descriptors, an engine): it may have it again later.
            log.exception("%s: no job can be done", self.device.name)
            return False

    def _rest(self, pause_s: float) -> None:
        """No bell ends it: others are to come first."""
        if pause_s:
            self.engines.let_go()
            self._resting = True
            self._desk.drain.wait(pause_s)
            self._resting = False

    def _work(self) -> bool:
        """Do one job, if there is one."""
        claimed_at = boottime()
        claim = self._look()
        if claim is None:
            return False
        self.job = claim.job.id
        try:
            sign = run_job(claim, self._desk, self.engines, claimed_at, self._prove)
            self._health.note(claim.job.id, sign)
        finally:
            self.job = None
        return True

    def _look(self) -> Claim | None:
        if not self._has_room():
            self._prove()
            return None
        desk = self._desk
        try:
            # A look takes no lock, so that idle workers do not queue up before each other.
            with desk.database.connect() as connection:
                found = lifecycle.has_claimable(connection, desk.may_rescue())
            desk.contact.made()
            self._prove()
            if not found:
                return None
            with desk.begin() as (connection, rescue):
                failpoint("claim.begun")
                claim = lifecycle.claim(
                    connection, desk.owner, desk.settings.lease_s, takeover=rescue, device=self.device.name
                )
                failpoint("claim.before_commit")
            failpoint("claim.committed")
            return claim
        except AWAY as error:
            desk.contact.lost()
            log.warning("the table is out of reach, looking again in %g s: %s", desk.settings.look_s, error)
        except Exception:
            # A slot must outlive whatever a driver may throw: nobody else would look on this device.
            log.exception("a look at the table failed")
        return None

    def _has_room(self) -> bool:
        """Below the floor no job is started: it would only fail, and take the database's last room."""
        fault = self._want_of_room()
        if fault is not None and not self._short_of_room:
            log.error("%s: no job is started: %s", self.device.name, fault)
        elif fault is None and self._short_of_room:
            log.warning("%s: there is room again", self.device.name)
        self._short_of_room = fault is not None
        return fault is None

    def _want_of_room(self) -> str | None:
        """Why nothing can be written here, in words for the operator."""
        desk, floor = self._desk, self._desk.settings.min_free_bytes
        try:
            desk.scratch.mkdir(parents=True, exist_ok=True)
            # They may lie on two disks: one for the files, and one where a job works and SQLite may be.
            free = {desk.files.folder: desk.files.free_bytes(), desk.scratch: shutil.disk_usage(desk.scratch).free}
        except OSError as error:
            return f"{error.filename} cannot be used: {error.strerror}"
        for folder in (desk.scratch, desk.files.folder):
            if not os.access(folder, os.W_OK):
                return f"{folder} cannot be written: it is read-only, or another user's"
            if free[folder] < floor:
                there, needed = f"{free[folder] // 10**6} MB are free for {folder}", f"{floor // 10**6} MB are needed"
                return f"{there}, {needed} (DISTILLERY_MIN_FREE_BYTES)"
        return None
