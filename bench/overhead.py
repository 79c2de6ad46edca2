"""The cost of the service: wall time of a job from POST to success, against `python -m kdcore run` of the same spec.

    .venv/bin/python -m bench.overhead [--minutes 5] [--rounds 3] [--setting embedded]

Both run on the same machine with one thread, in turns. Both students must be the same file, byte for byte. Prints each
round, the medians and their ratio. Takes two times `--minutes` a round, and half a minute before: half an hour by
default.
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

from base.files import sha256_of
from bench.engine_run import run_engine, spec_lasting
from bench.processes import exit_on_sigterm
from bench.service import SETTINGS, await_workers, open_folder
from client.sdk import Distillery

REST_S = 5
"""Pause after each run, in which the next warm engine finishes its imports."""


def main() -> int:
    arguments = _arguments()
    exit_on_sigterm()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="distillery-overhead-") as name:
        folder = Path(name)
        open_folder(folder)
        spec = spec_lasting(60 * arguments.minutes, folder / "rehearsal")
        print(f"{spec['student']} on {spec['dataset']}, {spec['training']['epochs']} epochs", flush=True)
        rounds = _rounds(spec, arguments, folder)
    service_s, engine_s = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = service_s / engine_s
    print(f"\nmedians: service {service_s:.2f} s, engine alone {engine_s:.2f} s, ratio {ratio:.4f} (aim: below 1.02)")
    return 0


def _rounds(spec: Mapping[str, Any], arguments: argparse.Namespace, folder: Path) -> list[tuple[float, float]]:
    """Seconds of each round, by the service and by the engine alone."""
    rounds = []
    home = folder / "service"
    home.mkdir()
    with SETTINGS[arguments.setting](home, DISTILLERY_THREADS="1") as url, Distillery(url) as service:
        await_workers(url, 1)
        for number in range(1, arguments.rounds + 1):
            engine_folder = folder / f"round-{number}"
            time.sleep(REST_S)
            service_s, job_id = _time_a_job(service, spec)
            student = service.download(job_id, to=folder / f"service-{number}.safetensors")
            time.sleep(REST_S)
            engine_s = run_engine(service.job(job_id)["resolved_spec"], engine_folder).seconds
            if sha256_of(student) != sha256_of(engine_folder / "out" / "student.safetensors"):
                raise SystemExit(f"round {number}: the student of the service differs from that of the engine alone")
            print(
                f"round {number}: service {service_s:.2f} s, engine alone {engine_s:.2f} s, equal students", flush=True
            )
            rounds.append((service_s, engine_s))
    return rounds


def _time_a_job(service: Distillery, spec: Mapping[str, Any]) -> tuple[float, str]:
    """Seconds from the POST to success, and the job's id."""
    sent = time.time()
    job_id = service.submit(spec)["id"]
    job = service.wait(job_id)
    if job["status"] != "succeeded" or job["finished_at"] is None:
        raise SystemExit(f"job {job_id} ended {job['status']}: {job['error']}")
    return datetime.fromisoformat(job["finished_at"]).timestamp() - sent, job_id


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The cost of the service for a job, against the engine alone.")
    parser.add_argument("--minutes", type=float, default=5, help="length of the training, about")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--setting", default="embedded", choices=list(SETTINGS))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
