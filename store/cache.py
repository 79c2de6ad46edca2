"""This host's cache of data sets, trimmed to a size. `kdcore.data` fills it, and holds locks while it does.

    <key>/              decoded          <key>.lock      held while it is decoded, or found and marked as used
    <key>.partial/      half decoded
    downloads/<name>/   as published     downloads/<name>.lock; in use as well while a lock of `<name>-…` is held
    downloads/<name>.partial/

What goes is the longest unused, under its lock, and never what was used a moment ago: an engine reads its entry after
it has let go of the lock. What it has opened or mapped stays readable. Lock files stay, or two might hold one lock.
"""

import fcntl
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from base.files import modified_at
from store.usage import Usage, measured

PARTIAL, LOCK, DOWNLOADS = ".partial", ".lock", "downloads"
IN_USE_S = 3600.0
"""From finding an entry to having opened all its files, at the very most."""


@dataclass(frozen=True)
class Entry:
    folder: Path
    size: Usage
    used_at: float

    def locks(self) -> list[Path]:
        """Its own first, as the engine takes them."""
        name = self.folder.name.removesuffix(PARTIAL)
        own = self.folder.with_name(name + LOCK)
        downloaded = self.folder.parent.name == DOWNLOADS
        return [own, *sorted(self.folder.parents[1].glob(f"{name}-*{LOCK}"))] if downloaded else [own]


def trim(cache: Path, max_bytes: int, dry_run: bool = False) -> list[Entry]:
    """Remove what was left half done, then the longest unused until the rest fits; returns what went, or would."""
    entries = sorted(_entries(cache), key=lambda entry: entry.used_at)
    over = sum(entry.size.bytes for entry in entries) - max_bytes
    gone = []
    for entry in sorted(entries, key=lambda entry: not _half_done(entry)):
        if (over > 0 or _half_done(entry)) and _remove(entry, dry_run):
            over -= entry.size.bytes
            gone.append(entry)
    return gone


def _entries(cache: Path) -> Iterator[Entry]:
    for parent in (cache, cache / DOWNLOADS):
        for folder in parent.glob("*/"):
            if folder != cache / DOWNLOADS:
                yield Entry(folder, measured(folder), modified_at(folder))


def _half_done(entry: Entry) -> bool:
    return entry.folder.name.endswith(PARTIAL)


def _remove(entry: Entry, dry_run: bool) -> bool:
    """False where it is in use."""
    with _held(entry.locks()) as ours:
        if not ours or not (_half_done(entry) or time.time() - modified_at(entry.folder) > IN_USE_S):
            return False
        if not dry_run:
            _remove_whole(entry.folder)
        return True


def _remove_whole(folder: Path) -> None:
    """Under the name of what is half done, so that nobody takes the rest for the whole."""
    doomed = folder.with_name(folder.name.removesuffix(PARTIAL) + PARTIAL)
    if doomed != folder:
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def _held(locks: list[Path]) -> Iterator[bool]:
    """Hold all of them, without waiting; False where somebody else has one."""
    with ExitStack() as stack:
        try:
            for lock in locks:
                fcntl.flock(stack.enter_context(lock.open("a")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
