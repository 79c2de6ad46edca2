"""What the slots of one worker share: its settings, its ways to the table and the files, and whether it is leaving."""

import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import Connection

from base.clock import Contact, boottime
from base.errors import DatabaseUnavailable, StorageFull
from store.database import Database
from store.file_store import FileStore
from store.settings import Settings

AWAY = (DatabaseUnavailable, StorageFull)
"""What the table says when it cannot be reached or written: to wait for, and no reason to stop a training."""


class Options(BaseSettings):
    """What only a worker needs to know; read from the environment as DISTILLERY_…."""

    model_config = SettingsConfigDict(env_prefix="DISTILLERY_", frozen=True)

    engine: tuple[str, ...] = Field(
        default=(sys.executable, "-m", "kdcore", "run"),
        description="The engine's command, as JSON list; `--wait N` is added.",
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of one engine; default: this host's cores, shared by its slots."
    )
    warm: bool = Field(
        default=True,
        description="Keep an engine ready in each idle slot: jobs start at once, for some 250 MB of memory.",
    )
    room_wait_s: float = Field(default=30, gt=0, description="Wait of a job that met a full disk; it costs no attempt.")
    back_off_s: float = Field(
        default=5, gt=0, description="Wait before the second attempt; each further one waits thrice that."
    )


class Drain:
    """The request to leave: training is stopped at a checkpoint, and its job goes back to the queue."""

    def __init__(self, grace_s: float) -> None:
        self._asked = threading.Event()
        self._grace_s = grace_s
        self._leave_at = float("inf")

    def ask(self) -> None:
        """Asking twice is asking once: the time to leave by stays."""
        if not self._asked.is_set():
            self._leave_at = boottime() + self._grace_s
            self._asked.set()

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    @property
    def over(self) -> bool:
        """Whether the time to leave has passed: what is not written by now is left to the next worker."""
        return boottime() > self._leave_at

    def wait(self, timeout_s: float) -> bool:
        return self._asked.wait(timeout_s)


class Desk:
    """`ring` wakes other workers after a job was handed back; it returns at once and never raises."""

    def __init__(self, settings: Settings, options: Options, ring: Callable[[], None]) -> None:
        self.settings, self.options, self.ring = settings, options, ring
        self.owner = new_owner()
        self.database = Database(settings.database_url)
        # Nothing but heartbeats goes through it: a pool that is used up must not cost a lease.
        self.heart_database = Database(settings.database_url)
        self.files = FileStore(settings.files)
        self.drain = Drain(settings.stop_grace_s)
        self.contact = Contact(longest_gap_s=settings.lease_s / 2)
        self.scratch = settings.home / "scratch"
        self.cache = settings.home / "cache"

    def may_rescue(self) -> bool:
        return self.contact.unbroken_for(self.settings.lease_s)

    @contextmanager
    def begin(self) -> Iterator[tuple[Connection, bool]]:
        """A write transaction, and whether jobs of silent owners may be taken over in it.

        Not where we had to wait for our turn to write: then their owners may be waiting for theirs. And what was taken
        over is not written where we were frozen in our own turn: then they had to wait for us.
        """
        rescue, asked_at = self.may_rescue(), boottime()
        with self.database.begin() as connection:
            if boottime() - asked_at > self.settings.heartbeat_s:
                self.contact.lost()
                rescue = False
            yield connection, rescue
            if rescue and boottime() - asked_at > self.settings.heartbeat_s:
                raise DatabaseUnavailable("the table did not answer within a heartbeat; those it kept out may be alive")

    def close(self) -> None:
        self.database.dispose()
        self.heart_database.dispose()


def new_owner() -> str:
    """Unique for ever: process ids return, and so do hosts."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
