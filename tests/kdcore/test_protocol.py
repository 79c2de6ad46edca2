import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from base.warning import WarningItem
from kdcore.__main__ import main
from kdcore.protocol import READY, Lines, Order, send_order
from tests.kdcore.engine import job, write_arrays, write_teacher


def test_lines_one_object_a_line():
    stream = io.StringIO()
    lines = Lines(stream)
    lines.phase("training")
    lines.metric("student", 5, 1, {"train/loss": 0.5})
    lines.warning(WarningItem("teacher_near_chance", "/teacher", "it guesses"))
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["phase", "metric", "warning"]


def test_lines_progress_is_due_once_a_second():
    lines = Lines(io.StringIO())
    assert lines.progress_is_due()
    lines.progress(step=1)
    assert not lines.progress_is_due()


def test_lines_signs_of_work_and_of_waiting_are_written_from_time_to_time(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("kdcore.protocol.time.monotonic", lambda: now)
    stream = io.StringIO()
    lines = Lines(stream)
    for now, sign in ((105.0, 1), (111.0, 2), (112.0, 3), (122.0, None)):  # noqa: B007  # read by the clock
        lines.waiting() if sign is None else lines.working(sign, 9)
    written = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert written == [{"event": "working", "done": 2, "total": 9}, {"event": "waiting"}]


def test_lines_numbers_that_json_lacks_are_refused_rather_than_written():
    with pytest.raises(ValueError, match="JSON"):
        Lines(io.StringIO()).metric("student", 1, 1, {"train/loss": float("nan")})


ROOT = Path(__file__).parents[2]
SOLE = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from kdcore import protocol; import json, os, tempfile\n"


@contextmanager
def waiting(*command: str) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A process that waits for its order, and our end of its socket. Its number goes last on the command line."""
    ours, theirs = socket.socketpair()
    words = [sys.executable, *command, str(theirs.fileno())]
    with ours, subprocess.Popen(words, cwd=ROOT, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE) as process:
        theirs.close()
        try:
            yield process, ours
        finally:
            process.kill()


@contextmanager
def ordered(channel: socket.socket, order: Order, folder: Path) -> Iterator[int]:
    """Send the order. Yields the descriptor from which the lines of its engine are read."""
    read, events = os.pipe()
    with (folder / "log").open("ab") as log, (folder / "lock").open("w") as lock:
        send_order(channel, order, events=events, log=log.fileno(), lock=lock.fileno())
    os.close(events)
    yield read
    os.close(read)


def test_receive_order_applies_the_order_before_it_returns(tmp_path: Path):
    """Sent before the engine has made ready, and longer than one message of the socket."""
    program = SOLE + (
        "before = tempfile.gettempdir()\n"
        "arguments = protocol.receive_order(int(sys.argv[1]), lambda: print('ready', file=sys.stderr))\n"
        "print('printed')\n"
        "received = {'argv': len(arguments), 'end': arguments[-2:], 'cwd': os.getcwd(), 'tmp': tempfile.gettempdir()}\n"
        "there = [f'/proc/self/fd/{name}' for name in os.listdir('/proc/self/fd')]\n"
        "received['open'] = [os.readlink(path) for path in there if os.path.exists(path)]\n"
        "os.write(int(arguments[-1]), json.dumps(received).encode())\n"
    )
    order = Order(["x" * 100] * 5000, str(tmp_path), {"TMPDIR": str(tmp_path)})
    with waiting("-c", program) as (process, channel), ordered(channel, order, tmp_path) as lines:
        with os.fdopen(os.dup(lines)) as stream:
            received = json.load(stream)
        assert process.wait(60) == 0
    assert (received["argv"], received["cwd"], received["tmp"]) == (5002, str(tmp_path), str(tmp_path))
    assert received["end"][0] == "--events-fd"
    assert str(tmp_path / "lock") in received["open"], "the lock is held as long as the engine runs"
    assert not [name for name in received["open"] if name.startswith("socket:")], "no second order can come"
    assert (tmp_path / "log").read_text() == "printed\n"


def test_receive_order_sends_ready_after_the_imports():
    program = SOLE + "protocol.receive_order(int(sys.argv[1]), lambda: os.write(2, b'importing'))"
    with waiting("-c", program) as (process, channel):
        assert channel.recv(1) == READY
        assert process.stderr is not None and os.read(process.stderr.fileno(), 100) == b"importing"


def test_receive_order_exits_without_a_worker():
    with waiting("-c", SOLE + "protocol.receive_order(int(sys.argv[1]), lambda: None); print('not to be reached')") as (
        process,
        channel,
    ):
        channel.close()
        assert process.wait(60) == 0


def test_send_order_the_engine_may_close_its_end_once_it_has_the_order(tmp_path: Path, monkeypatch):
    ours, theirs = socket.socketpair()
    send_fds = socket.send_fds

    def sent_and_received(*arguments):
        count = send_fds(*arguments)
        theirs.close()
        return count

    monkeypatch.setattr(socket, "send_fds", sent_and_received)
    with ours, (tmp_path / "log").open("w") as log:
        send_order(ours, Order([], str(tmp_path), {}), events=log.fileno(), log=log.fileno(), lock=log.fileno())


def test_receive_order_and_run_by_hand_give_the_same_bits(tmp_path: Path):
    data, teacher = write_arrays(tmp_path / "blobs.npz"), write_teacher(tmp_path / "teacher.safetensors")
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(job(data, teacher, method="kd", student="convnet4").as_json()))
    by_hand, received = tmp_path / "by_hand", tmp_path / "received"
    command = [sys.executable, "-m", "kdcore", "run", str(spec), "--out", str(by_hand)]
    order = Order([str(spec), "--out", str(received)], str(tmp_path), {})
    with (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as other,
        waiting("-m", "kdcore", "run", "--wait") as (process, channel),
    ):
        assert channel.recv(1) == READY
        assert len(list(Path(f"/proc/{process.pid}/task").iterdir())) == 1, "no thread is left of the imports"
        with ordered(channel, order, tmp_path) as lines, os.fdopen(os.dup(lines)) as stream:
            events = [json.loads(line)["event"] for line in stream]
        assert process.wait(60) == other.wait(60) == 0
    assert (events[0], events[-1]) == ("phase", "done")
    assert (received / "student.safetensors").read_bytes() == (by_hand / "student.safetensors").read_bytes()


@pytest.mark.parametrize("arguments", [[], ["spec.json"], ["--out", "folder"]])
def test_receive_order_a_run_without_a_job_says_what_works(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main(["run", *arguments])
    assert left.value.code == 2
    assert "give SPEC.json and --out DIR, or --wait N" in capsys.readouterr().err
