"""The one task of the service: somebody says that there may be something to do."""

from collections.abc import Callable

from celery import Celery

LOOK = "distillery.look"


def register(app: Celery, ring: Callable[[], None]) -> None:
    """`distillery.look` wakes the slots, which look at the table themselves; it carries nothing and answers nothing."""

    @app.task(name=LOOK, ignore_result=True)
    def look() -> None:
        ring()
