"""A registration survives the death of its server: another one inspects the file. DELETE ends its child at once."""

import os
import signal
import threading
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from store.database import migrate
from store.settings import Settings
from tests.api.test_inspections import inspecting
from tests.servers import Api
from tests.worker.processes import until


def arrays(images: int = 40) -> bytes:
    """Two classes: 8 x 8 pixels of 0, and of 200."""
    labels = np.arange(images) % 2
    pixels = np.broadcast_to((labels * 200).astype(np.uint8)[:, None, None], (images, 8, 8))
    file = BytesIO()
    np.savez(file, x_train=pixels, y_train=labels)
    return file.getvalue()


def test_registration_survives_the_death_of_its_server_and_has_thumbnails(tmp_path: Path) -> None:
    """The child is stopped, so that the server dies in the middle. Another server on the same database takes over."""
    quick = {"lease_s": 1.2, "heartbeat_s": 0.2, "look_s": 0.2}
    settings = Settings(home=tmp_path / "home", **quick)
    settings.home.mkdir()
    migrate(settings.database_url)
    first = Api(settings, tmp_path / "log")
    blob = first.http.post("/v1/uploads", content=arrays()).json()["blob"]

    def ask() -> None:
        with pytest.raises(httpx.TransportError):
            first.http.post("/v1/datasets", json={"name": "mine", "blob": blob})

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        child = until(lambda: next(inspecting(settings.home / "inspect"), None), "the inspection to begin")
        os.kill(child, signal.SIGSTOP)
    finally:
        first.kill()
        asking.join()
        first.http.close()
    second = Api(settings, tmp_path / "log 2")
    try:
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

        other = second.http.post("/v1/uploads", content=arrays(60)).json()["blob"]
        adding = threading.Thread(
            target=lambda: second.http.post("/v1/datasets", json={"name": "other", "blob": other})
        )
        adding.start()
        child = until(lambda: next(inspecting(settings.home / "inspect"), None), "the second inspection to begin")
        os.kill(child, signal.SIGSTOP)
        assert second.http.delete("/v1/datasets/other").status_code == 204
        adding.join()
        until(lambda: child not in inspecting(settings.home / "inspect"), "the child to end", 15)
        until(lambda: not list((settings.home / "inspect").iterdir()), "its folder to be removed", 15)
        assert second.http.get("/v1/datasets/other").status_code == 404
    finally:
        second.stop()
