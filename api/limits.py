"""Run a command within bounds: `python -m api.limits PARENT CPU_S MEMORY_BYTES FILE_BYTES COMMAND...`.

PARENT is the server's process id: the command ends with it. A process of its own between us and the command, because
setting limits after fork in a threaded server is not safe; it needs the standard library only, and starts quickly.
"""

import os
import resource
import sys

from base.processes import end_with_parent


def main(parent: str, cpu_s: str, memory_bytes: str, file_bytes: str, *command: str) -> None:
    # Inspections are started by the event loop, whose thread is the server's first.
    end_with_parent(int(parent))
    for limit, value in (
        (resource.RLIMIT_CPU, int(cpu_s)),
        (resource.RLIMIT_DATA, int(memory_bytes)),
        (resource.RLIMIT_FSIZE, int(file_bytes)),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (bound, bound))
    os.execvp(command[0], command)  # noqa: S606 - to replace this process by the command is the whole point


if __name__ == "__main__":
    main(*sys.argv[1:])
