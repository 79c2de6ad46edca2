"""Which addresses a service and all its processes talk to: seen by Python's audit hooks, and by the kernel's calls.

A hook is installed in every Python process that inherits PYTHONPATH, by a module `sitecustomize` on it. It does not see
native libraries; `strace` does. Both list only what is neither of this machine nor a Unix socket.
"""

import ipaddress
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

HOOK = """
import json, os, sys

LOG = {log!r}
EVENTS = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname")


def write(*what):
    line = json.dumps([os.getpid(), *what], default=repr) + "\\n"
    try:
        file = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError:
        return
    os.write(file, line.encode())
    os.close(file)


def hook(event, arguments):
    if event in EVENTS:
        of_socket = event not in ("socket.getaddrinfo", "socket.gethostbyname")
        address = arguments[1] if of_socket else arguments[0]
        write(event, address)


sys.addaudithook(hook)
write("began", " ".join(sys.orig_argv))
"""
_CALL = re.compile(r"(?:connect|sendto|sendmsg|sendmmsg)\(.*?sa_family=(AF_INET6?),.*?\"([0-9a-fA-F.:]+)\"")


@dataclass(frozen=True)
class Watched:
    """The folder of the hook and the files of what was seen."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What the first process needs so that all have the hook."""
        return {"PYTHONPATH": str(self.folder)}

    @property
    def strace(self) -> list[str]:
        """The command before that of the first process; [] where there is no strace.

        `-D`: the program keeps the place of the child, and strace watches it from aside.
        """
        if shutil.which("strace") is None:
            return []
        trace = "trace=connect,sendto,sendmsg,sendmmsg"
        return ["strace", "-D", "-f", "-q", "--seccomp-bpf", "-e", trace, "-o", str(self.folder / "calls")]

    def began(self) -> list[str]:
        """The command lines of the processes that had the hook."""
        return [address for _, event, address in self._lines() if event == "began"]

    def elsewhere(self) -> list[str]:
        """What a Python process wanted of another machine."""
        return [
            f"{event} {address}" for _, event, address in self._lines() if event != "began" and not is_here(address)
        ]

    def calls_elsewhere(self) -> list[str]:
        """What any process wanted of another machine, by the kernel's calls."""
        lines = (self.folder / "calls").read_text(errors="replace").splitlines()
        found = ((line, _CALL.search(line)) for line in lines)
        return [line for line, match in found if match is not None and not is_here(match[2])]

    def _lines(self) -> list[tuple[int, str, object]]:
        return [tuple(json.loads(line)) for line in (self.folder / "log").read_text().splitlines()]


def watched(folder: Path) -> Watched:
    """Return what watches the processes that get its environment."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(HOOK.format(log=str(folder / "log")))
    return Watched(folder)


def is_here(address: object) -> bool:
    """Return True for an address of this machine, or of no machine: a Unix socket, or none."""
    if isinstance(address, list):
        address = address[0] if address else None
    if not isinstance(address, str) or address in ("", "localhost") or address.startswith(("/", "b'", "@")):
        return True
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return found.is_loopback or found.is_unspecified or bool(mapped and mapped.is_loopback)
