"""The library of the kernels: found, compiled once, made again when it is damaged, and never used when it is wrong.

A shell script is the compiler here: it copies the library that a real one made.
"""

import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from base.errors import StorageFull
from kdcore import kernels
from kdcore.kernels import building


@pytest.fixture
def library(compiled: Path) -> Path:
    """A library that works here."""
    return building._library(compiled, building.kind())


@pytest.fixture(autouse=True)
def nothing_installed(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "BUILT", tmp_path / "not installed")


def fake_compiler(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put `c++` on the path, and no other compiler. The script has the name of the output in `$out`. What it links is
    counted."""
    folder.mkdir()
    compiler = folder / "c++"
    count = f'case "$*" in *-shared*) echo run >> "{folder}/log" ;; esac'
    compiler.write_text(f"#!/bin/sh\nfor out; do :; done\n{count}\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(building, "COMPILERS", ("c++",))
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def runs(folder: Path) -> int:
    return len((folder / "log").read_text().splitlines())


@pytest.fixture
def copying(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a compiler that copies the library."""
    fake_compiler(tmp_path / "compiler", f'cp "{library}" "$out"', monkeypatch)
    return tmp_path / "compiler"


def test_enable_compiles_once_for_all_processes(copying: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: building.load(tmp_path / "cache"), range(2)))
    assert runs(copying) == 1
    assert kernels.enable(tmp_path / "cache").enabled
    kernels.disable()
    assert runs(copying) == 1


def test_enable_says_in_one_line_how_it_computes(copying: Path, tmp_path: Path) -> None:
    note = kernels.enable(tmp_path / "cache").note
    kernels.disable()
    assert note.startswith("fused batch norm ") and f" for {building.kind()}, " in note and "\n" not in note


@pytest.mark.parametrize("damage", ["cut", "changed", "without digest"])
def test_load_makes_a_damaged_library_again(damage: str, copying: Path, tmp_path: Path) -> None:
    made = building._library(tmp_path / "cache", building.kind())
    whole = made.read_bytes()
    if damage == "without digest":
        made.with_name(building.DIGEST).unlink()
    else:
        made.write_bytes(whole[:1000] if damage == "cut" else whole[:-1] + b"!")
    building.load(tmp_path / "cache")
    assert runs(copying) == 2 and made.read_bytes() == whole


def test_load_takes_the_installed_library_without_a_compiler(
    copying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    building.build(building.BUILT, ["AVX2", building.kind()])
    before = runs(copying)
    monkeypatch.setenv("PATH", "")
    building.load(tmp_path / "cache")
    assert runs(copying) == before and not (tmp_path / "cache").exists()


def test_enable_is_eager_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    support = kernels.enable(tmp_path / "cache")
    assert support == kernels.Support(False, "eager: no C++ compiler is installed (c++, g++, clang++)")


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ('echo "note: x" >&2; echo "n.cpp:1: error: no such header" >&2; exit 1', "n.cpp:1: error: no such header"),
        ("exit 4", "exit code 4"),
        ("exit 0", "it wrote no library"),
        ("sleep 600 & wait", "it had not ended after 0.2 s"),
        ('echo text > "$out"', "the library cannot be used"),
    ],
    ids=["error", "silent", "no output", "hangs", "no library"],
)
def test_enable_is_eager_when_the_compiler_fails(
    script: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "COMPILE_LIMIT_S", 0.2 if "sleep" in script else 60.0)
    fake_compiler(tmp_path / "compiler", script, monkeypatch)
    support = kernels.enable(tmp_path / "cache")
    assert not support.enabled and support.note.startswith("eager: ") and complaint in support.note
    assert "\n" not in support.note


def test_enable_is_eager_when_the_library_computes_something_else(
    copying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kernels._NormRelu.apply
    monkeypatch.setattr(kernels._NormRelu, "apply", lambda *arguments: right(*arguments) * 1.5)
    support = kernels.enable(tmp_path / "cache")
    assert support.note.startswith("eager: the compiled batch norm is wrong: torch.float32 differs by 0.")
    assert kernels.norm_relu(torch.nn.BatchNorm2d(1), torch.ones(2, 1, 1, 1)) is None


def test_enable_is_eager_on_a_full_disk(copying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StorageFull("no disk space to write in cache", "free some disk space")

    monkeypatch.setattr(building, "filled", full)
    assert "no disk space" in kernels.enable(tmp_path / "cache").note


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_load_refuses_the_library_of_another_user(copying: Path, tmp_path: Path) -> None:
    made = building._library(tmp_path / "cache", building.kind())
    os.chown(made, 12345, -1)
    with pytest.raises(building.NotBuilt, match="belongs to another user"):
        building.load(tmp_path / "cache")


def test_entry_of_names_source_torch_and_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [building.entry_of("AVX512"), building.entry_of("AVX2"), building.entry_of("DEFAULT")]
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    names.append(building.entry_of("AVX512"))
    (tmp_path / "other.hpp").write_text("int other;")
    monkeypatch.setattr(building, "SOURCES", [*building.SOURCES, tmp_path / "other.hpp"])
    names.append(building.entry_of("AVX512"))
    assert len(set(names)) == 5


def test_load_starts_no_second_openmp(library: Path) -> None:
    own = building.openmp_of_torch()
    if own is None:
        pytest.skip("torch has no OpenMP runtime of its own here")
    assert Path(own).is_relative_to(Path(torch.__file__).parent)
    readelf = shutil.which("readelf")
    if readelf is not None:
        needed = subprocess.run([readelf, "-d", library], capture_output=True, text=True, check=True).stdout
        assert "NEEDED" in needed and "omp" not in needed


def test_kernels_command_compiles_for_every_cpu_of_the_architecture(
    copying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "image"
    monkeypatch.setattr(sys, "argv", ["kernels", str(folder)])
    runpy.run_module("kdcore.kernels", run_name="__main__")
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert folder / building.entry_of(building.kind()) / building.LIBRARY in printed
    assert all(path.is_file() for path in printed)
