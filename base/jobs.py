"""Kinds and statuses of jobs, the actions that a client may request, why a job waits, what webhooks tell of it, and the
states of a worker's slot."""

from typing import Literal

Kind = Literal["distillation", "evaluation", "export", "benchmark"]
"""The kinds of jobs: a distillation trains a student, an evaluation measures a registered model on test images, an
export writes files of a job's student, a benchmark measures the speed of a network."""

READS_ONCE: tuple[Kind, ...] = ("export",)
"""Kinds of jobs whose inputs are not needed after they have succeeded: a checkpoint of another job."""

Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
TERMINAL: tuple[Status, ...] = ("succeeded", "failed", "cancelled")
"""The final statuses: a job that has one changes only if it is retried."""

Reason = Literal[
    "teacher", "backing_off", "no_worker", "out_of_disk_space", "project_limit", "behind_others", "starting"
]
"""The reasons why a queued job has not started."""
SlotState = Literal["idle", "busy", "out_of_disk_space", "stuck"]

WebhookEvent = Literal[
    "job.queued",
    "job.started",
    "job.paused",
    "job.succeeded",
    "job.failed",
    "job.cancelled",
    "job.warning",
    "job.alert",
]
"""What a webhook can ask for."""
WEBHOOK_EVENTS: dict[str, WebhookEvent] = {
    "queued": "job.queued",
    "resumed": "job.queued",
    "retried": "job.queued",
    "released": "job.queued",
    "claimed": "job.started",
    "paused": "job.paused",
    "succeeded": "job.succeeded",
    "failed": "job.failed",
    "cancelled": "job.cancelled",
    "warning": "job.warning",
    "alert": "job.alert",
}
"""By the type of a job's own event. No webhook is notified of other types."""
WEBHOOK_TEST = "webhook.test"
"""What a test sends."""
DeliveryStatus = Literal["pending", "delivered", "failed"]

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
