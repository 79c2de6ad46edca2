"""Files that are whole or not there: written beside their place, made durable, then renamed into it."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Written:
    path: Path
    bytes: int
    sha256: str


def write_whole(path: Path, write: Callable[[Path], object]) -> Written:
    """Let `write` fill a temporary file, then publish it under `path`; on any failure nothing is left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        digest = sha256(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    # Without the folder's own fsync a power cut may forget the rename.
    _sync(path.parent)
    return Written(path, path.stat().st_size, digest)


def write_text(path: Path, text: str) -> Written:
    return write_whole(path, lambda temporary: temporary.write_text(text))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
