"""The settings of an operator, read from the environment as DISTILLERY_… and checked at start."""

import re
import sys
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from base.addresses import Allowed
from base.defaults import HOST, PORT


class Settings(BaseSettings):
    """By default everything is local: SQLite, a folder, one process, this machine only."""

    model_config = SettingsConfigDict(env_prefix="DISTILLERY_", frozen=True, extra="forbid", hide_input_in_errors=True)

    home: Path = Field(
        default=Path("distillery-data"), description="Folder of everything for which no other setting names a place."
    )
    database_url: str = Field(default="", description="sqlite:///path or postgresql://…; default: a file in home.")
    broker_url: str = Field(default="memory://", description="Broker of the wake-up messages: memory:// or redis://….")
    files: Path = Field(default=Path(), description="Folder of blobs, checkpoints and logs; default: files in home.")

    host: str = Field(default=HOST, description="Address that the server listens on.")
    port: int = Field(default=PORT, ge=0, le=65535)
    admin_key_hash: str | None = Field(default=None, description="SHA-256 of the operator's key, hexadecimal.")

    lease_s: float = Field(default=30, gt=0, description="Time after the last heartbeat until a job can be taken over.")
    heartbeat_s: float = Field(default=5, gt=0, description="Time between two heartbeats of a worker.")
    look_s: float = Field(default=5, gt=0, description="Time between two polls of an idle worker.")
    rering_s: float = Field(
        default=15, gt=0, description="Time after which a waiting job's wake-up message is sent again."
    )
    stop_grace_s: float = Field(default=30, gt=0, description="Time that a training gets to save its state and stop.")
    max_unproven_s: float = Field(
        default=900, gt=0, description="Time that a training continues while the database cannot be reached."
    )
    max_attempts: int = Field(default=3, ge=1, description="Attempts in a row that may end without a new checkpoint.")

    min_free_bytes: int = Field(default=200_000_000, ge=0, description="With less free disk space, no job is started.")
    cache_max_bytes: int = Field(
        default=20_000_000_000, ge=0, description="Size to which each host's cache of data sets is trimmed."
    )
    collect_every_s: float = Field(default=3600, gt=0, description="Time between two runs of the collector.")
    collect_after_s: float = Field(
        # Longer than any request: the inspection of a large upload takes half an hour, and may wait for others.
        default=86_400,
        ge=3600,
        description="Time without use until a blob that no row names goes to the trash, and until it is deleted there.",
    )
    retain_checkpoints_s: float = Field(
        default=7 * 86_400,
        ge=0,
        description="Time after its end for which a failed or cancelled job keeps its checkpoints.",
    )
    retain_uploads_s: float = Field(
        default=7 * 86_400, ge=3600, description="Time without use after which an upload is deleted, complete or not."
    )
    upload_max_bytes: int = Field(default=10_000_000_000, gt=0)
    webhook_allow: str = Field(
        default="",
        description="Hosts and networks that webhooks may call beside public addresses, also without TLS, separated by "
        "commas: 10.0.0.0/8, hooks.internal.",
    )
    limit_jobs_queued: int | None = Field(
        default=10_000,
        ge=1,
        description="Jobs of one project that may be queued or paused; the operator may set others.",
    )
    limit_jobs_running: int | None = Field(
        default=None, ge=1, description="Jobs of one project that run at a time; workers need it, too. Default: all."
    )
    limit_bytes_stored: int | None = Field(
        default=None, ge=1, description="Bytes of the files of one project. Default: as the disk has."
    )
    limit_event_streams: int | None = Field(
        default=5_000, ge=1, description="Open event streams of one project in one API process."
    )
    limit_inspections: int | None = Field(
        default=100, ge=1, description="Models and data sets of one project that are inspected at a time."
    )
    limit_requests_per_s: int | None = Field(
        default=1_000, ge=1, description="Requests with a key in a second, of one project in one API process."
    )
    retain_audit_s: float = Field(
        default=365 * 86_400, ge=86_400, description="Time after which an entry of the audit log is deleted."
    )
    slots: int | None = Field(
        default=None, ge=1, description="Jobs that run at the same time on this host; default: one for each device."
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_in_home(cls, given: dict[str, object]) -> dict[str, object]:
        home = Path(str(given.get("home") or "distillery-data")).absolute()
        places = {"database_url": f"sqlite:///{home / 'distillery.db'}", "files": home / "files"}
        return {**given, "home": home, **{name: given.get(name) or place for name, place in places.items()}}

    @field_validator("database_url")
    @classmethod
    def _supported_database(cls, url: str) -> str:
        try:
            parsed = make_url(url)
        except ArgumentError:
            raise ValueError("is not a URL; use sqlite:///path/to/file.db or postgresql://user@host/name") from None
        backend = parsed.get_backend_name()
        if backend not in ("sqlite", "postgresql"):
            raise ValueError(f"{backend} is not supported; use sqlite:/// or postgresql://")
        if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
            raise ValueError("SQLite in memory is not supported: jobs must outlive the process; use sqlite:///path")
        return url

    @field_validator("admin_key_hash")
    @classmethod
    def _is_a_digest(cls, digest: str | None) -> str | None:
        if digest is not None and not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError("must be the SHA-256 of the key as 64 hexadecimal digits, not the key itself")
        return digest

    @field_validator("webhook_allow")
    @classmethod
    def _hosts_and_networks(cls, text: str) -> str:
        Allowed.of(text)
        return text

    @model_validator(mode="after")
    def _lease_outlasts_heartbeats(self) -> Self:
        if self.lease_s < 4 * self.heartbeat_s:
            raise ValueError(
                f"lease_s {self.lease_s:g} is shorter than four heartbeats of {self.heartbeat_s:g} s: one late "
                f"heartbeat would lose the job; set lease_s to {4 * self.heartbeat_s:g} or more"
            )
        return self

    @model_validator(mode="after")
    def _polls_often_enough_to_take_over(self) -> Self:
        if self.look_s > self.lease_s / 4:
            raise ValueError(
                f"look_s {self.look_s:g} is more than a quarter of lease_s {self.lease_s:g}: no worker could prove its "
                f"own contact with the database, or take over a job; set look_s to {self.lease_s / 4:g} or less"
            )
        return self


def settings_or_exit(program: str, *further: type[BaseSettings]) -> tuple[Any, ...]:
    """Return the Settings and the `further` ones of the program. For invalid values, print a line each and exit."""
    kinds: tuple[type[BaseSettings], ...] = (Settings, *further)
    try:
        return tuple(kind() for kind in kinds)
    except ValidationError as error:
        sys.exit("\n".join(f"{program}: {described(fault)}" for fault in error.errors()))


def described(fault: ErrorDetails) -> str:
    """Return a fault of the settings with the variable's name. The value may be a secret."""
    message = fault["msg"].removeprefix("Value error, ")
    field = "_".join(map(str, fault["loc"])).upper()
    return f"DISTILLERY_{field}: {message}" if field else message
