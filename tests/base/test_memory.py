"""The memory of this host and of processes."""

import os
from pathlib import Path

import pytest

from base.memory import LIMITS, host_memory, peak_bytes, session_of, taken_bytes

STATUS = (
    "Name:\tengine\nVmHWM:\t  900 kB\nVmRSS:\t  700 kB\nRssAnon:\t  100 kB\nRssFile:\t  550 kB\nRssShmem:\t 50 kB\n"
)


def written(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("name", LIMITS)
def test_host_memory_is_the_containers_limit_if_it_has_one(tmp_path: Path, name: str):
    whole = host_memory()
    assert whole is not None and 1 << 26 < whole < 1 << 50
    for content, expected in (("1048576\n", 1 << 20), ("max\n", host_memory(tmp_path)), (str(1 << 62), None)):
        written(tmp_path / name, content)
        assert host_memory(tmp_path) == (expected or host_memory(tmp_path / "nowhere"))
        (tmp_path / name).unlink()


def test_taken_bytes_leaves_mapped_files_out(tmp_path: Path):
    written(tmp_path / "proc/7/status", STATUS)
    assert taken_bytes(7, tmp_path) == 150 << 10
    written(tmp_path / "proc/8/status", "VmRSS:\t  700 kB\n")
    assert taken_bytes(8, tmp_path) == 700 << 10, "an old kernel does not tell them apart"
    assert taken_bytes(9, tmp_path) == 0


def test_peak_bytes(tmp_path: Path):
    written(tmp_path / "proc/self/status", STATUS)
    assert peak_bytes(tmp_path) == 900 << 10
    assert abs(peak_bytes(tmp_path / "nowhere") - peak_bytes()) < 1 << 30, "without /proc"


def test_session_of_names_with_blanks_and_brackets(tmp_path: Path):
    for process, session in ((7, 7), (8, 7), (9, 1)):
        written(tmp_path / f"proc/{process}/stat", f"{process} (a) b) S 1 7 {session} 0 -1 rest")
    assert session_of(7, tmp_path) == [7, 8]
    assert os.getpid() in session_of(os.getsid(0))
