"""Compile the kernels for later processes, which then need no compiler: `python -m kdcore.kernels [FOLDER]`.

Without a folder they are installed beside their source. Every kind of this architecture's CPUs gets its own: the
machine that makes an image is not always the one that runs it.
"""

import platform
import sys
from pathlib import Path

from kdcore.kernels.building import BUILT, FLAGS_OF_CPU, NotBuilt, build

if __name__ == "__main__":
    kinds = [*FLAGS_OF_CPU, "DEFAULT"] if platform.machine() in {"x86_64", "AMD64"} else ["DEFAULT"]
    try:
        print(*build(Path(sys.argv[1]) if len(sys.argv) > 1 else BUILT, kinds), sep="\n")
    except NotBuilt as error:
        sys.exit(f"not compiled: {error}")
