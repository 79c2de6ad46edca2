"""Made `home_af300df.tar.xz`: a home of the embedded server as version af300df left it. Kept to show how; it is run
in a checkout of that version, whose test helpers and wire names it uses:

    cd CHECKOUT_OF_AF300DF && PYTHONPATH=$PWD python .../tests/golden/make_home.py TARGET.tar.xz

A home of a later version is made by a copy of this page.
"""

import json
import os
import sqlite3
import sys
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.end_to_end.embedded_server import EmbeddedServer, embedded_server, wait_until
from tests.kdcore.engine import write_arrays, write_teacher

HOST = "a-host"
"""A placeholder for this machine's name, which is part of the workers' names."""
TIMINGS = {"DISTILLERY_LEASE_S": "3", "DISTILLERY_HEARTBEAT_S": "0.5", "DISTILLERY_LOOK_S": "0.3"}
LEFT_OUT = ("cache", "scratch", "inspect", "server.lock", "distillery.migrating")

SHORT = {"epochs": 4, "batch_size": 16, "seed": 1, "device": "cpu"}
LONG = {**SHORT, "epochs": 40, "batch_size": 4, "checkpoint_every_s": 0.1}
"""27 steps an epoch."""
KEY = "the same job"
TEACHER = {"checkpoint": "model:theirs"}
SUCCEEDED = {
    "name": "succeeded", "dataset": "theirs", "teacher": TEACHER, "student": "convnet4", "method": ["kd", "sp"],
    "training": SHORT, "baseline": "train",
}  # fmt: skip
FAILED = {
    "name": "failed", "dataset": "theirs", "student": "convnet4", "method": "supervised",
    "training": {**SHORT, "optimizer": {"name": "sgd", "lr": 100}, "epochs": 50},
}  # fmt: skip
PAUSED = {
    "name": "paused", "dataset": "theirs", "teacher": TEACHER, "student": "convnet4", "training": {**LONG, "ema": 0.9},
    "method": {"name": "fitnet", "stages": "two", "pretraining_epochs": 5},
}  # fmt: skip
CANCELLED = {"name": "cancelled", "dataset": "digits", "student": "convnet4", "method": "supervised"}
STOPPED = {"name": "stopped", "dataset": "theirs", "student": "convnet4", "method": "byot", "training": LONG}
QUEUED = {
    "name": "queued", "dataset": "digits", "student": "convnet4", "method": "supervised", "training": {"epochs": 1},
    "scheduling": {"priority": -1, "max_attempts": 5},
}  # fmt: skip


def main() -> None:
    target = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        named = folder / "named"
        named.mkdir()
        (named / "sitecustomize.py").write_text(f"import socket\nsocket.gethostname = lambda: {HOST!r}\n")
        path = os.pathsep.join([str(named), os.environ["PYTHONPATH"]])
        with embedded_server(folder / "home", PYTHONPATH=path, **TIMINGS) as one:
            known = _story(one, folder)
        _pack(folder / "home", known, target)


def _story(one: EmbeddedServer, folder: Path) -> dict[str, Any]:
    """Return the facts that tests need beside the home itself."""
    model = one.upload(write_teacher(folder / "teacher.safetensors", "convnet8"))
    assert one.post("/v1/models", {"name": "theirs", "blob": model}).status_code == 201
    data = one.upload(write_arrays(folder / "data.npz"))
    assert one.post("/v1/datasets", {"name": "theirs", "blob": data}).status_code == 201

    answer = one.post("/v1/jobs", SUCCEEDED, headers={"Idempotency-Key": KEY})
    assert answer.status_code == 201, answer.text
    jobs = {"succeeded": answer.json()["id"]}
    one.ended(jobs["succeeded"])
    jobs["failed"] = one.submit(FAILED)
    one.ended(jobs["failed"], "failed")

    # Killed in its first stage or soon after, taken over by the server that is started next, paused in the second.
    jobs["paused"] = one.submit(PAUSED)
    _reaches(one, jobs["paused"], 1)
    one.kill()
    one.start()
    _reaches(one, jobs["paused"], 200)
    jobs["cancelled"] = one.submit(CANCELLED)
    assert one.post(f"/v1/jobs/{jobs['cancelled']}/cancel").json()["status"] == "cancelled"
    one.post(f"/v1/jobs/{jobs['paused']}/pause")
    wait_until(lambda: one.get(f"/v1/jobs/{jobs['paused']}")["status"] == "paused", 30, one.log)

    # Handed back when the server is stopped, with one that waits behind it.
    jobs["stopped"] = one.submit(STOPPED)
    jobs["queued"] = one.submit(QUEUED)
    _reaches(one, jobs["stopped"], 60)
    told = {name: _told(one, job_id) for name, job_id in jobs.items() if name not in ("stopped", "queued")}
    assert one.stop() == 0
    with closing(sqlite3.connect(one.home / "distillery.db")) as database:
        rows = {row[0]: row[1:] for row in database.execute("SELECT id, status, checkpoint_step FROM jobs")}
    statuses = {name: rows[job_id][0] for name, job_id in jobs.items()}
    ended = {"succeeded": "succeeded", "failed": "failed", "cancelled": "cancelled"}
    assert statuses == {**ended, "paused": "paused", "stopped": "queued", "queued": "queued"}
    steps = {name: rows[jobs[name]][1] for name in ("paused", "stopped")}
    return {"jobs": jobs, "steps": steps, "told": told, "model": model, "dataset": data, "key": KEY, "spec": SUCCEEDED}


def _reaches(one: EmbeddedServer, job_id: str, step: int) -> None:
    """Wait until it can go on from there."""
    wait_until(lambda: (one.get(f"/v1/jobs/{job_id}")["checkpoint_step"] or 0) >= step, 60, one.log)


def _told(one: EmbeddedServer, job_id: str) -> dict[str, Any]:
    """Return the API's answers about a job."""
    job = one.get(f"/v1/jobs/{job_id}")
    return {
        "job": {name: job[name] for name in ("status", "name", "method", "resolved_spec", "result", "error")},
        "events": [event["type"] for event in one.get(f"/v1/jobs/{job_id}/events", limit=1000)["data"]],
        "attempts": [attempt["how"] for attempt in one.get(f"/v1/jobs/{job_id}/attempts")["data"]],
        "metrics": one.get(f"/v1/jobs/{job_id}/metrics", max_points=10_000)["series"],
        "artifacts": {
            artifact["name"]: artifact["sha256"] for artifact in one.get(f"/v1/jobs/{job_id}/artifacts")["data"]
        },
    }


def _pack(home: Path, known: dict[str, Any], target: Path) -> None:
    (home.parent / "known.json").write_text(json.dumps(known, indent=1))
    with tarfile.open(target, "w:xz", preset=9) as archive:
        archive.add(home.parent / "known.json", "known.json", filter=_nobodys)
        for path in sorted(home.iterdir()):
            if path.name not in LEFT_OUT:
                archive.add(path, f"home/{path.name}", filter=_nobodys)


def _nobodys(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    main()
