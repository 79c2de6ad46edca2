"""Disks whose power can be cut: ext4 on loop devices, in mounts that nobody else sees and that end with their test.

A cut is a copy of the image at that instant. What a mounted file system still keeps in memory is not in the image, as
it would not be on a disk whose plug is pulled; and mounting the copy replays the journal, as the next start would.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

CLONE_NEWNS = 0x20000
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
"""Tools that make disks are often on root's path only."""
SIZE_BYTES = 24 << 20
NEVER_BY_ITSELF = "loop,commit=3600"
"""The journal is written when somebody asks for it, and not because a busy machine let five seconds pass."""


def with_disks(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test on a thread with mounts of its own; skip it where the machine does not allow them."""

    @wraps(test)
    def in_private(tmp_path: Path, **fixtures: Any) -> None:
        with ThreadPoolExecutor(1) as private:
            private.submit(_leave_the_mounts_of_others, tmp_path).result()
            private.submit(test, tmp_path=tmp_path, **fixtures).result()

    return in_private


def _leave_the_mounts_of_others(place: Path) -> None:
    """Of this thread alone. What is mounted in `place` is in memory: a disk's own slowness has no part in this."""
    missing = [tool for tool in ("mount", "umount", "mkfs.ext4") if shutil.which(tool, path=PATH) is None]
    if missing:
        pytest.skip(f"this machine has no {missing[0]}")
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        pytest.skip(f"this machine gives no mounts of our own: {os.strerror(ctypes.get_errno())}")
    try:
        _run("mount", "--make-rprivate", "/")
        _run("mount", "-t", "tmpfs", "distillery", str(place))
        with disk(place / "trial"):
            pass
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine mounts no disk image: {error.stderr.strip()}")


class Disk:
    """A mounted disk. `folder` is where; `cut` shows what would be found there had the power failed just now."""

    def __init__(self, place: Path) -> None:
        self.folder = place / "mounted"
        self._image, self._copy, self._found = place / "image", place / "copy", place / "found"

    @contextmanager
    def cut(self) -> Iterator[Path]:
        _run("cp", "--sparse=always", str(self._image), str(self._copy))
        with _mounted(self._copy, self._found):
            yield self._found


@contextmanager
def disk(place: Path) -> Iterator[Disk]:
    """A new, empty disk."""
    for folder in (place, place / "mounted", place / "found"):
        folder.mkdir()
    with (place / "image").open("wb") as image:
        image.truncate(SIZE_BYTES)
    _run("mkfs.ext4", "-q", "-b", "4096", "-J", "size=4", str(place / "image"))
    with _mounted(place / "image", place / "mounted"):
        yield Disk(place)


@contextmanager
def _mounted(image: Path, folder: Path) -> Iterator[None]:
    _run("mount", "-o", NEVER_BY_ITSELF, str(image), str(folder))
    try:
        yield
    finally:
        _run("umount", str(folder))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "PATH": PATH})
