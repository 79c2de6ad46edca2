"""Thumbnails of a data set: a few training images, evenly over the classes, in one PNG.

They are drawn from the decoded pixels, so no byte of a user's file is in the result.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kdcore.data.decoding import Piece, Pixels, Source
from kdcore.data.images import Labels

COUNT, COLUMNS = 16, 8
SIDE = 96
"""The largest height and width in pixels."""


class Thumbnails:
    """Takes images while a source is decoded, then writes them as a sheet: squares in rows from the top left."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int | None]] = []
        self._images: dict[int, Image.Image] = {}

    def watch(self, source: Source) -> Source:
        """Return the same source; its pieces also give the images of the sheet."""
        self._rows = chosen(source.labels["train"], len(source.class_names))
        wanted = np.array(sorted({row for row, _ in self._rows}), dtype=np.int64)

        def pieces() -> Iterator[Piece]:
            for piece in source.pieces():
                if piece.split == "train":
                    for place in np.flatnonzero(np.isin(piece.rows, wanted)):
                        self._images[int(piece.rows[place])] = _small(piece.pixels[place])
                yield piece

        return replace(source, pieces=pieces)

    def write(self, path: Path) -> dict[str, Any]:
        """Write the sheet. Returns the side of a square, the number of columns, and the class of each square."""
        side = max(max(image.size) for image in self._images.values())
        columns = min(COLUMNS, len(self._rows))
        sheet = Image.new("RGB", (columns * side, -(-len(self._rows) // columns) * side), "white")
        for place, (row, _) in enumerate(self._rows):
            image = self._images[row]
            down, across = divmod(place, columns)
            left, top = ((side - length) // 2 for length in image.size)
            sheet.paste(image, (across * side + left, down * side + top))
        sheet.save(path, format="PNG", optimize=True)
        return {"side": side, "columns": columns, "classes": [label for _, label in self._rows]}


def chosen(labels: Labels, classes: int) -> list[tuple[int, int | None]]:
    """Return up to COUNT training rows with their class, by class: evenly over the classes, and over the rows of each.

    Without classes they are evenly over all rows, with the class None.
    """
    if classes == 0:
        return [(int(row), None) for row in _evenly(np.arange(len(labels)), COUNT)]
    asked = np.bincount(np.arange(COUNT) * classes // COUNT, minlength=classes)
    return [
        (int(row), label)
        for label in np.flatnonzero(asked).tolist()
        for row in _evenly(np.flatnonzero(labels == label), int(asked[label]))
    ]


def _evenly(rows: Labels, count: int) -> Labels:
    """Return so many of the rows, or all if there are fewer, with the same distance between them."""
    count = min(count, len(rows))
    return rows[np.arange(count) * len(rows) // max(count, 1)]


def _small(pixels: Pixels) -> Image.Image:
    """Return an image, C x H x W, at most SIDE pixels high and wide."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.thumbnail((SIDE, SIDE))
    return image.convert("RGB")
