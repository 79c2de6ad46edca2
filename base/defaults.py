"""The address of a server that is started without settings."""

HOST = "127.0.0.1"
PORT = 8000
DEFAULT_URL = f"http://{HOST}:{PORT}"
