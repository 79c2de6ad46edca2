"""The settings of an operator, read from the environment as DISTILLERY_… or from a file, and checked at start.

The file is named by DISTILLERY_CONFIG and written in TOML: a line `lease_s = 60` is DISTILLERY_LEASE_S. What only a
worker has is in its table `[worker]`. A variable of the environment is stronger than the file.
"""

import os
import re
import stat
import sys
import tomllib
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from base import files
from base.addresses import Allowed
from base.defaults import HOST, PORT

CONFIG = "DISTILLERY_CONFIG"
TABLES = ("worker",)
"""The tables that a settings file may have; its other lines belong to all programs."""


class ConfigFileFault(Exception):
    """The file that DISTILLERY_CONFIG names cannot be read."""


class FromEnvironmentOrFile(BaseSettings):
    """Base of all settings. Raises ConfigFileFault if there is a file that cannot be read."""

    model_config = SettingsConfigDict(env_prefix="DISTILLERY_", frozen=True, extra="forbid", hide_input_in_errors=True)
    table: ClassVar[str | None] = None
    """The table of the file with these settings; None: the lines that are in no table."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=_from_file(cls.table))


def _from_file(table: str | None) -> dict[str, Any]:
    """Return the lines of the settings file that are in this table, or in none."""
    name = os.environ.get(CONFIG)
    if not name:
        return {}
    try:
        lines = tomllib.loads(Path(name).read_text())
    except OSError as error:
        raise ConfigFileFault(f"{CONFIG}: {name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigFileFault(f"{CONFIG}: {name} is not TOML: {error}") from error
    if table is None:
        return {key: value for key, value in lines.items() if key not in TABLES}
    found = lines.get(table, {})
    if not isinstance(found, dict):
        raise ConfigFileFault(f"{CONFIG}: {name}: {table} must be a table: a line [{table}], then its settings")
    return found


class Settings(FromEnvironmentOrFile):
    """By default everything is local: SQLite, a folder, one process, this machine only."""

    home: Path = Field(
        default=Path("distillery-data"), description="Folder of everything for which no other setting names a place."
    )
    database_url: str = Field(default="", description="sqlite:///path or postgresql://…; default: a file in home.")
    broker_url: str = Field(default="memory://", description="Broker of the wake-up messages: memory:// or redis://….")
    files: Path = Field(default=Path(), description="Folder of blobs, checkpoints and logs; default: files in home.")

    host: str = Field(default=HOST, description="Address that the server listens on.")
    port: int = Field(default=PORT, ge=0, le=65535, description="Port that the server listens on; 0: a free one.")
    api_processes: int = Field(
        default=1, ge=1, le=64, description="Processes of `python -m api` that answer behind one address."
    )
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

    min_free_bytes: int = Field(
        default=200_000_000,
        ge=0,
        description="With less free disk space, no job is started and no upload is accepted: what is left is for the "
        "jobs that run, and for the database.",
    )
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
        default=7 * 86_400, ge=3600, description="Time without use after which a complete upload is deleted."
    )
    retain_open_uploads_s: float = Field(
        default=86_400,
        ge=3600,
        description="Time without use after which an upload that is not complete is deleted; without a byte, an hour.",
    )
    retain_inspections_s: float = Field(
        default=30 * 86_400,
        ge=3600,
        description="Time without use after which the facts that an inspection has found are forgotten.",
    )
    upload_max_bytes: int = Field(default=10_000_000_000, gt=0, description="The largest file that may be uploaded.")
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

    log_format: Literal["text", "json"] = Field(
        default="text", description="Form of the log on standard error: lines for people, or one JSON object a line."
    )
    access_log: bool | None = Field(
        default=None,
        description="Log each request with its latency and the id of its key; default: yes, but not in the embedded "
        "server.",
    )
    otel: bool = Field(
        default=False,
        description="Send traces by OpenTelemetry, as its own OTEL_… variables say; needs `distillery[otel]`.",
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

    @field_validator("otel")
    @classmethod
    def _is_installed(cls, otel: bool) -> bool:
        if otel:
            try:
                import opentelemetry.exporter.otlp.proto.http
                import opentelemetry.sdk  # noqa: F401
            except ImportError as error:
                raise ValueError(f"{error.name} is missing; pip install 'distillery[otel]'") from None
        return otel

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


OWN = ("distillery.migrating", "server.lock", "cache", "scratch", "predictions", "inspect", "metrics")
"""What the service keeps in its home, beside the files and the database."""


def keep_private(settings: Settings) -> None:
    """Take the rights to all that the service has stored from everybody but its user, and to all that this process and
    its children will make. An earlier version has let all users of the host read it.
    """
    os.umask(files.OTHERS)
    home, database = settings.home, make_url(settings.database_url)
    places = [home / name for name in OWN] + [settings.files]
    if database.get_backend_name() == "sqlite":
        places += [Path(f"{database.database}{end}") for end in ("", "-wal", "-shm")]
    files.keep_private(*places)
    if home.is_dir():
        # A server of another user that has its data here, such as `local.cluster`'s PostgreSQL, must still get to it.
        shared = any(place.lstat().st_uid != os.geteuid() for place in home.iterdir())
        files.take_rights(home, files.OTHERS & ~(stat.S_IXGRP | stat.S_IXOTH) if shared else files.OTHERS)


def settings_or_exit(program: str, *further: type[BaseSettings]) -> tuple[Any, ...]:
    """Return the Settings and the `further` ones of the program. For invalid values, print a line each and exit."""
    kinds: tuple[type[BaseSettings], ...] = (Settings, *further)
    try:
        return tuple(kind() for kind in kinds)
    except ConfigFileFault as error:
        sys.exit(f"{program}: {error}")
    except ValidationError as error:
        sys.exit("\n".join(f"{program}: {described(fault)}" for fault in error.errors()))


def described(fault: ErrorDetails) -> str:
    """Return a fault of the settings with the variable's name. The value may be a secret."""
    message = fault["msg"].removeprefix("Value error, ")
    field = "_".join(map(str, fault["loc"])).upper()
    if fault["type"] == "extra_forbidden":
        return f"{field.lower()} in the file of {CONFIG}: there is no such setting"
    return f"DISTILLERY_{field}: {message}" if field else message
