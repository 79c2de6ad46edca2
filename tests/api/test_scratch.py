"""An inspection's folder lives as long as its server uses it, and its child no longer than its server."""

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import httpx
import pytest

from api import scratch
from base.errors import StorageFull
from store.database import migrate
from store.settings import Settings
from tests.faults.servers import Api
from tests.worker.processes import until


def test_a_folder_is_new_and_empty_and_gone_afterwards(tmp_path: Path) -> None:
    with scratch.scratch_folder(tmp_path / "inspect") as one, scratch.scratch_folder(tmp_path / "inspect") as other:
        assert one != other
        assert not list(one.iterdir())
        (one / "file").touch()
    assert not list((tmp_path / "inspect").iterdir())


def test_a_sweep_removes_what_nobody_uses_and_that_only(tmp_path: Path) -> None:
    with scratch.scratch_folder(tmp_path) as used:
        (tmp_path / f"{scratch.HOST}.left" / "deep").mkdir(parents=True)
        foreign, old = tmp_path / "elsewhere.young", tmp_path / "elsewhere.old"
        foreign.mkdir()
        old.mkdir()
        os.utime(old, (0, 0))
        scratch.sweep(tmp_path)
        assert set(tmp_path.iterdir()) == {used, foreign}


def test_a_sweep_before_the_first_inspection_finds_nothing(tmp_path: Path) -> None:
    scratch.sweep(tmp_path / "inspect")
    assert not (tmp_path / "inspect").exists()


def test_a_full_disk_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(StorageFull, match="no disk space to write in inspect"):
        scratch.scratch_folder(tmp_path / "inspect").__enter__()


def test_a_killed_server_leaves_no_child_and_the_next_one_removes_its_folder(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    settings.home.mkdir()
    migrate(settings.database_url)
    folder = settings.home / "inspect"
    api = Api(settings, tmp_path / "log")
    asking = Thread(target=ask_for_a_network, args=(api,))
    try:
        asking.start()
        child = until(lambda: next(inspecting(folder), None), "the inspection to begin")
        # Else it might end by itself.
        os.kill(child, signal.SIGSTOP)
        assert list(folder.iterdir())
    finally:
        api.kill()
        asking.join()
        api.http.close()
    until(lambda: child not in inspecting(folder), "the child to end")
    again = Api(settings, tmp_path / "log")
    try:
        assert not list(folder.iterdir())
    finally:
        again.stop()


def ask_for_a_network(api: Api) -> None:
    """One that only its library knows; the answer never comes."""
    with pytest.raises(httpx.TransportError):
        api.post(student="timm/resnet18")


def inspecting(folder: Path) -> Iterator[int]:
    """Engines whose home is a folder below this one; what is still `api.limits` has not been tied to its server yet."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"HOME={folder}/".encode() in (process / "environ").read_bytes()
            if ours and b"kdcore\0inspect" in (process / "cmdline").read_bytes().split(b"api.limits")[0]:
                yield int(process.name)
        except OSError:
            continue
