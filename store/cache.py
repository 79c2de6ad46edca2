"""This host's cache of data sets, trimmed to a size. `base.data_cache` has the names of its folders and locks.

An entry is deleted under its locks, and only if it was not used lately, because an engine opens the files of its entry
after it has released the lock. Files that are open or mapped stay readable. Lock files are never deleted: a process
could lock the old file while another locks a new one.
"""

import fcntl
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from base.data_cache import DOWNLOADS, LOCK, PROJECTS, is_partial, lock_of, partial_of
from base.files import modified_at
from store.file_store import Usage, measured

IN_USE_S = 3600.0
"""The longest time from the look-up of an entry until all its files are open."""


@dataclass(frozen=True)
class Entry:
    folder: Path
    size: Usage
    used_at: float

    def locks(self) -> list[Path]:
        """Return its lock files, in the order in which the engine locks them."""
        own = lock_of(self.folder)
        is_download = self.folder.parent.name == DOWNLOADS
        return [own, *sorted(self.folder.parents[1].glob(f"{own.stem}-*{LOCK}"))] if is_download else [own]


def trim(cache: Path, max_bytes: int, dry_run: bool = False) -> list[Entry]:
    """Delete unfinished entries, then the least recently used until the rest fits into `max_bytes`. Returns them."""
    entries = sorted(_entries(cache), key=lambda entry: (not is_partial(entry.folder), entry.used_at))
    excess_bytes = sum(entry.size.bytes for entry in entries) - max_bytes
    deleted = []
    for entry in entries:
        if (excess_bytes > 0 or is_partial(entry.folder)) and _delete(entry, dry_run):
            excess_bytes -= entry.size.bytes
            deleted.append(entry)
    return deleted


def _entries(cache: Path) -> Iterator[Entry]:
    for root in (cache, *(cache / PROJECTS).glob("*/")):
        for parent in (root, root / DOWNLOADS):
            for folder in parent.glob("*/"):
                if folder not in (root / DOWNLOADS, cache / PROJECTS):
                    yield Entry(folder, measured(folder), modified_at(folder))


def _delete(entry: Entry, dry_run: bool) -> bool:
    """Return False if the entry is in use."""
    with _try_lock(entry.locks()) as locked:
        # The mtime is read again under the lock.
        if not locked or not (is_partial(entry.folder) or time.time() - modified_at(entry.folder) > IN_USE_S):
            return False
        if not dry_run:
            _delete_tree(entry.folder)
        return True


def _delete_tree(folder: Path) -> None:
    """Rename the folder to `….partial` first: a process killed half way must not leave an entry that looks complete."""
    partial = partial_of(folder)
    if partial != folder:
        shutil.rmtree(partial, ignore_errors=True)
        folder.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _try_lock(locks: list[Path]) -> Iterator[bool]:
    """Lock all files without waiting. Yields False if another process holds one of them."""
    with ExitStack() as stack:
        try:
            for lock in locks:
                fcntl.flock(stack.enter_context(lock.open("a")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
