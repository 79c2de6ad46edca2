"""The devices of a host, and the environment of an engine."""

import os
import stat
from pathlib import Path

import pytest

from base.cores import AT_MOST
from worker import devices
from worker.devices import Allocator, Device, discover, engine_environment, find_allocator


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cores", lambda: 8)
    monkeypatch.setattr(devices, "host_memory", lambda: 16 << 30)


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that answers as the driver's own does."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 0, GPU-aaaa, 40960\necho 1, GPU-bbbb, [N/A]\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize("visible", ["", "-1"])
def test_discover_without_gpus_gives_one_cpu_with_all_cores(visible: str):
    assert discover(environment={"CUDA_VISIBLE_DEVICES": visible}) == [Device("cpu", "", 8, 16 << 30)]


@pytest.mark.usefixtures("eight_cores")
def test_discover_divides_the_cores_by_the_slots():
    shared = discover(3, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert shared == [Device(f"cpu:{slot}", "", 2, 16 << 30) for slot in range(3)]
    assert discover(1, threads=5, environment={"CUDA_VISIBLE_DEVICES": ""})[0].threads == 5


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(("omp_threads", "threads"), [("3", 3), ("0", 8), ("4,2", 8), ("", 8)])
def test_discover_takes_threads_from_omp_num_threads(omp_threads: str, threads: int):
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": omp_threads}
    assert discover(environment=environment)[0].threads == threads
    assert discover(threads=2, environment=environment)[0].threads == 2


@pytest.mark.usefixtures("eight_cores", "two_gpus")
def test_discover_gives_one_device_for_each_gpu():
    both = [Device("cuda:0", "GPU-aaaa", 4, 40 << 30), Device("cuda:1", "GPU-bbbb", 4, None)]
    assert discover(environment={}) == both
    assert [device.visible for device in discover(3, environment={})] == ["GPU-aaaa", "GPU-bbbb", "GPU-aaaa"]
    assert [device.visible for device in discover(1, environment={})] == ["GPU-aaaa"]


@pytest.mark.usefixtures("eight_cores", "two_gpus")
@pytest.mark.parametrize(
    ("visible", "names"), [("3", ["3"]), ("0,2", ["0", "2"]), ("0,-1,2", ["0"]), ("GPU-x", ["GPU-x"])]
)
def test_discover_keeps_to_the_operators_choice_of_gpus(visible: str, names: list[str]):
    assert [device.visible for device in discover(environment={"CUDA_VISIBLE_DEVICES": visible})] == names


@pytest.mark.usefixtures("eight_cores", "two_gpus")
def test_discover_finds_the_memory_of_a_gpu_by_its_number_too():
    chosen = discover(environment={"CUDA_VISIBLE_DEVICES": "1,0,7"})
    assert [device.memory_bytes for device in chosen] == [None, 40 << 30, None]


def test_discover_finds_no_gpu_when_the_driver_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [device.name for device in discover(environment={})] == ["cpu"]


def test_engine_environment_has_no_secrets(tmp_path: Path):
    environment = {
        "PATH": "/bin",
        "DISTILLERY_DATABASE_URL": "postgresql://user:secret@host/db",
        "PGPASSWORD": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "TORCH_HOME": "/models",
        "HF_TOKEN": "secret",
    }
    passed_on = engine_environment(Device("cuda:1", "GPU-bbbb", 4), tmp_path, environment, allocator="off")
    assert "secret" not in " ".join(passed_on.values())
    assert (passed_on["CUDA_VISIBLE_DEVICES"], passed_on["OMP_NUM_THREADS"], passed_on["TORCH_HOME"]) == (
        "GPU-bbbb",
        "4",
        "/models",
    )
    assert (Path(passed_on["PYTHONPATH"].split(os.pathsep)[0]) / "kdcore").is_dir()


def test_engine_environment_says_whether_the_threads_are_those_of_the_operator(tmp_path: Path):
    derived = engine_environment(Device("cpu", "", 2), tmp_path, {}, allocator="off")
    assert (derived["OMP_NUM_THREADS"], derived[AT_MOST]) == ("2", "2")
    asked = engine_environment(Device("cpu", "", 2, threads_are_asked=True), tmp_path, {}, allocator="off")
    assert asked["OMP_NUM_THREADS"] == "2" and AT_MOST not in asked


@pytest.mark.usefixtures("eight_cores")
def test_discover_notes_whether_the_operator_has_set_the_threads():
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    assert not discover(environment=environment)[0].threads_are_asked
    assert discover(threads=2, environment=environment)[0].threads_are_asked
    assert discover(environment={**environment, "OMP_NUM_THREADS": "2"})[0].threads_are_asked


@pytest.mark.parametrize(
    ("allocator", "preloaded", "expected"),
    [
        ("auto", None, "/lib/one.so"),
        ("off", None, None),
        ("auto", "/mine.so", "/mine.so"),
        ("off", "/mine.so", "/mine.so"),
    ],
)
def test_engine_environment_preloads_an_allocator_unless_the_operator_preloads_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allocator: Allocator, preloaded: str | None, expected: str | None
):
    monkeypatch.setattr(devices, "find_allocator", lambda: "/lib/one.so")
    environment = {} if preloaded is None else {"LD_PRELOAD": preloaded}
    made = engine_environment(Device("cpu", "", 1), tmp_path, environment, allocator=allocator)
    assert made.get("LD_PRELOAD") == expected
    assert (made.items() >= devices.KEPT.items()) is (allocator == "auto")


def test_find_allocator_takes_none_that_cannot_be_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert find_allocator((str(tmp_path),)) is None
    (tmp_path / "libjemalloc.so.2").write_text("no library")
    find_allocator.cache_clear()
    assert find_allocator((str(tmp_path),)) is None
    assert "cannot be used" in caplog.text


def test_find_allocator_takes_a_library_that_can_be_loaded(tmp_path: Path):
    """Any library of the system stands for it: that it is an allocator is not needed here."""
    library = next((path for path in Path("/").glob("lib/*-linux-gnu*/libm.so.6")), None)
    if library is None:
        pytest.skip("this system keeps its libraries elsewhere")
    (tmp_path / "libtcmalloc_minimal.so.4").symlink_to(library)
    assert find_allocator((str(tmp_path),)) == str(tmp_path / "libtcmalloc_minimal.so.4")
