"""The syntax of references (the names of checkpoints in a spec) and of digests."""

import re

REFERENCE_PREFIXES = ("model:", "job:", "blob:sha256:", "weights:", "file:")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
