"""Run a command with resource limits: `python -m api.process_limits PARENT CPU_S MEMORY_BYTES FILE_BYTES COMMAND...`.

PARENT is the server's process id: the command ends with it. This is a process of its own, which then becomes the
command, because setting limits between fork and exec is not safe in a server with threads.
"""

import os
import resource
import sys
from contextlib import suppress

from base.processes import end_with_parent


def main(parent: str, cpu_s: str, memory_bytes: str, file_bytes: str, *command: str) -> None:
    # The kernel watches the thread that started this process: the event loop's, which lives as long as the server.
    end_with_parent(int(parent))
    for limit, value in (
        (resource.RLIMIT_CPU, int(cpu_s)),
        (resource.RLIMIT_DATA, int(memory_bytes)),
        (resource.RLIMIT_FSIZE, int(file_bytes)),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (allowed, allowed))
    # If the host itself runs out of memory, this is the process that it can spare.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123 - pathlib imports much
        file.write("1000")
    os.execvp(command[0], command)  # noqa: S606 - the command replaces this process


if __name__ == "__main__":
    main(*sys.argv[1:])
