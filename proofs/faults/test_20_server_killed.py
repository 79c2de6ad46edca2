"""Row 20: the embedded server is killed with -9 while the real engine trains, and started again.

It continues its job at once, as `tests/test_serve.py` shows with a lease of forty minutes. Here the job was paused and
resumed before (row 16), and is compared with an undisturbed one.
"""

import signal
from pathlib import Path
from typing import Any

from kdcore.protocol import REPORT_OF_ATTEMPTS
from store.settings import Settings
from tests.end_to_end.embedded_server import EmbeddedServer, embedded_server
from tests.worker.job_database import JobDatabase, engines
from tests.worker.processes import until

SPEC = {
    "dataset": "digits",
    "student": "convnet4",
    "method": "supervised",
    "training": {"epochs": 12, "batch_size": 32, "seed": 1, "checkpoint_every_s": 0.1},
}


def test_server_killed_student_equals_the_undisturbed_one_bit_for_bit(tmp_path: Path):
    # A pause makes the first checkpoint; the server dies after the third file, before its row.
    killed = {
        "DISTILLERY_FAILPOINTS": "checkpoint.stored=kill:3",
        "DISTILLERY_HEARTBEAT_S": "0.2",
        "DISTILLERY_LOOK_S": "0.5",
    }
    with embedded_server(tmp_path / "home", **killed) as server:
        db = JobDatabase(Settings(home=tmp_path / "home"))
        job_id = server.submit(SPEC)
        db.until(job_id, "running")
        assert server.post(f"/v1/jobs/{job_id}/pause").status_code == 200
        db.until(job_id, "paused")
        server.post(f"/v1/jobs/{job_id}/resume")
        assert server.process.wait(60) == -signal.SIGKILL
        until(lambda: not engines(tmp_path / "home"), "the guard to end the training")
        interrupted = db.job(job_id)
        assert interrupted.status == "running"

        del server.environment["DISTILLERY_FAILPOINTS"]
        server.start()
        disturbed = _results(server, job_id)
        assert [attempt.how for attempt in db.attempts(job_id)] == ["paused", "failed", "succeeded"]
        assert db.attempts(job_id)[-1].first_step == interrupted.checkpoint_step
        assert disturbed == _results(server, server.submit(SPEC))
        db.assert_nothing_left()
        db.database.dispose()
        assert server.stop() == 0


def _results(server: EmbeddedServer, job_id: str) -> dict[str, Any]:
    """Return the results that must not depend on the disturbances: the bytes, the report, the curves."""
    report = {**server.ended(job_id)["result"], **dict.fromkeys(REPORT_OF_ATTEMPTS)}
    files = {one["name"]: one["sha256"] for one in server.get(f"/v1/jobs/{job_id}/artifacts")["data"]}
    return {
        "report": report,
        "student": files["student.safetensors"],
        "curves": server.get(f"/v1/jobs/{job_id}/metrics"),
    }
