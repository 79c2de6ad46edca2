"""The syntax of references (the names of checkpoints in a spec) and of digests."""

import re

BLOB = "blob:sha256:"
"""The prefix of references to bytes by their digest."""
FILE = "file:"
"""The prefix of references to local files, by path. A service opens none."""
REFERENCE_PREFIXES = ("model:", "job:", BLOB, "weights:", FILE)
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

STUDENT_FILE = "student.safetensors"
"""The file of a job that `job:<id>` stands for."""
ALONE_FILE = "alone.safetensors"
"""The file of a job's baseline, the student that it trained without the teacher."""
