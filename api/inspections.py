"""Inspections: the facts of an uploaded file or of a network, read by a child process and cached by digest.

The server itself never opens an uploaded file. The child is `python -m kdcore inspect …`: it has a session of its
own, few environment variables, a scratch folder, and limits on time, memory and disk. It ends with the server, even if
the server is killed. Few run at a time, data sets apart from all else, and those who ask take turns (`places.py`). A
child prints one JSON object: the facts, or the error. Of a data set it prints lines of progress before that, and writes
a sheet of thumbnails.

All who need the same inspection share one child. It ends when nobody needs it any more.
"""

import asyncio
import hashlib
import json
import logging
import os
import secrets
import signal
import stat
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, cast

from anyio import to_thread
from pydantic import BaseModel, Field, ValidationError
from sqlalchemy import Connection

from api.places import Places
from base.errors import OutOfMemory
from base.files import disk_full_as_storage_full
from base.folders import locked_folder
from base.memory import host_memory
from base.processes import kill_group
from kdcore.catalog import (
    ArchitectureFacts,
    DatasetFacts,
    ModelFacts,
    NamedStartFacts,
    PublishedFacts,
    StartFacts,
    TapFacts,
)
from kdcore.catalog.facts import DATASET_READING, MODEL_READING, LogitsFacts, ProgramFacts, model_facts
from kdcore.spec import DataOptions
from kdcore.spec.cost import JobCost
from store import registry
from store.database import Database
from store.file_store import FileStore

F = TypeVar("F", bound=BaseModel)
T = TypeVar("T")

log = logging.getLogger("distillery.inspections")

OF_FILES: dict[type[BaseModel], str] = {
    ModelFacts: "model",
    ProgramFacts: "program",
    LogitsFacts: "logits",
    DatasetFacts: "dataset",
    StartFacts: "start",
}
KINDS: dict[type[BaseModel], str] = {
    **OF_FILES,
    ArchitectureFacts: "architecture",
    TapFacts: "taps",
    PublishedFacts: "published",
    NamedStartFacts: "named-start",
    JobCost: "cost",
}
"""The verbs of `python -m kdcore inspect`, by the facts that they print."""
_NAMED_OPTIONS = (ModelFacts, StartFacts, PublishedFacts, NamedStartFacts)
"""Kinds with options that may be left out: in the keys of their stored inspections, the options have names."""
THUMBNAILS_KIND = "thumbnails"
"""The kind of the stored inspections that name the sheet of a data set; empty if there is none."""

ENGINE = (sys.executable, "-m", "kdcore")
PARALLEL = 2
TIMEOUT_S = 1800.0
"""In this time every image of a large archive is decoded once."""
LINGER_S = 3.0
"""The time for which an inspection that nobody needs continues: a client whose request broke sends it again."""
GONE_S = 1.0
"""The time between two looks whether the client is still there."""
MEMORY_BYTES, LEAST_MEMORY_BYTES = 8 << 30, 1 << 30
MEMORY_SHARE = 0.25
"""The part of this host's memory that one inspection may take, between the two bounds."""
MOST_ARGUMENT_BYTES = 64 << 10
"""Longer ones are given to the child in a file: the kernel accepts 128 KiB each."""
MOST_KEY = 200
"""Characters of the key of a stored inspection."""
USED_S = 86_400.0
"""The time after which the use of a stored inspection is noted again: the collector deletes what is not used."""
FILE_BYTES = 8 << 30
OUTPUT_BYTES = 4 << 20
SHEET, SHEET_BYTES = "thumbnails.png", 2 << 20
THUMBNAILS, THUMBNAIL_PIXELS = 16, 96
_PNG = b"\x89PNG\r\n\x1a\n"
FOREIGN_AFTER_S = 86_400.0
"""The age at which scratch folders of other hosts are removed. No inspection lasts a day."""
_NO_MEMORY = ("MemoryError", "bad_alloc", "can't allocate memory", "Cannot allocate memory")
_KILLED = "the kernel ends processes so when the host has no memory left"
_INHERITED_VARIABLES = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH")


NOT_UPLOADED = "these bytes have not been uploaded; POST them to /v1/uploads first"


