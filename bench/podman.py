"""Containers where no Docker engine runs and no image can be pulled: Podman, on base images made of Debian packages.

What Podman 4.3 wants here: runc and cgroupfs where no systemd runs, limits of its own, and somebody who asks each
container for its health, since without systemd nobody does. Everything lies in one folder; nothing of the host's own
set-up is read or changed.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

NEEDED = ("podman", "buildah", "runc", "catatonit", "mmdebstrap", "iptables")
PACKAGES = "podman buildah runc netavark aardvark-dns catatonit uidmap iptables mmdebstrap"
SUITE = "bookworm"
PYTHON, SERVERS = "localhost/bench/python:3.11", "localhost/bench/servers:bookworm"
POSTGRES, REDIS = "localhost/bench/postgres:15", "localhost/bench/redis:7.0"
INCLUDED = {PYTHON: "python3,python3-venv,ca-certificates", SERVERS: "postgresql,redis-server"}
HEALTH_EVERY_S = 2

CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=20000:20000"]
cgroupns = "host"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""

# What the official images do at their first start, as far as docker-compose.yml relies on it.
POSTGRES_ENTRYPOINT = """#!/bin/sh
set -eu
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  (umask 077 && printf %s "$POSTGRES_PASSWORD" > /tmp/password)
  initdb -U "$POSTGRES_USER" --pwfile=/tmp/password -E UTF8 --locale=C.UTF-8
  rm /tmp/password
  echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
  echo "CREATE DATABASE \\"$POSTGRES_DB\\"" | postgres --single -D "$PGDATA" postgres
fi
exec postgres -c listen_addresses='*'
"""
POSTGRES_FILE = f"""
FROM {SERVERS}
ENV PATH=/usr/lib/postgresql/15/bin:$PATH PGDATA=/var/lib/postgresql/data
RUN install -d -o postgres -g postgres -m 1777 $PGDATA /var/run/postgresql
COPY entrypoint.sh /usr/local/bin/
ENTRYPOINT ["entrypoint.sh"]
STOPSIGNAL SIGINT
"""
REDIS_FILE = f"""
FROM {SERVERS}
WORKDIR /data
"""


class CannotRun(Exception):
    """This machine lacks something; the message says what to do."""


@dataclass(frozen=True)
class Podman:
    """One folder with Podman's settings, images and containers."""

    home: Path

    def __post_init__(self) -> None:
        if missing := [tool for tool in NEEDED if shutil.which(tool, path=_path()) is None]:
            raise CannotRun(f"{', '.join(missing)} not found; on Debian as root: apt-get install {PACKAGES}")
        if os.geteuid() != 0:
            raise CannotRun(
                "root is needed: the base images are made by mmdebstrap, the containers run by rootful Podman"
            )
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "containers.conf").write_text(CONTAINERS_CONF)
        storage = f'[storage]\ndriver = "overlay"\nrunroot = "{self.home}/run"\ngraphroot = "{self.home}/graph"\n'
        (self.home / "storage.conf").write_text(storage)

    @cached_property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": _path(),
            "CONTAINERS_CONF": str(self.home / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.home / "storage.conf"),
        }

    @property
    def socket(self) -> Path:
        return self.home / "podman.sock"

    def run(self, *command: str, **more: str) -> str:
        """Standard output of a command that must succeed; the rest goes to a log, whose end tells of a failure."""
        log = self.home / "podman.log"
        with log.open("ab") as errors:
            environment = {**self.environment, **more}
            ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=errors, check=False)
        if ran.returncode:
            told = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            raise CannotRun(f"{' '.join(command[:3])}… ended with {ran.returncode}; the end of {log}:\n{told}")
        return ran.stdout.decode()

    def has(self, image: str) -> bool:
        command = ["podman", "image", "exists", image]
        return subprocess.run(command, env=self.environment, capture_output=True, check=False).returncode == 0

    def make_base_images(self) -> None:
        """Debian's packages in place of the official images; made once and kept."""
        for image, packages in INCLUDED.items():
            if not self.has(image):
                tar = self.home / "base.tar"
                self.run("nice", "mmdebstrap", "--variant=minbase", f"--include={packages}", SUITE, str(tar))
                self.run("podman", "import", "--quiet", str(tar), image)
                tar.unlink()
        context = self.home / "context"
        context.mkdir(exist_ok=True)
        entrypoint = context / "entrypoint.sh"
        entrypoint.write_text(POSTGRES_ENTRYPOINT)
        entrypoint.chmod(0o755)
        for image, text in {POSTGRES: POSTGRES_FILE, REDIS: REDIS_FILE}.items():
            file = context / "Containerfile"
            file.write_text(text)
            self.run(*_BUILD, "--file", str(file), "--tag", image, str(context))

    def build(self, image: str, context: Path) -> None:
        """The project's Dockerfile; pip is told in there what it is told here."""
        pip = PipSettings.of_this_machine()
        conf = self.home / "pip.conf"
        conf.write_text(pip.as_file())
        mounts = [f"--volume={conf}:/etc/pip.conf:ro", *(f"--volume={path}:{path}:ro" for path in pip.local_paths())]
        arguments = [f"--build-arg={name}={value}" for name, value in pip.build_arguments().items()]
        built_from = f"--build-arg=PYTHON_IMAGE={PYTHON}"
        self.run(*_BUILD, *mounts, built_from, *arguments, "--tag", image, str(context))

    @contextlib.contextmanager
    def service(self) -> Iterator[str]:
        """Docker's API for as long as the block runs; yields its address."""
        self.socket.unlink(missing_ok=True)
        address = f"unix://{self.socket}"
        with (self.home / "service.log").open("wb") as log:
            command = ["podman", "system", "service", "--time", "0", address]
            # In a session of its own: Ctrl-C must not take away what taking the stack down needs.
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        stop = threading.Event()
        asker = threading.Thread(target=self._ask_for_health, args=(stop,), daemon=True)
        try:
            _until(self.socket.exists, "Podman's service to open its socket")
            asker.start()
            yield address
        finally:
            stop.set()
            if asker.is_alive():
                asker.join()
            process.terminate()
            process.wait(30)

    def _ask_for_health(self, stop: threading.Event) -> None:
        """In systemd's place, until a container is well: checks at this pace would slow the trainings down.

        A container may be gone by the time that it is asked.
        """
        while not stop.wait(HEALTH_EVERY_S):
            listed = self._try("podman", "ps", "--quiet", "--filter", "health=starting").split()
            for container in listed:
                self._try("podman", "healthcheck", "run", container)

    def _try(self, *command: str) -> str:
        ran = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        return ran.stdout

    def remove_everything(self) -> None:
        """Images and containers of this folder, and the folder."""
        self._try("podman", "system", "reset", "--force")
        shutil.rmtree(self.home)


