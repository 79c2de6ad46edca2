"""Disks whose power can be cut: ext4 on loop devices, in mounts that only their test sees.

A power cut is a copy of the image at that moment. It lacks what the mounted file system still has in memory, like a
real disk after a power cut; and mounting the copy replays the journal, like the next start.
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
"""The tools are often on root's path only."""
SIZE_BYTES = 24 << 20
NO_PERIODIC_COMMIT = "loop,commit=3600"
"""The journal is written on request only, and not because five seconds have passed on a busy machine."""


def with_disks(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a thread with mounts of its own. Skips the test if this machine does not allow them."""

    @wraps(test)
    def in_thread(tmp_path: Path, **fixtures: Any) -> None:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_use_own_mounts, tmp_path).result()
            thread.submit(test, tmp_path=tmp_path, **fixtures).result()

    return in_thread


def _use_own_mounts(place: Path) -> None:
    """Give this thread mounts of its own, and a file system in memory at `place`, which is faster than a disk."""
    missing = [tool for tool in ("mount", "umount", "mkfs.ext4") if shutil.which(tool, path=PATH) is None]
    if missing:
        pytest.skip(f"this machine has no {missing[0]}")
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        pytest.skip(f"this machine does not allow private mounts: {os.strerror(ctypes.get_errno())}")
    try:
        _run("mount", "--make-rprivate", "/")
        _run("mount", "-t", "tmpfs", "distillery", str(place))
        with disk(place / "trial"):
            pass
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine cannot mount a disk image: {error.stderr.strip()}")


class Disk:
    """A disk that is mounted at `folder`. `cut` mounts it as it would be after a power cut at this moment."""

    def __init__(self, place: Path) -> None:
        self.folder = place / "mounted"
        self._image, self._copy, self._after_cut = place / "image", place / "copy", place / "after_cut"

    @contextmanager
    def cut(self) -> Iterator[Path]:
        _run("cp", "--sparse=always", str(self._image), str(self._copy))
        with _mounted(self._copy, self._after_cut):
            yield self._after_cut


@contextmanager
def disk(place: Path) -> Iterator[Disk]:
    """A new, empty disk."""
    for folder in (place, place / "mounted", place / "after_cut"):
        folder.mkdir()
    with (place / "image").open("wb") as image:
        image.truncate(SIZE_BYTES)
    _run("mkfs.ext4", "-q", "-b", "4096", "-J", "size=4", str(place / "image"))
    with _mounted(place / "image", place / "mounted"):
        yield Disk(place)


@contextmanager
def _mounted(image: Path, folder: Path) -> Iterator[None]:
    _run("mount", "-o", NO_PERIODIC_COMMIT, str(image), str(folder))
    try:
        yield
    finally:
        _run("umount", str(folder))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "PATH": PATH})
