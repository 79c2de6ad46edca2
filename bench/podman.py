"""Podman with base images made of Debian packages, for machines without a Docker engine and without a registry.

Without systemd, Podman 4.3 needs runc, cgroupfs, its own limits, and a thread that runs the containers' health checks.
Everything is in one folder; the host's own Podman settings are neither read nor changed.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bench.processes import wait_until

NEEDED = ("podman", "buildah", "runc", "catatonit", "mmdebstrap", "iptables")
PACKAGES = "podman buildah runc netavark aardvark-dns catatonit uidmap iptables mmdebstrap"
SUITE = "bookworm"
NGINX_USER = 101
PYTHON, SERVERS = "localhost/bench/python:3.11", "localhost/bench/servers:bookworm"
PROXY = "localhost/bench/proxy:bookworm"
POSTGRES, REDIS, NGINX = "localhost/bench/postgres:15", "localhost/bench/redis:7.0", "localhost/bench/nginx:1.22"
INCLUDED = {
    PYTHON: "python3,python3-venv,ca-certificates",
    SERVERS: "postgresql,redis-server",
    PROXY: "nginx-light,curl",
}
HEALTH_EVERY_S = 2
SOCKET_S = 30

CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=20000:20000"]
cgroupns = "host"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""

# The part of the official image's first start that docker-compose.yml relies on.
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
# Debian's nginx has an older form of one line, and Podman's networks have a name server of their own.
NGINX_ENTRYPOINT = """#!/bin/sh
set -eu
server=$(awk '/^nameserver/ {print $2; exit}' /etc/resolv.conf)
sed -e "s/127\\.0\\.0\\.11/$server/" -e 's/listen 8443 ssl;/listen 8443 ssl http2;/' -e '/^ *http2 on;/d' \\
  /etc/distillery/nginx.conf > /tmp/nginx.conf
