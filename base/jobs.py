"""Statuses of a job, and the actions that a client may request in each."""

from typing import Literal, get_args

Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = get_args(Status)
TERMINAL: tuple[Status, ...] = ("succeeded", "failed", "cancelled")
"""A job with one of these does not change any more, unless it is retried."""

ALLOWED_ACTIONS: dict[str, tuple[str, ...]] = {
    "queued": ("cancel", "pause"),
    "running": ("cancel", "pause"),
    "paused": ("resume", "cancel"),
    "succeeded": ("delete",),
    "failed": ("retry", "delete"),
    "cancelled": ("retry", "delete"),
}


def allowed_actions(status: str, requested: str | None) -> list[str]:
    """Return the actions that are allowed now. A job whose cancellation is requested cannot be paused."""
    return [action for action in ALLOWED_ACTIONS[status] if not (requested == "cancel" and action == "pause")]
