"""A small data set and small jobs for the engine's tests: three kinds of blobs that a network can tell apart."""

import io
import json
from pathlib import Path

import numpy as np

from kdcore.lines import Lines
from kdcore.parts import Place
from kdcore.spec import JobSpec, parse


def write_arrays(path: Path, train: int = 120, test: int = 30, classes: int = 3, side: int = 8) -> Path:
    """Class k is bright in its own corner, under noise."""
    rng = np.random.default_rng(0)

    def images(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % classes
        pixels = rng.integers(0, 160, (count, side, side, 1))
        corners = [(slice(0, 4), slice(0, 4)), (slice(4, 8), slice(4, 8)), (slice(0, 4), slice(4, 8))]
        for row, label in enumerate(labels):
            pixels[row][corners[label]] += 60
        return pixels.astype(np.uint8), labels

    x_train, y_train = images(train)
    x_test, y_test = images(test)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


def place(folder: Path) -> tuple[Place, io.StringIO]:
    """A place in `folder`, and the stream that its lines go to."""
    stream = io.StringIO()
    folder.mkdir(parents=True, exist_ok=True)
    return Place(folder, {}, folder / "cache", Lines(stream)), stream


def lines(stream: io.StringIO, event: str) -> list[dict]:
    return [line for line in map(json.loads, stream.getvalue().splitlines()) if line["event"] == event]


def supervised(data: Path, **training) -> JobSpec:
    return parse(
        {
            "dataset": f"file:{data}",
            "student": "convnet4",
            "method": "supervised",
            "training": {
                "epochs": 2,
                "batch_size": 16,
                "augmentation": {"name": "crop_flip", "padding": 1},
                **training,
            },
        }
    )


def distilled(data: Path, teacher: Path, baseline: str = "train", method: object = "kd", **training) -> JobSpec:
    body = supervised(data, **training).as_json()
    for name in ("alpha", "beta", "temperature"):
        del body[name]
    return parse({**body, "method": method, "teacher": {"checkpoint": f"file:{teacher}"}, "baseline": baseline})
