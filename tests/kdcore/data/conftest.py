"""Archives made on the spot."""

import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

Pack = Callable[[Mapping[str, bytes]], Path]


def _add(archive: tarfile.TarFile, name: str, blob: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(blob)
    archive.addfile(info, io.BytesIO(blob))


@pytest.fixture
def pack_zip(tmp_path: Path) -> Pack:
    def pack(members: Mapping[str, bytes]) -> Path:
        path = tmp_path / "images.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, blob in members.items():
                archive.writestr(name, blob)
        return path

    return pack


@pytest.fixture(params=["zip", "tar", "tar.gz"])
def pack(request: pytest.FixtureRequest, tmp_path: Path, pack_zip: Pack) -> Pack:
    """The same members in every kind of archive that is read."""
    if request.param == "zip":
        return pack_zip

    def pack(members: Mapping[str, bytes]) -> Path:
        path = tmp_path / "images.bin"
        with tarfile.open(path, "w:gz" if request.param == "tar.gz" else "w") as archive:
            for name, blob in members.items():
                _add(archive, name, blob)
        return path

    return pack


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., Path]:
    """A small good .npz; keywords replace its arrays, None leaves one out."""

    def write(**arrays: object) -> Path:
        good = {
            "x_train": np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3),
            "y_train": np.array([0, 1, 2, 0, 1, 2]),
            "x_test": np.full((3, 4, 4, 3), 7, dtype=np.uint8),
            "y_test": np.array([0, 1, 2]),
        }
        path = tmp_path / "data.npz"
        np.savez(path, **{name: a for name, a in {**good, **arrays}.items() if a is not None})  # type: ignore[arg-type]
        return path

    return write
