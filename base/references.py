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
    if isinstance(value, str) and value.startswith(BLOB):
        yield value.removeprefix(BLOB)
    elif isinstance(value, dict):
        for part in value.values():
            yield from blobs_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from blobs_in(part)
