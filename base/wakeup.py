"""The wake-up message: its name, its queue, and the settings of the broker connection that sends it.

A message carries nothing. It tells one idle worker to look at the database; if it is lost, doubled or late, no job is.
"""

from typing import Any

TASK = "distillery.look"
QUEUE = "look"
EXPIRES_S = 60
"""After this time the workers have looked at the database by themselves."""
SOCKET_S = 2
MEMORY = "memory:"
"""The prefix of broker URLs that stay inside this process."""


def transport_options(broker_url: str) -> dict[str, Any]:
    """Socket time limits of a broker that is reached by network."""
    return {} if broker_url.startswith(MEMORY) else {"socket_timeout": SOCKET_S, "socket_connect_timeout": SOCKET_S}
