"""A clock that tests set: time moves forward at once, in SQL (`database_now`) and in Python (`boottime`) alike.

    clock.advance(31)        leases of 30 s have expired, for every connection and thread of this process

The product's SQL is unchanged: only tests add the offset to the expression, as a bind parameter that is read whenever
a statement runs. Processes that a test starts keep the real time.
"""

from collections.abc import Callable
from typing import Any

from sqlalchemy import Double, bindparam
from sqlalchemy.ext.compiler import compiles

from base import clock
from store import records


class SettableClock:
    def advance(self, seconds: float) -> None:
        clock.offset_s += seconds


class Clock:
    """A clock in the place of `boottime` in one module, where a test must set every reading."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def _with_offset(compile_now: Callable[..., str]) -> Callable[..., str]:
    def compile_with_offset(element: Any, compiler: Any, **options: Any) -> str:
        offset = bindparam("clock_offset_s", callable_=lambda: clock.offset_s, type_=Double(), unique=True)
        return f"({compile_now(element, compiler, **options)} + {compiler.process(offset)})"

    return compile_with_offset


compiles(records.database_now, "postgresql")(_with_offset(records._now_on_postgres))
compiles(records.database_now, "sqlite")(_with_offset(records._now_on_sqlite))
