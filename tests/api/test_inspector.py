"""The inspector believes its child's facts and nothing else, and leaves nothing running behind it."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from api.inspector import Inspector, Refused
from kdcore.catalog import DatasetFacts, ModelFacts, TapFacts

pytestmark = pytest.mark.anyio

FACTS = {
    "architecture": "resnet20",
    "num_classes": 10,
    "channels": 3,
    "parameters": 272_474,
    "bytes": 1_100_000,
    "format": "pytorch",
}


def child(tmp_path: Path, *lines: str) -> Inspector:
    """An inspector whose engine is a script of these lines."""
    script = tmp_path / "engine.py"
    script.write_text("import json, os, sys, time\n" + "\n".join(lines))
    return Inspector(tmp_path / "inspect", [sys.executable, str(script)], timeout_s=10)


async def test_facts_of_a_model_are_read_from_the_last_line(tmp_path: Path) -> None:
    answer = json.dumps({"ok": True, "facts": FACTS})
    seen = await child(tmp_path, "print('loading')", f"print({answer!r})").model(tmp_path / "x.pt", "resnet20")
    assert seen == ModelFacts(**FACTS)


async def test_the_child_is_asked_in_the_engines_words(tmp_path: Path) -> None:
    told = tmp_path / "told"
    await child(tmp_path, f"open({str(told)!r}, 'w').write(' '.join(sys.argv[1:]))").dataset(tmp_path / "x.npz", 32)
    assert told.read_text() == f"inspect dataset {tmp_path / 'x.npz'} --image-size 32"


async def test_a_refusal_of_the_engine_is_passed_on(tmp_path: Path) -> None:
    error = {"code": "teacher_mismatch", "message": "not a resnet20", "retryable": False, "hint": "try resnet56"}
    answer = json.dumps({"ok": False, "error": error})
    seen = await child(tmp_path, f"print({answer!r})").model(tmp_path / "x.pt", "resnet20")
    assert seen == Refused("teacher_mismatch", "not a resnet20", "try resnet56", final=True)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("sys.exit('torn apart')", "exit code 1"),
        ("os.kill(os.getpid(), 9)", "signal 9"),
        ("print('{')", "exit code 0"),
        ("print(json.dumps({'ok': True, 'facts': {'architecture': 1}}))", "cannot read"),
    ],
    ids=["exit", "signal", "broken answer", "other facts"],
)
async def test_a_child_that_breaks_is_our_fault_and_not_kept(tmp_path: Path, line: str, told: str) -> None:
    seen = await child(tmp_path, line).model(tmp_path / "x.pt", None)
    assert isinstance(seen, Refused)
    assert (seen.code, seen.final) == ("internal", False)
    assert told in seen.message


async def test_a_child_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    lines = (
        "child = os.fork()",
        f"open({str(pids)!r}, 'a').write(str(os.getpid()) + ' ')",
        "time.sleep(60)",
    )
    inspector = child(tmp_path, *lines)
    inspector._timeout_s = 1.0
    seen = await inspector.model(tmp_path / "x.pt", None)
    assert isinstance(seen, Refused)
    assert seen.code == "timeout"
    assert all(ended(int(pid)) for pid in pids.read_text().split())


def ended(pid: int) -> bool:
    """Gone, or a zombie that its parent has yet to bury; the signal may take a moment to arrive."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


async def test_the_child_sees_little_of_our_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_ADMIN_KEY_HASH", "secret")
    told = tmp_path / "told"
    await child(tmp_path, f"open({str(told)!r}, 'w').write(json.dumps(dict(os.environ)))").dataset(tmp_path / "x", None)
    environment = json.loads(told.read_text())
    assert "DISTILLERY_ADMIN_KEY_HASH" not in environment
    assert environment["HOME"] != os.environ.get("HOME")
    assert Path(environment["TMPDIR"]).parent == tmp_path / "inspect"


async def test_the_child_cannot_write_without_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.inspector.FILE_BYTES", 1000)
    grown = tmp_path / "grown"
    lines = (
        "import signal",
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)",
        f"open({str(grown)!r}, 'wb').write(b'x' * 5000)",
    )
    await child(tmp_path, *lines).dataset(tmp_path / "x", None)
    assert grown.stat().st_size <= 1000


async def test_the_real_engine_reads_a_real_data_set(tmp_path: Path) -> None:
    """Two classes of 20 grey 8 x 8 images, 6 of them for the test."""
    path = tmp_path / "data.npz"
    pixels = np.arange(26 * 64, dtype=np.uint8).reshape(26, 8, 8)
    labels = np.arange(26) % 2
    np.savez(path, x_train=pixels[:20], y_train=labels[:20], x_test=pixels[20:], y_test=labels[20:])
    seen = await Inspector(tmp_path / "inspect").dataset(path, None)
    assert isinstance(seen, DatasetFacts), seen
    assert (seen.num_classes, seen.channels, seen.train, seen.test) == (2, 1, 20, 6)


async def test_taps_are_asked_for_with_the_images_that_they_are_of(tmp_path: Path) -> None:
    told = tmp_path / "told"
    answer = json.dumps({"ok": True, "facts": {"shapes": {"layer3": [64, 8, 8]}}})
    inspector = child(tmp_path, f"open({str(told)!r}, 'w').write(' '.join(sys.argv[1:]))", f"print({answer!r})")
    assert await inspector.taps("resnet20", 10, 3, (32, 32), ["layer3"]) == TapFacts(shapes={"layer3": [64, 8, 8]})
    assert told.read_text() == "inspect taps resnet20 layer3 --classes 10 --channels 3 --image-size 32 32"


async def test_a_program_is_asked_for_by_its_path(tmp_path: Path) -> None:
    told = tmp_path / "told"
    await child(tmp_path, f"open({str(told)!r}, 'w').write(' '.join(sys.argv[1:]))").program(tmp_path / "x.pt2")
    assert told.read_text() == f"inspect program {tmp_path / 'x.pt2'}"


async def test_the_real_engine_reads_taps(tmp_path: Path) -> None:
    seen = await Inspector(tmp_path / "inspect").taps("convnet4", 10, 1, (8, 8), ["layer2", "fc@in"])
    assert seen == TapFacts(shapes={"layer2": [8, 4, 4], "fc@in": [8]})


async def test_the_real_engine_refuses_a_file_that_is_no_data_set(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(b"not a zip")
    seen = await Inspector(tmp_path / "inspect").dataset(path, None)
    assert isinstance(seen, Refused)
    assert seen.code == "dataset_unreadable"