exec /usr/sbin/nginx -c /tmp/nginx.conf -g 'daemon off;'
"""
# The user has the number that it has in the official image.
NGINX_FILE = f"""
FROM {PROXY}
RUN useradd --system --uid {NGINX_USER} nginx
COPY entrypoint.sh /usr/local/bin/nginx
"""


class CannotRun(Exception):
    """This machine lacks something; the message names it and the remedy."""


@dataclass(frozen=True)
class Podman:
    """Podman with its settings, images and containers in one folder."""

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
        """Run a command and return its standard output. Raises CannotRun with the end of the log if it fails."""
        log = self.home / "podman.log"
        with log.open("ab") as errors:
            environment = {**self.environment, **more}
            ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=errors, check=False)
        if ran.returncode:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            raise CannotRun(f"{' '.join(command[:3])}… ended with {ran.returncode}; the end of {log}:\n{tail}")
        return ran.stdout.decode()

    def has(self, image: str) -> bool:
        command = ["podman", "image", "exists", image]
        return subprocess.run(command, env=self.environment, capture_output=True, check=False).returncode == 0

    def make_base_images(self) -> None:
        """Make images of Debian packages in place of the official ones; existing images are kept."""
        for image, packages in INCLUDED.items():
            if not self.has(image):
                tar = self.home / "base.tar"
                self.run("nice", "mmdebstrap", "--variant=minbase", f"--include={packages}", SUITE, str(tar))
                self.run("podman", "import", "--quiet", str(tar), image)
                tar.unlink()
        context = self.home / "context"
        context.mkdir(exist_ok=True)
        made = (
            (POSTGRES, POSTGRES_FILE, POSTGRES_ENTRYPOINT),
            (REDIS, REDIS_FILE, ""),
            (NGINX, NGINX_FILE, NGINX_ENTRYPOINT),
        )
        for image, text, start in made:
            file, entrypoint = context / "Containerfile", context / "entrypoint.sh"
            file.write_text(text)
            entrypoint.write_text(start)
            entrypoint.chmod(0o755)
            self.run(*_BUILD, "--file", str(file), "--tag", image, str(context))

    def bounds(self, container: str) -> tuple[int, int]:
        """Return the bytes of memory and the number of processes that the kernel gives a container."""
        pid = self.run("podman", "inspect", "--format", "{{.State.Pid}}", container).strip()
        groups = dict[str, str]()
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            groups |= dict.fromkeys(controllers.split(","), path)
        folder = Path("/sys/fs/cgroup")
        if "memory" in groups:  # version 1
            memory = folder / "memory" / groups["memory"].lstrip("/") / "memory.limit_in_bytes"
            processes = folder / "pids" / groups["pids"].lstrip("/") / "pids.max"
        else:
            unified = folder / groups[""].lstrip("/")
            memory, processes = unified / "memory.max", unified / "pids.max"
        return int(memory.read_text()), int(processes.read_text())

    def build(self, image: str, context: Path) -> None:
        """Build the project's Dockerfile with the pip settings of this machine."""
        pip = PipSettings.of_this_machine()
        conf = self.home / "pip.conf"
        conf.write_text(pip.as_file())
        mounts = [f"--volume={conf}:/etc/pip.conf:ro", *(f"--volume={path}:{path}:ro" for path in pip.local_paths())]
        arguments = [f"--build-arg={name}={value}" for name, value in pip.build_arguments().items()]
        built_from = f"--build-arg=PYTHON_IMAGE={PYTHON}"
        self.run(*_BUILD, *mounts, built_from, *arguments, "--tag", image, str(context))

    @contextlib.contextmanager
    def service(self) -> Iterator[str]:
        """Serve Docker's API until the end of the block. Yields its address."""
        self.socket.unlink(missing_ok=True)
        address = f"unix://{self.socket}"
        with (self.home / "service.log").open("wb") as log:
            command = ["podman", "system", "service", "--time", "0", address]
            # In a session of its own: Ctrl-C must not end the service, which is needed to remove the stack.
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        stop = threading.Event()
        health = threading.Thread(target=self._run_health_checks, args=(stop,), daemon=True)
        try:
            wait_until(self.socket.exists, "Podman's service to open its socket", SOCKET_S)
            health.start()
            yield address
        finally:
            stop.set()
            if health.is_alive():
                health.join()
            process.terminate()
            process.wait(30)

    def _run_health_checks(self, stop: threading.Event) -> None:
        """Run the health checks in place of systemd, but only until a container is healthy.

        Checks at this rate would slow the trainings down. A failed check is ignored: the container may have ended.
        """
        while not stop.wait(HEALTH_EVERY_S):
            for container in self._try("podman", "ps", "--quiet", "--filter", "health=starting").split():
                self._try("podman", "healthcheck", "run", container)

    def _try(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False).stdout

    def remove_everything(self) -> None:
        """Remove all images and containers, and the folder."""
        self._try("podman", "system", "reset", "--force")
        shutil.rmtree(self.home)


@dataclass(frozen=True)
class PipSettings:
    """The settings of pip on this machine, from its files and its environment."""

    values: Mapping[str, str]

    @classmethod
    def of_this_machine(cls) -> "PipSettings":
        command = [sys.executable, "-m", "pip", "config", "list"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        values: dict[str, str] = {}
        for line in listed.splitlines():
            name, _, value = line.partition("=")
            section, _, key = name.rpartition(".")
            # As in pip, the environment has precedence over files.
            if key not in values or section == ":env:":
                values[key] = value.strip("'")
        return cls(values)

    def as_file(self) -> str:
        return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in self.values.items())

    def build_arguments(self) -> dict[str, str]:
        names = {"PIP_FIND_LINKS": "find-links", "PIP_EXTRA_INDEX_URL": "extra-index-url"}
        return {name: self.values[key] for name, key in names.items() if key in self.values}

    def local_paths(self) -> Sequence[str]:
        """Folders of wheels, indexes and certificates on this machine; the build needs them."""
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
    """PATH with the folders of the administrator's tools."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin", "/usr/libexec/podman"])
