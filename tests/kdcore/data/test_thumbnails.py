"""Thumbnails: which images are chosen, and that the sheet has their pixels in their places."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcore.__main__ import main
from kdcore.data import Thumbnails, inspect
from kdcore.data.thumbnails import COUNT, chosen


def test_chosen_takes_as_many_of_each_class_as_is_even() -> None:
    rows = chosen(np.arange(100) % 5, 5)
    assert [label for _, label in rows] == [0] * 4 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert all(row % 5 == label for row, label in rows)
    assert len({row for row, _ in rows}) == COUNT


def test_chosen_of_many_classes_spreads_over_them() -> None:
    labels = [label for _, label in chosen(np.arange(200) % 100, 100)]
    assert labels == [place * 100 // COUNT for place in range(COUNT)]


def test_chosen_of_a_class_with_few_images_takes_each_once() -> None:
    assert chosen(np.array([0, 1, 1]), 2) == [(0, 0), (1, 1), (2, 1)]


def test_chosen_without_classes_is_even_over_all_rows() -> None:
    assert chosen(np.full(32, -1), 0) == [(2 * place, None) for place in range(COUNT)]
    assert chosen(np.full(2, -1), 0) == [(0, None), (1, None)]


def arrays(path: Path, channels: int, side: int) -> Path:
    """Two classes, each image of one value: its number times 5."""
    values = np.arange(40, dtype=np.uint8) * 5
    shape = (40, side, side) if channels == 1 else (40, side, side, channels)
    pixels = np.broadcast_to(values.reshape(-1, *[1] * (len(shape) - 1)), shape)
    held_out = {"x_test": pixels[:2], "y_test": np.array([0, 1])}
    np.savez(path, x_train=pixels, y_train=np.arange(40) % 2, **held_out)
    return path


@pytest.mark.parametrize(("channels", "side", "shown"), [(1, 8, 8), (3, 8, 8), (3, 200, 96)])
def test_thumbnails_are_the_pixels_of_their_rows(tmp_path: Path, channels: int, side: int, shown: int) -> None:
    path, sheet = arrays(tmp_path / "data.npz", channels, side), Thumbnails()
    facts = inspect(path, thumbnails=sheet)
    assert facts == inspect(path), "the facts are the same with thumbnails"
    places = sheet.write(tmp_path / "sheet.png")
    assert places == {"side": shown, "columns": 8, "classes": [0] * 8 + [1] * 8}
    with Image.open(tmp_path / "sheet.png") as image:
        assert (image.format, image.size) == ("PNG", (8 * shown, 2 * shown))
        centres = [
            image.getpixel((shown * (place % 8) + shown // 2, shown * (place // 8) + shown // 2)) for place in range(16)
        ]
    rows = [0, 4, 10, 14, 20, 24, 30, 34]
    assert centres == [(5 * (row + label),) * 3 for label in (0, 1) for row in rows]


def test_inspect_command_writes_thumbnails_and_their_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, sheet = arrays(tmp_path / "data.npz", 1, 8), tmp_path / "sheet.png"
    assert main(["inspect", "dataset", str(path), "--thumbnails", str(sheet)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["thumbnails"]["classes"] == [0] * 8 + [1] * 8 and printed["facts"]["train"] == 40
    assert sheet.read_bytes().startswith(b"\x89PNG")
