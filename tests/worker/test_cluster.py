"""The cluster as a host would run it: real PostgreSQL and Valkey, API and workers, one of which is killed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from store.settings import Settings
from tests.worker.processes import FAKE_ENGINE, until
from tests.worker.table import REPOSITORY, Table, engines

QUICK = {
    "DISTILLERY_ENGINE": json.dumps(FAKE_ENGINE),
    "DISTILLERY_LEASE_S": "2",
    "DISTILLERY_HEARTBEAT_S": "0.2",
    "DISTILLERY_LOOK_S": "0.3",
    "DISTILLERY_BACK_OFF_S": "0.05",
    "DISTILLERY_MIN_FREE_BYTES": "0",
}


@contextmanager
def cluster(home: Path) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any], Path]]:
    ready, log = home / "ready.json", home / "cluster.log"
    command = [sys.executable, "-m", "local.cluster", "--home", str(home), "--port", "0", "--ready-file", str(ready)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env={**os.environ, **QUICK}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        until(lambda: ready.exists() or process.poll() is not None, "the cluster to be ready", timeout_s=60)
        yield process, json.loads(ready.read_text()), log
    finally:
        process.terminate()
        process.wait(60)


def test_a_killed_worker_is_started_again_and_its_job_goes_on():
    # Not pytest's own folder: PostgreSQL, which never runs as root, could not look into it.
    with tempfile.TemporaryDirectory(prefix="distillery-") as folder:
        home = Path(folder)
        home.chmod(0o755)
        with cluster(home) as (process, told, log):
            with urllib.request.urlopen(f"{told['url']}/healthz", timeout=30) as answer:  # noqa: S310 - our own server
                assert answer.status == 200
            table = Table(Settings(home=home, database_url=told["database"]))
            job_id = table.submit(steps=120, step_s=0.025, checkpoint_every=10)
            table.until_checkpoint(job_id)
            owner = int((table.job(job_id).owner or "").split("-")[-2])
            os.kill(owner, signal.SIGKILL)
            table.assert_trained(job_id, 120)
            assert [attempt.how for attempt in table.attempts(job_id)] == ["failed", "succeeded"]
            until(lambda: "SIGKILL and is started again" in log.read_text(), "the cluster to say so")
            table.database.dispose()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            assert log.read_text().endswith("stopped\n")
            assert not engines(home)
