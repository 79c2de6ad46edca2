"""The container files: checked by tools, pinned, without secrets, without root, with health checks."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from base.defaults import PORT
from bench import containers_check
from bench.containers_check import CHECKS, Check, find_tool, run_check
from bench.processes import REPOSITORY

SECRETS = ("POSTGRES_PASSWORD", "DISTILLERY_ADMIN_KEY_HASH")
OURS = ("migrate", "api", "worker-0", "worker-1", "worker-2", "worker-3")


class Loader(yaml.SafeLoader):
    """A YAML loader that accepts Compose's own tags."""


Loader.add_constructor("!reset", lambda loader, node: None)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    read: dict[str, Any] = yaml.load((REPOSITORY / "docker-compose.yml").read_text(), Loader)  # noqa: S506
    return dict(read["services"])


@pytest.fixture(scope="module")
def dockerfile() -> list[str]:
    text = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_run_check_passes(check: Check) -> None:
    program = find_tool(check.tool)
    if program is None:
        pytest.skip(f"no {check.tool} for this platform")
    assert run_check(check, program) == ""


def test_run_check_reports_a_wrong_compose_file(tmp_path: Path) -> None:
    program = find_tool("docker-compose")
    if program is None:
        pytest.skip("no docker-compose for this platform")
    (tmp_path / "docker-compose.yml").write_text("services: {api: {image: a, depends_on: [missing]}}")
    assert "missing" in run_check(CHECKS[0], program, tmp_path)


def test_containers_check_exits_with_1_after_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if find_tool("hadolint") is None:
        pytest.skip("no hadolint for this platform")
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python:latest\nRUN cd /tmp && sudo ls\n")
    monkeypatch.setattr(containers_check, "CHECKS", [Check("bad", "hadolint", ["--no-color", str(bad)])])
    assert containers_check.main() == 1


def test_containers_check_skips_a_missing_tool_with_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(containers_check, "CHECKS", [Check("nothing", "no-such-tool", [])])
    assert containers_check.main() == 0
    assert "skipped" in capsys.readouterr().out


@pytest.mark.parametrize("name", SECRETS)
def test_run_check_requires_the_secrets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = find_tool("docker-compose")
    if program is None:
        pytest.skip("no docker-compose for this platform")
    monkeypatch.delitem(containers_check.REQUIRED, name)
    assert name in run_check(CHECKS[0], program)


def test_compose_file_contains_no_secret(services: dict[str, Any]) -> None:
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|KEY|SECRET|TOKEN", name):
                assert value.startswith("${"), name
            assert not re.search("://[^/]*:[^/]*@", value), f"{name} holds a password"


def test_env_example_contains_no_secret() -> None:
    lines = (REPOSITORY / ".env.example").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == [f"{name}=" for name in SECRETS]
    assert ".env" in (REPOSITORY / ".gitignore").read_text().splitlines()


def test_every_service_has_a_health_check_or_ends(services: dict[str, Any]) -> None:
    for name, service in services.items():
        check = service["healthcheck"]
        if check.get("disable"):
            assert service["restart"] == "no", f"{name} neither ends nor has a health check"
        else:
            # Podman splits the words of the form CMD again.
            assert check["test"][0] == "CMD-SHELL", name


