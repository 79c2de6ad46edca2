"""Row 24: connections take the files that a process may open. Its job runs, and spends no attempt.

Each place where none can be opened: `tests/worker/test_attempt.py`. The bounds: `tests/api/test_http_server.py`.
"""

import json
import resource
import socket
from contextlib import ExitStack
from pathlib import Path

from store.settings import Settings
from tests.end_to_end.embedded_server import embedded_server
from tests.worker.job_database import JobDatabase
from tests.worker.processes import FAKE_ENGINE

LIMIT, CONNECTIONS = 256, 300
SPEC = {"dataset": "digits", "student": "convnet4", "method": "supervised", "scheduling": {"max_attempts": 1}}


def test_job_runs_while_more_connections_are_open_than_files_may_be(tmp_path: Path):
    settings = {"DISTILLERY_ENGINE": json.dumps(FAKE_ENGINE), "DISTILLERY_MIN_FREE_BYTES": "0"}
    with embedded_server(tmp_path / "home", **settings) as server, ExitStack() as clients:
        # After its start, which raises the limit, and before its first connection.
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (LIMIT, LIMIT))
        address = (server.http.base_url.host, server.http.base_url.port)
        for _ in range(CONNECTIONS):
            clients.enter_context(socket.create_connection(address)).sendall(b"GET / HTTP/1.1\r\n")
        job_id = server.submit(SPEC)
        server.ended(job_id)
        db = JobDatabase(Settings(home=tmp_path / "home"))
        assert [attempt.how for attempt in db.attempts(job_id)] == ["succeeded"]
        db.database.dispose()
        assert f"{LIMIT // 3} connections, the most that this process holds" in server.log_tail
