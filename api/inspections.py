"""Inspections: the facts of an uploaded file or of a network, read by a child process and cached by digest.

The server itself never opens an uploaded file. The child is `python -m kdcore inspect …`: it has a session of its
own, few environment variables, a scratch folder, and limits on time, memory and disk; two run at a time. It ends with
the server, even if the server is killed. It prints one JSON object: the facts, or the error.
"""

import asyncio
import hashlib
import json
import logging
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from anyio import to_thread
from pydantic import BaseModel, ValidationError

from base.files import disk_full_as_storage_full
from base.folders import locked_folder
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
from kdcore.catalog.facts import DATASET_READING, MODEL_READING, ProgramFacts
from kdcore.spec import DataOptions
from kdcore.spec.cost import JobCost
from store import registry
from store.database import Database
from store.file_store import FileStore

F = TypeVar("F", bound=BaseModel)

log = logging.getLogger("distillery.inspections")

OF_FILES: dict[type[BaseModel], str] = {
    ModelFacts: "model",
    ProgramFacts: "program",
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

ENGINE = (sys.executable, "-m", "kdcore")
PARALLEL = 2
TIMEOUT_S = 1800.0
"""The request waits while every image of a large archive is decoded once."""
MEMORY_BYTES = 8 << 30
FILE_BYTES = 8 << 30
OUTPUT_BYTES = 4 << 20
FOREIGN_AFTER_S = 86_400.0
"""The age at which scratch folders of other hosts are removed. No inspection lasts a day."""
_INHERITED_VARIABLES = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH")


NOT_UPLOADED = "these bytes have not been uploaded; POST them to /v1/uploads first"


class Refused(Exception):
    """An inspection failed. A final refusal is due to the file or the network: another inspection would fail, too."""

    def __init__(self, code: str, message: str, hint: str | None = None, final: bool = True) -> None:
        super().__init__(message)
        self.code, self.message, self.hint, self.final = code, message, hint, final


class _Output(BaseModel):
    ok: bool
    facts: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


class Inspector:
    """Runs inspections, each in a child process with a scratch folder of its own."""

    def __init__(
        self, scratch: Path, command: Sequence[str] = ENGINE, timeout_s: float = TIMEOUT_S, parallel: int = PARALLEL
    ) -> None:
        self._scratch = scratch
        self._command = tuple(command)
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(parallel)

    async def inspect(self, kind: type[F], *subject: str, **options: Any) -> F:
        """Run `kdcore inspect KIND SUBJECT... --OPTION VALUE...`, without options that are None. Raises Refused."""
        arguments, name = [KINDS[kind], *subject, *_flags(options)], f"inspect.{secrets.token_hex(8)}"
        async with self._slots:
            with disk_full_as_storage_full(self._scratch), locked_folder(self._scratch, name) as scratch:
                facts = await self._run(arguments, scratch.path)
        try:
            return kind.model_validate(facts)
        except ValidationError as error:
            log.error("an inspection printed other facts than expected: %s", error)
            raise Refused("internal", "the service cannot read the result of the inspection", final=False) from None

    async def _run(self, arguments: Sequence[str], scratch: Path) -> dict[str, Any]:
        limits = (str(round(self._timeout_s * 2)), str(MEMORY_BYTES), str(FILE_BYTES))
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
                output, errors = await asyncio.gather(_head(child.stdout), _head(child.stderr))
                await child.wait()
        except TimeoutError:
            raise Refused("timeout", f"the inspection took longer than {self._timeout_s:g} s", final=False) from None
        finally:
            # The child leads a session: all that it has started ends too.
            kill_group(child.pid)
            await child.wait()
        return _facts(output, errors.decode(errors="replace"), child.returncode)


@dataclass(frozen=True)
class Inspections:
    """The inspections of one service: each is run once, and its facts or its final refusal are stored."""

    db: Database
    files: FileStore
    inspector: Inspector

    async def has(self, digest: str) -> bool:
        return await to_thread.run_sync(self.files.exists, digest)

    async def inspect(self, kind: type[F], *subject: str, **options: Any) -> F:
        """Return the facts of a blob (`subject`: its digest) or of a network (its name, for taps also their paths).

        Raises Refused.
        """
        if kind in OF_FILES:
            (digest,) = subject
            subject = (str(self.files.path(digest)),)
        else:
            digest = hashlib.sha256("\n".join(subject).encode()).hexdigest()
        options_key = " ".join(str(value) for value in options.values() if value is not None)
        if kind in (PublishedFacts, NamedStartFacts):
            options_key = f"{options_key} {_libraries()}".strip()  # Another version publishes other weights.
        if kind is DatasetFacts:
            options_key = f"{options_key} reading={DATASET_READING}".strip()
        if kind is ModelFacts:
            named = json.dumps(options, sort_keys=True) if set(options) - {"architecture"} else options_key
            options_key = f"{named} reading={MODEL_READING}".strip()
        key = digest, KINDS[kind], options_key
        if (stored := await self.db.read(registry.get_inspection, *key)) is not None:
            if "refused" in stored:
                raise Refused(**stored["refused"])
            return kind.model_validate(stored)
        try:
            facts = await self.inspector.inspect(kind, *subject, **options)
        except Refused as refused:
            if refused.final:
                await self.db.write(registry.put_inspection, *key, {"refused": vars(refused)})
            raise
        await self.db.write(registry.put_inspection, *key, facts.model_dump(mode="json"))
        return facts

    async def dataset(self, digest: str, options: DataOptions) -> DatasetFacts:
        """Return the facts of a data set that is read with these options. Raises Refused."""
        deciding = options.deciding()
        size = deciding.pop("image_size", None)
        more = json.dumps(deciding, sort_keys=True) if deciding else None
        return await self.inspect(DatasetFacts, digest, image_size=size, options=more)


def _libraries() -> str:
    """Return the versions of the libraries that publish weights. They are not imported."""
    versions = []
    for name in ("torchvision", "timm"):
        with suppress(PackageNotFoundError):
            versions.append(f"{name}={version(name)}")
    return " ".join(versions)


def _flags(options: dict[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if value is not None and value != ():
            yield f"--{name.replace('_', '-')}"
            yield from map(_argument, value if isinstance(value, tuple) else (value,))


def _argument(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


async def _head(stream: asyncio.StreamReader | None) -> bytes:
    """Return the first bytes of a stream. The rest is read and dropped, so that the child never blocks."""
    head = bytearray()
    while stream and (chunk := await stream.read(65_536)):
        head += chunk[: OUTPUT_BYTES - len(head)]
    return bytes(head)


def _facts(output: bytes, errors: str, exit_code: int | None) -> dict[str, Any]:
    """Return the facts in the last line of the output. Raises Refused."""
    lines = output.decode(errors="replace").strip().splitlines()
    try:
        result = _Output.model_validate_json(lines[-1] if lines else "")
    except ValidationError:
        log.error("an inspection ended with %s and no result: %s", exit_code, errors)
        how = f"signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
        last = "; ".join(errors.strip().splitlines()[-1:]) or None
        raise Refused("internal", f"the inspection ended with {how}", last, final=False) from None
    if result.ok and result.facts is not None:
        return result.facts
    error = result.error or {}
    raise Refused(
        str(error.get("code", "internal")),
        str(error.get("message", "the file cannot be used")),
        error.get("hint"),
        final=not error.get("retryable", False),
    )


def _environment(scratch: Path) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in _INHERITED_VARIABLES if name in os.environ}
    return {**inherited, "HOME": str(scratch), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
