"""The one task of the service: somebody says that there may be something to do."""

from collections.abc import Callable

from celery import Celery

from base.wakeup import TASK


def register(app: Celery, ring: Callable[[], None]) -> None:
    """`distillery.look` wakes the slots, which look at the table themselves; it carries nothing and answers nothing."""

    # Shared, as is Celery's default, it would also be the task of every other application in this process.
    @app.task(name=TASK, ignore_result=True, shared=False)
    def look() -> None:
        ring()
