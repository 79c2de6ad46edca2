"""What the service costs a job: wall time from POST to success, against `python -m kdcore run` of the same resolved
spec by hand, on the same machine, one thread each, taking turns.

    .venv/bin/python -m bench.overhead [--minutes 5] [--rounds 3] [--setting embedded]

The student that both end with has to be the same file, byte for byte. Prints each round, the medians and their ratio.
Expect two times `--minutes` a round, and half a minute before: half an hour by default.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from base.files import sha256
from bench import engine_run
from bench.service import SETTINGS, await_workers, leave_in_order
from client.sdk import Distillery

REST_S = 5
"""After each run, for its caches and the next waiting engine to settle."""


def main() -> int:
    arguments = _arguments()
    leave_in_order()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="distillery-overhead-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        spec = engine_run.lasting(60 * arguments.minutes, folder / "rehearsal")
        print(f"{spec['student']} on {spec['dataset']}, {spec['training']['epochs']} epochs", flush=True)
        rounds = _rounds(spec, arguments, folder)
    served, alone = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f"\nmedians: service {served:.2f} s, by hand {alone:.2f} s, ratio {served / alone:.4f} (aim: below 1.02)")
    return 0


def _rounds(spec: Mapping[str, Any], arguments: argparse.Namespace, folder: Path) -> list[tuple[float, float]]:
    """Seconds by the service and by hand."""
    found = []
    home = folder / "service"
    home.mkdir()
    with SETTINGS[arguments.setting](home, DISTILLERY_THREADS="1") as address, Distillery(address) as service:
        await_workers(address, 1)
        for number in range(1, arguments.rounds + 1):
            place = folder / f"round-{number}"
            time.sleep(REST_S)
            served, job_id = _through(service, spec)
            student = service.download(job_id, to=folder / f"served-{number}.safetensors")
            time.sleep(REST_S)
            alone = engine_run.run(service.job(job_id)["resolved_spec"], place)
            if sha256(student) != sha256(place / "out" / "student.safetensors"):
                raise SystemExit(f"round {number}: the service's student is not the one made by hand")
            print(f"round {number}: service {served:.2f} s, by hand {alone:.2f} s, the same student", flush=True)
            found.append((served, alone))
    return found


def _through(service: Distillery, spec: Mapping[str, Any]) -> tuple[float, str]:
    """Seconds from the POST to the event of success, and the job's id."""
    sent = time.time()
    job_id = service.submit(spec)["id"]
    job = service.wait(job_id)
    if job["status"] != "succeeded" or job["finished_at"] is None:
        raise SystemExit(f"job {job_id} ended {job['status']}: {job['error']}")
    return datetime.fromisoformat(job["finished_at"]).timestamp() - sent, job_id


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What the service costs a job, against the engine by hand.")
    parser.add_argument("--minutes", type=float, default=5, help="of training, about")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--setting", default="embedded", choices=list(SETTINGS))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
