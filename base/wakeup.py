"""The wake-up message: its name, its queue, and the settings of the broker connection that sends it.

A message carries no data. It makes one idle worker poll the database; a lost, doubled or late message loses no job.
"""

from typing import Any

TASK = "distillery.look"
QUEUE = "look"
EXPIRES_S = 60
"""After this time, workers have polled the database anyway."""
SOCKET_S = 2
MEMORY = "memory:"
"""The prefix of broker URLs that stay inside this process."""


def transport_options(broker_url: str) -> dict[str, Any]:
    """Return the socket timeouts of a broker that is reached over the network."""
    return {} if broker_url.startswith(MEMORY) else {"socket_timeout": SOCKET_S, "socket_connect_timeout": SOCKET_S}
