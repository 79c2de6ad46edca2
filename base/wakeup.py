"""The wake-up message: its name, its queue, and the Celery settings of those who send and receive it.

A message has no content. It makes one idle worker poll the database. If a message is lost, doubled or late, no job is
lost.
"""

from typing import Any

TASK = "distillery.look"
QUEUE = "look"
EXPIRES_S = 60
"""The lifetime of a message: after this time the workers have polled the database anyway."""
SOCKET_S = 2
MEMORY = "memory:"
"""The prefix of broker URLs that stay inside this process."""
POLL_S = 0.02
"""The time between two polls of a broker in memory; polling costs 1 % of a core."""


def celery_settings(broker_url: str) -> dict[str, Any]:
    """Return the settings of a Celery application that sends or receives wake-up messages."""
    socket = {"socket_timeout": SOCKET_S, "socket_connect_timeout": SOCKET_S}
    return {
        "task_default_queue": QUEUE,
        "task_ignore_result": True,
        "task_publish_retry": False,
        "broker_connection_timeout": SOCKET_S,
        "broker_transport_options": {"polling_interval": POLL_S} if broker_url.startswith(MEMORY) else socket,
    }


def send_wakeup(app: Any) -> None:
    """Send one message with a Celery application. Raises whatever the broker's library raises."""
    app.send_task(TASK, queue=QUEUE, expires=EXPIRES_S, ignore_result=True, retry=False)
