"""The container files keep their promises: pinned, without secrets, without root, with a way to tell who is well."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench import containers_check
from bench.containers_check import CHECKS, HERE, Check, faults, find

SECRETS = ("POSTGRES_PASSWORD", "DISTILLERY_ADMIN_KEY_HASH")
OURS = ("migrate", "api", "worker-0", "worker-1", "worker-2", "worker-3")


class Loader(yaml.SafeLoader):
    """Knows Compose's own tags."""


Loader.add_constructor("!reset", lambda loader, node: None)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    read: dict[str, Any] = yaml.load((HERE / "docker-compose.yml").read_text(), Loader)  # noqa: S506
    return dict(read["services"])


@pytest.fixture(scope="module")
def dockerfile() -> list[str]:
    text = (HERE / "Dockerfile").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_tools_find_no_fault(check: Check) -> None:
    program = find(check.tool)
    if program is None:
        pytest.skip(f"no {check.tool} for this platform")
    assert faults(check, program) == ""


def test_compose_tells_a_wrong_file_by_its_exit_status(tmp_path: Path) -> None:
    program = find("docker-compose")
    if program is None:
        pytest.skip("no docker-compose for this platform")
    (tmp_path / "docker-compose.yml").write_text("services: {api: {image: a, depends_on: [nobody]}}")
    assert "nobody" in faults(CHECKS[0], program, tmp_path)


def test_a_fault_is_told_and_is_the_exit_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if find("hadolint") is None:
        pytest.skip("no hadolint for this platform")
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python:latest\nRUN cd /tmp && sudo ls\n")
    monkeypatch.setattr(containers_check, "CHECKS", [Check("bad", "hadolint", ["--no-color", str(bad)])])
    assert containers_check.main() == 1


def test_a_missing_tool_is_skipped_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(containers_check, "CHECKS", [Check("nothing", "no-such-tool", [])])
    assert containers_check.main() == 0
    assert "skipped" in capsys.readouterr().out


@pytest.mark.parametrize("name", SECRETS)
def test_what_must_be_secret_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = find("docker-compose")
    if program is None:
        pytest.skip("no docker-compose for this platform")
    monkeypatch.delitem(containers_check.FILLED_IN, name)
    assert name in faults(CHECKS[0], program)


def test_no_secret_is_written_down(services: dict[str, Any]) -> None:
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|KEY|SECRET|TOKEN", name):
                assert value.startswith("${"), name
            assert not re.search("://[^/]*:[^/]*@", value), f"{name} holds a password"


def test_the_example_fills_in_nothing_secret() -> None:
    lines = (HERE / ".env.example").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == [f"{name}=" for name in SECRETS]
    assert ".env" in (HERE / ".gitignore").read_text().splitlines()


def test_every_service_is_healthy_or_over(services: dict[str, Any]) -> None:
    for name, service in services.items():
        check = service["healthcheck"]
        if check.get("disable"):
            assert service["restart"] == "no", f"{name} neither ends nor tells how it is"
        else:
            # Podman splits the words of the other form anew.
            assert check["test"][0] == "CMD-SHELL", name


def test_nothing_holds_more_rights_than_it_needs(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"] is True, name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not service.get("privileged"), name


def test_only_the_api_is_published_and_to_this_host_alone(services: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {"api": ["${DISTILLERY_PUBLISH:-127.0.0.1:8000}:8000"]}


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
    defaults = [services[name]["image"] for name in ("postgres", "redis")]
    defaults += [line.split("=", 1)[1] for line in dockerfile if line.startswith("ARG PYTHON_IMAGE=")]
    assert len(defaults) == 3
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
    kept = {line.removeprefix("!") for line in (HERE / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert rooms <= kept
