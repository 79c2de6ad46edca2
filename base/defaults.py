"""The address and the project of a server that is started without settings, and which addresses are of this machine."""

import ipaddress

HOST = "127.0.0.1"
PORT = 8000
"""Texts that cannot import it repeat it. `tests/base/test_defaults.py` lists and compares them all: change the number
here, then what that test names."""
DEFAULT_URL = f"http://{HOST}:{PORT}"
DEFAULT_PROJECT = "default"
"""The project of everything that was made before there were others, and of the operator."""


def is_loopback(host: str) -> bool:
    """Return True for a host that only this machine can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