class Refused(Exception):
    """An inspection failed. A final refusal is due to the file or the network: another inspection would fail, too.

    `option` is the field of the registration that is at fault, if the file is not.
    """

    def __init__(
        self, code: str, message: str, hint: str | None = None, final: bool = True, option: str | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.hint, self.final, self.option = code, message, hint, final, option


class Thumbnails(BaseModel):
    """The places in a sheet of thumbnails: squares, in rows from the top left."""

    side: int = Field(ge=1, le=THUMBNAIL_PIXELS)
    """Height and width of a place in pixels."""
    columns: int = Field(ge=1, le=THUMBNAILS)
    classes: list[int | None] = Field(max_length=THUMBNAILS)
    """The class of each place; null without labels."""


class Counted(BaseModel):
    """How far an inspection is."""

    done: int = Field(ge=0)
    total: int = Field(ge=0)
    """Images."""


class _Line(BaseModel):
    progress: Counted


class _Output(BaseModel):
    ok: bool
    facts: dict[str, Any] | None = None
    thumbnails: Thumbnails | None = None
    error: dict[str, Any] | None = None


OnProgress = Callable[[int, int], None]
"""Gets the number of images that were read, and of all; 0 of 0 when the file is opened."""
Keep = Callable[[Path, Thumbnails], Awaitable[None]]
"""Stores the sheet of thumbnails that an inspection has written."""


class Inspector:
    """Runs inspections, each in a child process with a scratch folder of its own."""

    def __init__(
        self, scratch: Path, command: Sequence[str] = ENGINE, timeout_s: float = TIMEOUT_S, parallel: int = PARALLEL
    ) -> None:
        self.scratch = scratch
        self._command = tuple(command)
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes()
        self._places, self._places_of_data = Places(parallel), Places(parallel)

    async def inspect(
        self,
        kind: type[F],
        *subject: str,
        on_progress: OnProgress | None = None,
        keep: Keep | None = None,
        asker: str = "",
        **options: Any,
    ) -> F:
        """Run `kdcore inspect KIND --OPTION=VALUE... -- SUBJECT...`, without options that are None. Raises Refused, or
        Busy if too many of `asker`, or of all, wait already.

        `on_progress` is called when a file is opened, and of a data set about once a second; `keep` with the thumbnails
        of a data set.
        """

        async def attempt() -> _Output:
            name = f"inspect.{secrets.token_hex(8)}"
            with disk_full_as_storage_full(self.scratch), locked_folder(self.scratch, name) as scratch:
                sheet = scratch.path / SHEET
                arguments = [KINDS[kind], *_flags(options)]
                arguments += ["--progress"] if on_progress else []
                arguments += ["--thumbnails", str(sheet)] if keep else []
                # Whatever stands behind these dashes is no option.
                arguments += ["--", *subject]
                output = await self._run(_short(arguments, scratch.path), scratch.path, on_progress)
                if keep and output.thumbnails is not None:
                    await keep(sheet, output.thumbnails)
                return output

        output = await self._places_of(kind).run(asker, attempt)
        try:
            return _typed(kind, output.facts)
        except ValidationError as error:
            log.error("an inspection printed other facts than expected: %s", error)
            raise Refused("internal", "the service cannot read the result of the inspection", final=False) from None

    def is_free(self, kind: type[BaseModel]) -> bool:
        """Return True if an inspection of this kind would start at once."""
        return self._places_of(kind).is_free

    def require_room(self, kind: type[BaseModel], asker: str) -> None:
        """Raise Busy if an inspection of this kind could not even wait."""
        self._places_of(kind).require_room(asker)

    def _places_of(self, kind: type[BaseModel]) -> Places:
        return self._places_of_data if kind is DatasetFacts else self._places

    async def _run(self, arguments: Sequence[str], scratch: Path, on_progress: OnProgress | None) -> _Output:
        limits = (str(round(self._timeout_s * 2)), str(self._memory_bytes), str(FILE_BYTES))
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "api.process_limits", str(os.getpid()), *limits,
            *self._command, "inspect", *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=_environment(scratch),
            start_new_session=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(self._timeout_s):
                output, errors = await asyncio.gather(_head(child.stdout, on_progress), _head(child.stderr))
                await child.wait()
        except TimeoutError:
            raise Refused("timeout", f"the inspection took longer than {self._timeout_s:g} s", final=False) from None
        finally:
            # The child leads a session: all that it has started ends too.
            kill_group(child.pid)
            await child.wait()
        return _result(output, errors.decode(errors="replace"), child.returncode, self._memory_bytes)


@dataclass
class _Run:
    """An inspection that runs, for all who need it."""

    task: asyncio.Task[Any]
    listeners: list[OnProgress]
    users: int = 0
    last: list[tuple[int, int]] = field(default_factory=list)
    """What was reported last; empty before the file is opened."""


@dataclass(frozen=True)
class Inspections:
    """The inspections of one service: each is run once, and its facts or its final refusal are stored."""

    db: Database
    files: FileStore
    inspector: Inspector
    linger_s: float = LINGER_S
    asker: str = ""
    """Who takes turns with others (`places.py`)."""
    _runs: dict[tuple[str, str, str], _Run] = field(default_factory=dict)

    def of(self, asker: str) -> "Inspections":
        """Return the same inspections for one asker."""
        return replace(self, asker=asker)

    async def has(self, digest: str) -> bool:
        return await to_thread.run_sync(self.files.exists, digest)

    async def inspect(
        self,
        kind: type[F],
        *subject: str,
        on_progress: OnProgress | None = None,
        pictured: bool = False,
        **options: Any,
    ) -> F:
        """Return the facts of a blob (`subject`: its digest) or of a network (its name, for taps also their paths).

        `pictured`: a data set whose thumbnails are not stored is inspected again. Raises Refused or Busy.
        """
        if kind in OF_FILES:
            (digest,) = subject
            subject = (str(self.files.path(digest)),)
        else:
            digest = hashlib.sha256("\n".join(subject).encode()).hexdigest()
        key = digest, KINDS[kind], _options_key(kind, options)
        run = self._runs.get(key)
        if run is None:
            listeners: list[OnProgress] = []
            last: list[tuple[int, int]] = []

            def report(done: int, total: int) -> None:
                last[:] = [(done, total)]
                for listener in listeners:
                    listener(done, total)

            work = self._stored_or_new(kind, key, subject, options, report, pictured)
            run = self._runs[key] = _Run(asyncio.create_task(work), listeners, last=last)
            run.task.add_done_callback(lambda _: self._forget(key, run))
        if on_progress is not None:
            run.listeners.append(on_progress)
            for done, total in run.last:
                on_progress(done, total)
        run.users += 1
        try:
            facts: F = await asyncio.shield(run.task)
            return facts
        finally:
            run.users -= 1
            if on_progress is not None:
                run.listeners.remove(on_progress)
            if not run.users and not run.task.done():
                asyncio.get_running_loop().call_later(self.linger_s, self._end_unused, key, run)

    async def dataset(
        self, digest: str, options: DataOptions, *, on_progress: OnProgress | None = None, pictured: bool = False
    ) -> DatasetFacts:
        """Return the facts of a data set that is read with these options. Raises Refused."""
        size, more = _of_dataset(options)
        how: dict[str, Any] = {"on_progress": on_progress, "pictured": pictured}
        return await self.inspect(DatasetFacts, digest, image_size=size, options=more, **how)

    async def thumbnails(self, digest: str, options: DataOptions) -> dict[str, Any] | None:
        """Return the digest of the sheet that the inspection of a data set has made, and its `Thumbnails`, or None."""
        size, more = _of_dataset(options)
        key = _options_key(DatasetFacts, {"image_size": size, "options": more})
        stored = await self.db.read(registry.get_inspection, digest, THUMBNAILS_KIND, key)
        return stored if stored and await self.has(stored["sha256"]) else None

    async def close(self) -> None:
        """End the inspections that run."""
        tasks = [run.task for run in self._runs.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _stored_or_new(
        self,
        kind: type[F],
        key: tuple[str, str, str],
        subject: Sequence[str],
        options: dict[str, Any],
        report: OnProgress,
        pictured: bool,
    ) -> F:
        stored, is_noted = await self.db.read(_find, key)
        if not is_noted:
            await self.db.write(registry.note_use, *key)
        if stored is not None and "refused" in stored:
            raise Refused(**stored["refused"])
        if stored is not None and not (pictured and await self._lacks_thumbnails(key)):
            return _typed(kind, stored)
        sheet: dict[str, Any] = {}

        async def keep(path: Path, places: Thumbnails) -> None:
            content = await to_thread.run_sync(_read_sheet, path)
            blob = await to_thread.run_sync(self.files.put_stream, [content])
            sheet.update(sha256=blob.sha256, **places.model_dump())

        how: dict[str, Any] = {"asker": self.asker} | ({"on_progress": report} if kind in OF_FILES else {})
        how |= {"keep": keep} if kind is DatasetFacts else {}
        try:
            facts = await self.inspector.inspect(kind, *subject, **how, **options)
        except Refused as refused:
            if refused.final:
                await self.db.write(registry.put_inspection, *key, {"refused": _kept(refused)})
            raise

        def put(connection: Connection) -> None:
            registry.put_inspection(connection, *key, facts.model_dump(mode="json"))
            if kind is DatasetFacts:
                registry.put_inspection(connection, key[0], THUMBNAILS_KIND, key[2], sheet)

        await self.db.write(put)
        return facts

    async def _lacks_thumbnails(self, key: tuple[str, str, str]) -> bool:
        """True if the sheet is not stored: the collector deletes those that no registered data set names."""
        sheet = await self.db.read(registry.get_inspection, key[0], THUMBNAILS_KIND, key[2])
        return sheet is None or (bool(sheet) and not await self.has(sheet["sha256"]))

    def _end_unused(self, key: tuple[str, str, str], run: _Run) -> None:
        if not run.users:
            # Those who need it from now on begin a new one.
            self._forget(key, run)
            run.task.cancel()

    def _forget(self, key: tuple[str, str, str], run: _Run) -> None:
        if self._runs.get(key) is run:
            del self._runs[key]
        if run.task.done() and not run.task.cancelled():
            run.task.exception()  # Those who waited have it; without this, asyncio would log it if there was nobody.


def _find(connection: Connection, key: tuple[str, str, str]) -> tuple[dict[str, Any] | None, bool]:
    """Return a stored inspection, and False if its use should be noted."""
    stored = registry.get_inspection(connection, *key)
    return stored, stored is None or not registry.is_long_unused(connection, *key, USED_S)


async def while_wanted(work: Coroutine[Any, Any, T], gone: Callable[[], Awaitable[bool]]) -> T:
    """Return the result of an inspection for a request. Raises Refused when its client is gone."""
    task = asyncio.create_task(work)
    try:
        while not (await asyncio.wait({task}, timeout=GONE_S))[0]:
            if await gone():
                raise Refused("internal", "the client closed the connection before the inspection ended", final=False)
        return task.result()
    finally:
        task.cancel()


def _kept(refused: Refused) -> dict[str, Any]:
    """Return the arguments of a refusal as they are stored."""
    return {name: value for name, value in vars(refused).items() if value is not None}


def _options_key(kind: type[BaseModel], options: dict[str, Any]) -> str:
    """Return all that decides the facts beside the bytes or the name: the options, and what they are read by."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if kind in _NAMED_OPTIONS:
        key = json.dumps(given, sort_keys=True) if given else ""
    else:
        key = " ".join(map(str, given.values()))
    if kind in OF_FILES:
        key += f" reading={DATASET_READING if kind is DatasetFacts else MODEL_READING}"
    if kind in (PublishedFacts, NamedStartFacts):
        key += f" {_libraries()}"  # Another version publishes other weights.
    key = key.strip()
    # Names of classes may be many: the column has room for so much.
    return key if len(key) <= MOST_KEY else f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def _of_dataset(options: DataOptions) -> tuple[int | None, str | None]:
    """Return what decides how a data set is read: the size, and the other options as JSON."""
    deciding = options.deciding()
    size = deciding.pop("image_size", None)
    return size, json.dumps(deciding, sort_keys=True) if deciding else None


def _read_sheet(path: Path) -> bytes:
    """Return the bytes of a sheet of thumbnails. The child has read a user's file: it may have left anything there."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            content = file.read(SHEET_BYTES + 1) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
    except OSError as error:
        log.error("the thumbnails of an inspection cannot be read: %s", error)
        content = b""
    if not content.startswith(_PNG) or len(content) > SHEET_BYTES:
        raise Refused("internal", "the service cannot read the thumbnails of the inspection", final=False)
    return content


def _typed(kind: type[F], facts: Any) -> F:
    """Return facts as their class; those of a model may be a program's. Raises ValidationError."""
    if kind is ModelFacts:
        return cast(F, model_facts(facts))
    return kind.model_validate(facts)


def _libraries() -> str:
    """Return the versions of the libraries that publish weights. They are not imported."""
    versions = []
    for name in ("torchvision", "timm"):
        with suppress(PackageNotFoundError):
            versions.append(f"{name}={version(name)}")
    return " ".join(versions)


def _flags(options: dict[str, Any]) -> Iterator[str]:
    """Yield options with their values in one argument each, so that no value is read as an option."""
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, tuple) and all(isinstance(one, int) for one in value):
            yield from (flag, *map(str, value)) if value else ()
        elif value is not None:
            yield from (f"{flag}={_argument(one)}" for one in (value if isinstance(value, tuple) else (value,)))


def _argument(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _short(arguments: list[str], scratch: Path) -> list[str]:
    """Return the arguments, or those that name a file with them if they are too long for a command line."""
    try:
        longest = max(len(os.fsencode(argument)) for argument in arguments)
    except UnicodeEncodeError:
        longest = MOST_ARGUMENT_BYTES
    if longest < MOST_ARGUMENT_BYTES and not any("\0" in argument for argument in arguments):
        return arguments
    path = scratch / "arguments.json"
    path.write_text(json.dumps(arguments))
    return ["--arguments", str(path)]


def memory_bytes() -> int:
    """Return the bytes of memory that one inspection may take on this host."""
    return min(MEMORY_BYTES, max(LEAST_MEMORY_BYTES, round((host_memory() or MEMORY_BYTES) * MEMORY_SHARE)))


async def _head(stream: asyncio.StreamReader | None, on_progress: OnProgress | None = None) -> bytes:
    """Return the first bytes of a stream. The rest is read and dropped, so that the child never blocks.

    With `on_progress`, lines of progress are reported and are not in the result.
    """
    head, line = bytearray(), bytearray()
    while stream and (chunk := await stream.read(65_536)):
        line += chunk
        *whole, line = line.split(b"\n")
        for one in whole:
            if on_progress is None or not _reported(one, on_progress):
                head += (one + b"\n")[: OUTPUT_BYTES - len(head)]
        if len(line) > 65_536:
            head += line[: OUTPUT_BYTES - len(head)]
            line.clear()
    return bytes(head + line[: OUTPUT_BYTES - len(head)])


def _reported(line: bytearray, on_progress: OnProgress) -> bool:
    """Report a line of progress. Returns False for any other line."""
    if not line.startswith(b'{"progress"'):
        return False
    try:
        progress = _Line.model_validate_json(line).progress
    except ValidationError:
        return False
    on_progress(progress.done, progress.total)
    return True


def _result(output: bytes, errors: str, exit_code: int | None, most_bytes: int) -> _Output:
    """Return the result in the last line of the output. Raises Refused."""
    lines = output.decode(errors="replace").strip().splitlines()
    try:
        result = _Output.model_validate_json(lines[-1] if lines else "")
    except ValidationError:
        log.error("an inspection ended with %s and no result: %s", exit_code, errors)
        last = errors.strip().splitlines()[-1:]
        if any(sign in line for line in last for sign in _NO_MEMORY):
            raise _out_of_memory(most_bytes) from None
        how = f"signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
        hint = "; ".join(last) or (_KILLED if exit_code == -signal.SIGKILL else None)
        raise Refused("internal", f"the inspection ended with {how}", hint, final=False) from None
    if result.ok and result.facts is not None:
        return result
    error = result.error or {}
    if error.get("code") == OutOfMemory.code:
        log.warning("an inspection ran out of memory: %s", error.get("message"))
        raise _out_of_memory(most_bytes)
    raise Refused(
        str(error.get("code", "internal")),
        str(error.get("message", "the file cannot be used")),
        error.get("hint"),
        final=not error.get("retryable", False),
        option=next((name for name in DataOptions.model_fields if name == error.get("option")), None),
    )


def _out_of_memory(most_bytes: int) -> Refused:
    text = f"the inspection ran out of memory; it may take {most_bytes / 1e9:.1f} GB on this host"
    hint = "a smaller file, smaller pictures or a smaller network needs less; so does a host with more memory"
    return Refused(OutOfMemory.code, text, hint, final=False)


def _environment(scratch: Path) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in _INHERITED_VARIABLES if name in os.environ}
    return {**inherited, "HOME": str(scratch), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