@dataclass(frozen=True)
class PipSettings:
    """Where pip looks on this machine, by its files and its environment."""

    values: Mapping[str, str]

    @classmethod
    def of_this_machine(cls) -> "PipSettings":
        command = [sys.executable, "-m", "pip", "config", "list"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        values: dict[str, str] = {}
        for line in listed.splitlines():
            name, _, value = line.partition("=")
            section, _, key = name.rpartition(".")
            # The environment wins over files, as it does for pip.
            if key not in values or section == ":env:":
                values[key] = value.strip("'")
        return cls(values)

    def as_file(self) -> str:
        return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in self.values.items())

    def build_arguments(self) -> dict[str, str]:
        names = {"PIP_FIND_LINKS": "find-links", "PIP_EXTRA_INDEX_URL": "extra-index-url"}
        return {name: self.values[key] for name, key in names.items() if key in self.values}

    def local_paths(self) -> Sequence[str]:
        """Folders of wheels, indexes and certificates on this machine, to be seen in the build."""
        paths = set()
        for key, value in self.values.items():
            for place in value.split():
                path = Path(place.removeprefix("file://"))
                if path.is_absolute() and path.exists():
                    # The pages of an index link to files beside it.
                    paths.add(str(path.parent if key.endswith("index-url") else path))
        return sorted(paths)


_BUILD = ("nice", "buildah", "bud", "--quiet", "--layers", "--format=docker", "--isolation=chroot")


def _path() -> str:
    """Tools for administrators are not on everybody's path."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin", "/usr/libexec/podman"])


def _until(true: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > end:
            raise CannotRun(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.1)
