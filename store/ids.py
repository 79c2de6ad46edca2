"""Names that sort by age: milliseconds, then chance. Keyset pages order by them."""

import secrets
import time

DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's 32: in the order of ASCII, and none is mistaken for another."""


def new_id(prefix: str) -> str:
    """`job_01k3m0v2xw8r…`: 10 digits of time, 14 (70 bits) of chance."""
    return f"{prefix}_{_base32(time.time_ns() // 1_000_000, 10)}{_base32(secrets.randbits(70), 14)}"


def _base32(number: int, width: int) -> str:
    return "".join(DIGITS[(number >> 5 * place) & 31] for place in reversed(range(width)))
