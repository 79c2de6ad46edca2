"""Row 23: a server dies while it inspects a registered file: another one does it. And an inspection that nobody needs
any more ends: of a registration that is deleted, of a request whose client is gone."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from store.database import migrate
from store.settings import Settings
from tests.api.test_inspections import inspecting
from tests.servers import Api, api_process
from tests.worker.processes import until


def home(folder: Path) -> Settings:
    settings = Settings(home=folder / "home", lease_s=1.2, heartbeat_s=0.2, look_s=0.2)
    settings.home.mkdir()
    migrate(settings.database_url)
    return settings


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Api, Path]]:
    """A server, and the folder of its inspections."""
    folder = tmp_path_factory.mktemp("registration")
    settings = home(folder)
    with api_process(settings, folder / "log") as api:
        yield api, settings.home / "inspect"


def upload(api: Api, images: int) -> str:
    """Upload arrays of two classes: 8 x 8 pixels of 0, and of 200."""
    labels = np.arange(images) % 2
    pixels = np.broadcast_to((labels * 200).astype(np.uint8)[:, None, None], (images, 8, 8))
    file = BytesIO()
    np.savez(file, x_train=pixels, y_train=labels)
    return str(api.http.post("/v1/uploads", content=file.getvalue()).json()["blob"])


@contextmanager
def stopped_inspection(folder: Path, request: Any) -> Iterator[int]:
    """Send a request in a thread, and stop the child that it starts, so that it does not end by itself."""
    asking = threading.Thread(target=request)
    asking.start()
    try:
        child = until(lambda: next(inspecting(folder), None), "the inspection to begin")
        os.kill(child, signal.SIGSTOP)
        yield child
    finally:
        asking.join()


def until_nothing_is_left(folder: Path, child: int) -> None:
    until(lambda: child not in inspecting(folder), "the child to end", 15)
    until(lambda: not list(folder.iterdir()), "its folder to be removed", 15)


def test_registration_of_a_killed_server_is_inspected_by_another_one(tmp_path: Path) -> None:
    settings = home(tmp_path)
    first = Api(settings, tmp_path / "log")
    blob = upload(first, 40)

    def ask() -> None:
        with pytest.raises(httpx.TransportError):
            first.http.post("/v1/datasets", json={"name": "mine", "blob": blob})

    with stopped_inspection(settings.home / "inspect", ask):
        first.kill()
    first.http.close()
    with api_process(settings, tmp_path / "log 2") as second:
        path = "/v1/datasets/mine"
        assert second.http.get(path).json()["state"] == "inspecting"
        until(lambda: second.http.get(path).json()["state"] == "ready", "the row to be ready", 30)
        row = second.http.get(path).json()
        assert row["thumbnails"]["classes"] == [0] * 8 + [1] * 8
        answer = second.http.get(row["thumbnails"]["href"])
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        with Image.open(BytesIO(answer.content)) as sheet:
            assert (sheet.size, sheet.getpixel((4, 4)), sheet.getpixel((4, 12))) == ((64, 16), (0,) * 3, (200,) * 3)


def test_deleted_registration_leaves_no_child_and_no_row(serving: tuple[Api, Path]) -> None:
    api, folder = serving
    new = {"name": "other", "blob": upload(api, 60)}
    with stopped_inspection(folder, lambda: api.http.post("/v1/datasets", json=new)) as child:
        assert api.http.delete("/v1/datasets/other").status_code == 204
        until_nothing_is_left(folder, child)
    assert api.http.get("/v1/datasets/other").status_code == 404


def test_inspection_for_a_client_that_is_gone_ends(serving: tuple[Api, Path]) -> None:
    api, folder = serving
    spec = {"dataset": f"blob:{upload(api, 80)}", "student": "convnet4", "method": "supervised"}

    def ask() -> None:
        with httpx.Client(base_url=api.http.base_url, timeout=8) as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/jobs/validate", json=spec)

    with stopped_inspection(folder, ask) as child:
        pass
    until_nothing_is_left(folder, child)
