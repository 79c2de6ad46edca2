"""Rows of numbers under 64-bit keys, in files that several processes fill at once: what a teacher answers for a view.

An entry `<key>-teacher/` of the cache has a file for each process that has written into it. A file is a list of blocks:

    header    magic, 8 bytes · count, uint32 · bytes of a record, uint32 · CRC-32 of the rest, uint32 · 4 bytes of 0
    keys      count × int64
    records   count × bytes of a record

Only its writer appends to a file. Readers map it, look for new blocks when they are told to, and look before each read
whether somebody has cut it off. Nothing is trusted without its checksum: a block that is cut short by `kill -9`, a
power cut or a full disk is left out, and so is one of which a bit has changed. So nothing is ever synced; what a power
cut takes away is computed again.

A process holds a shared lock on the entry as long as it uses it. An entry that nobody holds may be deleted.
"""

import errno
import fcntl
import os
import secrets
import shutil
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from base.data_cache import TEACHER, lock_of, partial_of
from base.files import files_in, modified_at

Keys = npt.NDArray[np.int64]
Records = npt.NDArray[np.uint8]

MIN_FREE_BYTES = 500_000_000
"""Nothing more is stored if the disk would have less than this left."""
_MAGIC = b"KDVIEWS1"
_HEADER = struct.Struct("<8sIII4x")
_FLUSH_BYTES = 4 << 20
"""What is collected before a block is written; the end of an epoch writes one, too."""
_FILE_SHIFT = 40
"""A place is the number of a file, and an offset in it of so many bits."""
_INDEX_BYTES = 16
"""Memory of one key in the index. It counts as much as a byte on disk, so that small records stay bounded, too."""


class NoRoom(OSError):
    """The disk has too little space left to store more."""


@dataclass(eq=False)
class _File:
    """A file of blocks as far as it has been read."""

    path: Path
    bytes: Records = field(default_factory=lambda: np.empty(0, dtype=np.uint8))
    read: int = 0

    @property
    def is_cut(self) -> bool:
        """Return True if the file has become shorter: a read of what is missing in the map would end the process. A
        deleted file stays in it."""
        try:
            return self.path.stat().st_size < len(self.bytes)
        except OSError:
            return False


