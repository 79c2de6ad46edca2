"""The objects that all threads of one worker share: settings, database, files, and the request to drain."""

import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from pydantic import Field, field_validator
from sqlalchemy import Connection

from base.clock import Contact, boottime
from base.data_cache import TEACHER_MAX_BYTES
from base.errors import DatabaseUnavailable, StorageFull
from store.database import Database
from store.file_store import FileStore
from store.settings import FromEnvironmentOrFile, Settings
from worker.devices import Allocator

UNAVAILABLE = (DatabaseUnavailable, StorageFull)
"""Errors of a database that cannot be reached or written: the worker waits, and no training is stopped."""


class Options(FromEnvironmentOrFile):
    """Settings that only a worker has."""

    table = "worker"

    engine: tuple[str, ...] = Field(
        default=(sys.executable, "-m", "kdcore", "run"),
        description="The engine's command, as JSON list; `--wait N` is added.",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of one engine; default: this host's cores, divided by its slots, and fewer while "
        "other programs use the cores.",
    )
    allocator: Allocator = Field(
        default="auto",
        description="auto: engines keep freed memory, and use jemalloc or tcmalloc where installed. off: neither.",
    )
    warm: bool = Field(
        default=True,
        description="Keep an engine ready in each idle slot: jobs start at once, for some 250 MB of memory.",
    )
    teacher_cache_max_bytes: int = Field(
        default=TEACHER_MAX_BYTES,
        ge=0,
        description="What stored outputs of teachers may take of this host's cache; 0: nothing is stored.",
    )
    engine_memory_bytes: int | None = Field(
        default=None,
        ge=100_000_000,
        description="Memory that one engine may take before its job fails with `out_of_memory`; default: 80 % of the "
        "host's, or of its container's, divided by its slots. GPU memory does not count.",
    )
    predictions: bool = Field(
        default=True,
        description="Run the models of finished jobs on images that clients send, beside the slots: one at a time, on "
        "one thread of the CPU.",
    )
    mlflow_tracking_uri: str | None = Field(
        default=None,
        description="Address of an MLflow server to which ended jobs are sent, with their curves and files; needs "
        "`distillery[mlflow]`. Default: nothing is sent.",
    )
    room_wait_s: float = Field(
        default=30, gt=0, description="Wait after a job failed on a full disk; it costs no attempt."
    )
    engine_silence_s: float = Field(
        default=1800,
        # Several times what lies between two signs of an engine at work.
        ge=60,
        description="Time without a line of a training engine after which it is stopped, and its attempt counted.",
    )
    back_off_s: float = Field(
        default=5, gt=0, description="Wait before the second attempt; each further wait is three times as long."
    )

    @field_validator("mlflow_tracking_uri")
    @classmethod
    def _is_installed(cls, uri: str | None) -> str | None:
        # Not imported, which takes seconds: only a child does.
        if uri and find_spec("mlflow") is None:
            raise ValueError("mlflow is missing; pip install 'distillery[mlflow]'")
        return uri or None


class Drain:
    """The request to drain the worker: trainings are stopped at a checkpoint, and their jobs are requeued."""

    def __init__(self, grace_s: float) -> None:
        self._requested = threading.Event()
        self._grace_s = grace_s
        self._leave_at = float("inf")

    def request(self) -> None:
        """Request the drain. Idempotent: a second request does not extend the grace time."""
        if not self._requested.is_set():
            self._leave_at = boottime() + self._grace_s
            self._requested.set()

    @property
    def requested(self) -> bool:
        return self._requested.is_set()

    @property
    def is_over(self) -> bool:
        """True if the grace time has passed: the next attempt repeats what is not written yet."""
        return boottime() > self._leave_at

    def wait(self, timeout_s: float) -> bool:
        return self._requested.wait(timeout_s)


class WorkerContext:
    """The shared objects of a worker. `wake_workers` is called after a job was requeued; it never blocks or raises."""

    def __init__(self, settings: Settings, options: Options, wake_workers: Callable[[], None]) -> None:
        self.settings, self.options, self.wake_workers = settings, options, wake_workers
        self.engine_memory_bytes = options.engine_memory_bytes
        """None: no bound. A worker that knows its slots sets the default."""
        self.owner = new_owner()
        self.database = Database(settings.database_url)
        # For heartbeats only: a lease must not be lost because the other pool has no free connection.
        self.heartbeat_database = Database(settings.database_url)
        self.files = FileStore(settings.files)
        self.drain = Drain(settings.stop_grace_s)
        self.contact = Contact(longest_gap_s=settings.lease_s / 2)
        self.scratch = settings.home / "scratch"
        self.cache = settings.home / "cache"

    def may_take_over(self) -> bool:
        return self.contact.unbroken_for(self.settings.lease_s)

    @contextmanager
    def begin(self) -> Iterator[tuple[Connection, bool]]:
        """Begin a write transaction. Yields it, and whether expired leases may be taken over in it."""
        requested_at = boottime()
        lease_s, heartbeat_s = self.settings.lease_s, self.settings.heartbeat_s
        with (
            self.database.begin() as connection,
            self.contact.takeover_gate(requested_at, lease_s=lease_s, heartbeat_s=heartbeat_s) as takeover,
        ):
            yield connection, takeover

    def close(self) -> None:
        self.database.dispose()
        self.heartbeat_database.dispose()


def new_owner() -> str:
    """Return a name that no other worker ever has; process ids and host names may be used again."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
