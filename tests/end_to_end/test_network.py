"""The watch on the network sees what it must see."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.network import is_here, watched

CALLS = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
    one.connect(("{address}", 9))
with socket.socket(socket.AF_UNIX) as other:
    try:
        other.connect("/nowhere/at/all")
    except OSError:
        pass
"""


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", True),  # noqa: S104 - nothing is bound
        ("localhost", True),
        ("/run/a/socket", True),
        (None, True),
        (["127.0.0.1", 80], True),
        (["192.0.2.7", 80], False),
        ("192.0.2.7", False),
        ("2001:db8::1", False),
        ("telemetry.example.org", False),
        (["telemetry.example.org", 443], False),
    ],
)
def test_is_here(address: object, here: bool):
    assert is_here(address) is here


@pytest.mark.parametrize(("address", "is_elsewhere"), [("127.0.0.1", False), ("192.0.2.7", True)])
def test_watch_sees_a_connection_by_hook_and_by_call(tmp_path: Path, address: str, is_elsewhere: bool):
    """In a child of the first process. A datagram socket that is connected sends nothing yet, and 192.0.2.7 is an
    address for documents (RFC 5737)."""
    seen = watched(tmp_path)
    script = tmp_path / "calls.py"
    script.write_text(CALLS.format(address=address))
    command = [*seen.strace, "/bin/sh", "-c", f"{sys.executable} {script}; true"]
    subprocess.run(command, env=seen.environment, check=False)
    assert len(seen.began()) == 1
    assert bool(seen.elsewhere()) is is_elsewhere, seen.elsewhere()
    if seen.strace:
        assert bool(seen.calls_elsewhere()) is is_elsewhere