class ViewStore:
    """One entry of the cache. `size` is the bytes of a record, `max_bytes` what all entries together may have.

    Raises OSError if the entry cannot be made or locked. Afterwards `add` and `flush` raise it, and write nothing more
    then; what is stored can still be read. `read` raises it if somebody has cut off a file.
    """

    def __init__(self, folder: Path, size: int, max_bytes: int) -> None:
        self.folder, self.size, self.max_bytes = folder, size, max_bytes
        self.full = False
        """True when the entries together have `max_bytes`, and none of the others can be deleted."""
        self.written = 0
        """Records that this process has stored."""
        self.dropped = 0
        """Records that were added and could not be stored."""
        self._files: list[_File] = []
        self._keys: Keys = np.empty(0, dtype=np.int64)
        self._places: Keys = np.empty(0, dtype=np.int64)
        self._pending: list[tuple[Keys, Records]] = []
        self._pending_bytes = 0
        self._output: IO[bytes] | None = None
        self._broken = False
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._lock = lock_of(folder).open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_SH)
            folder.mkdir(exist_ok=True)
            os.utime(folder)
        except OSError:
            self._lock.close()
            raise
        self.refresh()

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def total_bytes(self) -> int:
        """Return the size of the entry as this process knows it."""
        return sum(file.read for file in self._files)

    def refresh(self) -> None:
        """Find what has been stored since the last time, by any process. Marks the entry as used."""
        known = {file.path for file in self._files}
        with suppress(OSError):
            os.utime(self.folder)
            self._files += [_File(path) for path in sorted(self.folder.glob("*.views")) if path not in known]
        found = [block for number, file in enumerate(self._files) for block in self._new_blocks(number, file)]
        if found:
            self._insert(np.concatenate([keys for keys, _ in found]), np.concatenate([places for _, places in found]))

    def find(self, keys: Keys) -> Keys:
        """Return the place of each key, for `read`; -1 for a key that is not stored."""
        if not len(self._keys):
            return np.full(len(keys), -1, dtype=np.int64)
        at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._places[at], -1)

    def read(self, places: Keys) -> Records:
        """Return the records at places, n × size. Raises OSError if a file has become shorter."""
        for number in np.unique(places >> _FILE_SHIFT).tolist():
            if self._files[number].is_cut:
                raise OSError(errno.EIO, f"{self._files[number].path.name} was cut off while it was read")
        records = np.empty((len(places), self.size), dtype=np.uint8)
        for row, place in enumerate(places.tolist()):
            offset = place & ((1 << _FILE_SHIFT) - 1)
            records[row] = self._files[place >> _FILE_SHIFT].bytes[offset : offset + self.size]
        return records

    def add(self, keys: Keys, records: Records) -> None:
        """Store records, n × size, under keys. They are found after `flush` and `refresh`. Raises OSError."""
        if self.full or self._broken:
            self.dropped += len(keys)
            return
        if not len(keys):
            return
        self._pending.append((keys, records))
        self._pending_bytes += keys.nbytes + records.nbytes
        if self._pending_bytes >= _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added. Raises OSError, NoRoom among them, and stores nothing more after that."""
        if not self._pending:
            return
        keys = np.concatenate([keys for keys, _ in self._pending])
        records = np.concatenate([records for _, records in self._pending])
        self._pending, self._pending_bytes = [], 0
        content = keys.tobytes() + records.tobytes()
        block = _HEADER.pack(_MAGIC, len(keys), self.size, zlib.crc32(content)) + content
        try:
            if not self._make_room(len(block) + _INDEX_BYTES * len(keys)):
                self.full = True
                self.dropped += len(keys)
                return
            self._write(block)
            self.written += len(keys)
        except OSError:
            self._broken = True
            self.dropped += len(keys)
            self._end_output()
            raise

    def close(self) -> None:
        """Release the entry. What was added and not flushed is dropped."""
        self._pending, self._pending_bytes = [], 0
        self._end_output()
        self._lock.close()

    # Reading

    def _new_blocks(self, number: int, file: _File) -> list[tuple[Keys, Keys]]:
        """Return keys and places of the whole blocks at the end of a file. Maps it again if there are any."""
        with suppress(OSError, ValueError):
            if file.path.stat().st_size - file.read > _HEADER.size:
                file.bytes = np.asarray(np.memmap(file.path, dtype=np.uint8, mode="r"))
        blocks: list[tuple[Keys, Keys]] = []
        if file.is_cut:
            return blocks
        while (block := self._block(file)) is not None:
            start, keys, is_whole = block
            records = start + _HEADER.size + keys.nbytes
            end = records + len(keys) * self.size
            if is_whole:
                offsets = np.arange(records, end, self.size, dtype=np.int64)
                blocks.append((keys, offsets | number << _FILE_SHIFT))
            elif end == len(file.bytes):
                break  # It may still be written.
            file.read = end
        return blocks

    def _block(self, file: _File) -> tuple[int, Keys, bool] | None:
        """Return start, keys and soundness of the next block; None if there is none, or nothing to be made of it."""
        start, content = file.read, file.read + _HEADER.size
        if content > len(file.bytes):
            return None
        magic, count, size, checksum = _HEADER.unpack(file.bytes[start:content].tobytes())
        end = content + count * (8 + size)
        if magic != _MAGIC or size != self.size or not count or end > len(file.bytes):
            return None
        keys = np.frombuffer(file.bytes[content : content + 8 * count].tobytes(), dtype=np.int64)
        return start, keys, zlib.crc32(file.bytes[content:end].data) == checksum

    def _insert(self, keys: Keys, places: Keys) -> None:
        keys, first = np.unique(keys, return_index=True)
        places = places[first]
        is_new = self.find(keys) < 0
        keys, places = keys[is_new], places[is_new]
        at = np.searchsorted(self._keys, keys)
        self._keys, self._places = np.insert(self._keys, at, keys), np.insert(self._places, at, places)

    # Writing

    def _write(self, block: bytes) -> None:
        if self._output is None:
            path = self.folder / f"{os.getpid()}-{secrets.token_hex(8)}.views"
            self._output = path.open("xb", buffering=0)
        rest = memoryview(block)
        while rest:
            rest = rest[self._output.write(rest) or 0 :]

    def _end_output(self) -> None:
        if self._output is not None:
            with suppress(OSError):
                self._output.close()
            self._output = None

    def _make_room(self, needed: int) -> bool:
        """Return True if so many bytes may be stored, after the entries that were not used longest have been deleted.
        Raises NoRoom if the disk is nearly full."""
        while True:
            sizes = {entry: size_of(entry) for entry in self.folder.parent.glob(f"*{TEACHER}")}
            excess = sum(sizes.values()) + _INDEX_BYTES * len(self) + needed > self.max_bytes
            scarce = shutil.disk_usage(self.folder).free - needed < MIN_FREE_BYTES
            if not (excess or scarce):
                return True
            if sizes.get(self.folder, 0) + needed > self.max_bytes:
                return False  # Without the others, it would still not fit.
            others = sorted((entry for entry in sizes if entry != self.folder), key=modified_at)
            if not any(_delete_unused(entry) for entry in others):
                if scarce:
                    raise NoRoom(f"its disk has less than {MIN_FREE_BYTES + needed:,} bytes free")
                return False


def size_of(entry: Path) -> int:
    """Return the bytes of an entry; files that vanish meanwhile have none."""
    total = 0
    for path in files_in(entry):
        with suppress(OSError):
            total += path.stat().st_size
    return total


def _delete_unused(entry: Path) -> bool:
    """Delete an entry, unless a process holds it. Returns True if it is deleted."""
    with suppress(OSError), lock_of(entry).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Renamed first, so that a process killed half way leaves no entry that others would go on with.
        shutil.rmtree(partial_of(entry), ignore_errors=True)
        entry.rename(partial_of(entry))
        shutil.rmtree(partial_of(entry), ignore_errors=True)
        return True
    return False