def test_services_have_no_needless_rights(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"] is True, name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not service.get("privileged"), name


def test_every_service_has_bounds_of_memory_and_processes(services: dict[str, Any]) -> None:
    for name, service in services.items():
        size = re.fullmatch(r"(?:\$\{[A-Z]+_MEMORY:-)?(\d+)(m|g)\}?", service["mem_limit"])
        assert size is not None and int(size[1]) > 0, name
        assert 100 <= service["pids_limit"] <= 5000, name
        for mount in service["tmpfs"]:
            assert re.search(r"size=\d+[mg]$", mount), f"{name}: a tmpfs takes memory"


def test_only_the_api_is_published_and_to_this_host_alone(services: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published.pop("tls") == ["${DISTILLERY_TLS_PUBLISH:-443}:8443"], "of the profile tls"
    assert published == {"api": [f"${{DISTILLERY_PUBLISH:-127.0.0.1:{PORT}}}:{PORT}"]}


def test_the_tls_proxy_is_an_option_with_limits_and_collects_no_stream(services: dict[str, Any]) -> None:
    proxy = services["tls"]
    assert (proxy["profiles"], proxy["user"]) == (["tls"], "nginx")
    assert proxy["volumes"] == ["./proxy:/etc/distillery:ro", "${DISTILLERY_TLS_FOLDER:-./tls}:/etc/tls:ro"]
    assert proxy["depends_on"] == {"api": {"condition": "service_healthy"}}
    text = (REPOSITORY / "proxy" / "nginx.conf").read_text()
    lines = [line.strip() for line in text.splitlines()]
    for directive in (
        "listen 8443 ssl;",
        "ssl_protocols TLSv1.2 TLSv1.3;",
        "client_header_timeout 10s;",
        "limit_conn address 200;",
        "proxy_buffering off;",
        "proxy_request_buffering off;",
        "client_max_body_size 2m;",
        "set $api http://api:8000;",
    ):
        assert directive in lines, directive
    assert text.count("{") == text.count("}")
    simple = [line for line in lines if line and line[0] not in "#}" and not line.endswith("{")]
    assert all(line.endswith(";") for line in simple)
    writes = [line for line in simple if "_temp_path" in line or line.startswith("pid")]
    assert writes and all(line.split()[1].startswith("/tmp/") for line in writes)  # noqa: S108 - all else is read-only


def test_the_home_is_private_in_the_image(dockerfile: list[str]) -> None:
    made = [line for line in dockerfile if "install --directory" in line]
    assert len(made) == 1 and "--mode 0700 --owner distillery" in made[0]


def test_our_services_share_one_image_and_one_volume(services: dict[str, Any]) -> None:
    assert {services[name]["image"] for name in OURS} == {"${DISTILLERY_IMAGE:-distillery:0.1.0}"}
    assert {tuple(services[name]["volumes"]) for name in OURS} == {("files:/var/lib/distillery",)}


def test_each_worker_has_a_gpu_of_its_own(services: dict[str, Any]) -> None:
    workers = [service for name, service in services.items() if name.startswith("worker-")]
    devices = [worker["deploy"]["resources"]["reservations"]["devices"] for worker in workers]
    assert [device["device_ids"] for [device] in devices] == [[str(number)] for number in range(len(workers))]


def test_workers_are_not_killed_while_they_save(services: dict[str, Any]) -> None:
    from store.settings import Settings

    grace_s = Settings.model_fields["stop_grace_s"].default
    for name in (name for name in OURS if name.startswith("worker-")):
        assert float(services[name]["stop_grace_period"].removesuffix("s")) > grace_s


def test_images_are_pinned_to_a_patch_version(services: dict[str, Any], dockerfile: list[str]) -> None:
    defaults = [services[name]["image"] for name in ("postgres", "redis", "tls")]
    defaults += [line.split("=", 1)[1] for line in dockerfile if line.startswith("ARG PYTHON_IMAGE=")]
    assert len(defaults) == 4
    for image in defaults:
        assert re.search(r":\d+\.\d+(\.\d+)?-[a-z-]+}?$", image), image


def test_the_image_runs_as_an_ordinary_user_without_build_tools(dockerfile: list[str]) -> None:
    last = dockerfile[max(index for index, line in enumerate(dockerfile) if line.startswith("FROM")) :]
    assert [line for line in last if line.startswith("USER")] == ["USER 10001:10001"]
    assert any(line.startswith("HEALTHCHECK") for line in last)
    assert not [line for line in last if re.search(r"apt-get|pip install|gcc", line)]


def test_all_rooms_are_in_the_image(dockerfile: list[str]) -> None:
    copied = {line.split()[1] for line in dockerfile if line.startswith("COPY")}
    rooms = {"kdcore", "store", "api", "worker", "client", "migrations"}
    assert rooms <= copied
    kept = {
        line.removeprefix("!") for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    assert rooms <= kept
