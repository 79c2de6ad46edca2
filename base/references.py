"""The syntax of references (the names of checkpoints in a spec) and of digests."""

import re

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
