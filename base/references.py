"""The syntax of references (the names of checkpoints in a spec) and of digests."""

import re
from collections.abc import Iterator
from typing import Any

BLOB = "blob:sha256:"
"""The prefix of references to bytes by their digest."""
FILE = "file:"
"""The prefix of references to local files, by path. A service opens none."""
JOB = "job:"
"""The prefix of references to the student of a job, by the job's id."""
MODEL = "model:"
"""The prefix of references to registered models, by name or id."""
REFERENCE_PREFIXES = (MODEL, JOB, BLOB, "weights:", FILE)
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

STUDENT_FILE = "student.safetensors"
"""The file of a job that `job:<id>` stands for."""
ALONE_FILE = "alone.safetensors"
"""The student that a job trained without the teacher (`baseline: train`)."""


def blobs_in(value: Any) -> Iterator[str]:
    """Yield the digest of every blob that a resolved spec names, at any depth."""
    for _, digest in blobs_with_places(value):
        yield digest


def blobs_with_places(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield the place (a JSON pointer) and the digest of every blob that a resolved spec names."""
    if isinstance(value, str) and value.startswith(BLOB):
        yield place, value.removeprefix(BLOB)
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from blobs_with_places(part, f"{place}/{name}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from blobs_with_places(part, f"{place}/{number}")
