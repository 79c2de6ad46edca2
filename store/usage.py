"""How much lies in the file store, and in this host's cache, counted on the disk."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from base.files import files_in
from store.blobs import BlobStore

KINDS = ("blobs", "checkpoints", "logs", "uploads", "trash")


@dataclass(frozen=True)
class Usage:
    files: int
    bytes: int


def usage(files: BlobStore, cache: Path) -> dict[str, Usage]:
    """By kind: a folder of the store each, and `cache`. Walks all of it, so it is not for an event loop."""
    return {kind: measured(files.folder / kind) for kind in KINDS} | {"cache": measured(cache)}


def measured(path: Path) -> Usage:
    """A file, or all files in a folder; nothing where there is none."""
    sizes = list(_sizes(path))
    return Usage(len(sizes), sum(sizes))


def _sizes(path: Path) -> Iterator[int]:
    for file in [path] if path.is_file() else files_in(path):
        # What vanishes while we look has no size.
        with suppress(FileNotFoundError):
            yield file.lstat().st_size
