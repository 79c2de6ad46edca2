"""The grammar of references: how a spec names a checkpoint, and how a digest is written."""

import re

REFERENCE_PREFIXES = ("model:", "job:", "blob:sha256:", "weights:", "file:")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
