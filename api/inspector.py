"""A file from outside is opened by a child process, never by the server: what it may hold is the child's problem.

The child is `python -m kdcore inspect …`: in a session of its own, with few environment variables, a scratch folder,
bounds on time, memory and disk, and two of them at a time. It ends with the server, however that ends. It answers one
JSON object: the facts, or what is wrong.
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from api.scratch import scratch_folder
from kdcore.catalog import ArchitectureFacts, DatasetFacts, ModelFacts, TapFacts
from kdcore.catalog.facts import ProgramFacts

F = TypeVar("F", bound=BaseModel)

log = logging.getLogger("distillery.inspector")

ENGINE = (sys.executable, "-m", "kdcore")
PLACES = 2
TIMEOUT_S = 1800.0
"""Every image of a large archive is decoded once; clients wait as long."""
MEMORY_BYTES = 8 << 30
FILE_BYTES = 8 << 30
ANSWER_BYTES = 4 << 20
_KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class Refused:
    """Why a file cannot be used. A final verdict is about the bytes, and is kept; the other kind is about us."""

    code: str
    message: str
    hint: str | None = None
    final: bool = True


class _Verdict(BaseModel):
    ok: bool
    facts: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


class Inspector:
    """Asks the engine what a file is."""

    def __init__(
        self, scratch: Path, command: Sequence[str] = ENGINE, timeout_s: float = TIMEOUT_S, places: int = PLACES
    ) -> None:
        """`scratch` is where each child gets a folder of its own."""
        self._scratch = scratch
        self._command = tuple(command)
        self._timeout_s = timeout_s
        self._places = asyncio.Semaphore(places)

    async def model(self, path: Path, architecture: str | None) -> ModelFacts | Refused:
        options = ["--architecture", architecture] if architecture else []
        answer = await self._ask("model", str(path), *options)
        return answer if isinstance(answer, Refused) else _facts(ModelFacts, answer)

    async def program(self, path: Path) -> ProgramFacts | Refused:
        answer = await self._ask("program", str(path))
        return answer if isinstance(answer, Refused) else _facts(ProgramFacts, answer)

    async def dataset(self, path: Path, image_size: int | None) -> DatasetFacts | Refused:
        options = ["--image-size", str(image_size)] if image_size else []
        answer = await self._ask("dataset", str(path), *options)
        return answer if isinstance(answer, Refused) else _facts(DatasetFacts, answer)

    async def architecture(
        self, name: str, num_classes: int, channels: int, image_size: tuple[int, int]
    ) -> ArchitectureFacts | Refused:
        """Of a network that only its library knows: it is built, and shown two images."""
        answer = await self._ask("architecture", name, *_shape(num_classes, channels, image_size))
        return answer if isinstance(answer, Refused) else _facts(ArchitectureFacts, answer)

    async def taps(
        self, name: str, num_classes: int, channels: int, image_size: tuple[int, int], paths: Sequence[str]
    ) -> TapFacts | Refused:
        """What a network gives at these paths, once it is built and has been shown two images."""
        answer = await self._ask("taps", name, *paths, *_shape(num_classes, channels, image_size))
        return answer if isinstance(answer, Refused) else _facts(TapFacts, answer)

    async def _ask(self, *arguments: str) -> dict[str, Any] | Refused:
        async with self._places:
            with scratch_folder(self._scratch) as scratch:
                return await self._run(arguments, scratch)

    async def _run(self, arguments: Sequence[str], scratch: Path) -> dict[str, Any] | Refused:
        bounds = (str(round(self._timeout_s * 2)), str(MEMORY_BYTES), str(FILE_BYTES))
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "api.limits", str(os.getpid()), *bounds, *self._command, "inspect", *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=_environment(scratch),
            start_new_session=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(self._timeout_s):
                told, complaints = await asyncio.gather(_head(child.stdout), _head(child.stderr))
                await child.wait()
        except TimeoutError:
            return Refused("timeout", f"looking at the file took longer than {self._timeout_s:g} s", final=False)
        finally:
            await _end(child)
        return _read(told, complaints, child.returncode)


async def _head(stream: asyncio.StreamReader | None) -> bytes:
    """The first bytes of what the child says; the rest is read and dropped, so that it never blocks."""
    kept = bytearray()
    while stream and (chunk := await stream.read(65_536)):
        kept += chunk[: ANSWER_BYTES - len(kept)]
    return bytes(kept)


async def _end(child: asyncio.subprocess.Process) -> None:
    """Nothing of the child's session outlives the question, whatever it has started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    await child.wait()


def _read(told: bytes, complaints: bytes, exit_code: int | None) -> dict[str, Any] | Refused:
    lines = told.decode(errors="replace").strip().splitlines()
    try:
        verdict = _Verdict.model_validate_json(lines[-1] if lines else "")
    except ValidationError:
        last = complaints.decode(errors="replace").strip().splitlines()[-1:]
        log.error("an inspection ended with %s and no answer: %s", exit_code, complaints.decode(errors="replace"))
        how = f"signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
        return Refused("internal", f"looking at the file ended with {how}", "; ".join(last) or None, final=False)
    if verdict.ok and verdict.facts is not None:
        return verdict.facts
    error = verdict.error or {}
    return Refused(
        str(error.get("code", "internal")),
        str(error.get("message", "the file cannot be used")),
        error.get("hint"),
        final=not error.get("retryable", False),
    )


def _shape(num_classes: int, channels: int, image_size: tuple[int, int]) -> list[str]:
    return ["--classes", str(num_classes), "--channels", str(channels), "--image-size", *map(str, image_size)]


def _facts(kind: type[F], answer: dict[str, Any]) -> F | Refused:
    try:
        return kind.model_validate(answer)
    except ValidationError as error:
        log.error("an inspection answered with other facts than expected: %s", error)
        return Refused("internal", "looking at the file gave an answer that the service cannot read", final=False)


def _environment(scratch: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    return {**kept, "HOME": str(scratch), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
