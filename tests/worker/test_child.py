"""A child heard from start to end: every way to end has its name, and none leaves a process behind."""

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from base.clock import boottime
from kdcore.protocol import Order
from tests.worker.processes import FAKE_ENGINE, in_session, none_left, until
from worker.child import Child, Line
from worker.session import Session


@contextmanager
def started(tmp_path: Path, left_s: float = 600, **fake: Any) -> Iterator[Child]:
    order = ordered(tmp_path, **fake)
    with (
        Session(FAKE_ENGINE, deadline=boottime() + left_s, environment=os.environ) as session,
        (tmp_path / "lock").open("w") as lock,
        Child(session, order, log_path=tmp_path / "log", lock=lock.fileno()) as child,
    ):
        yield child


def ordered(folder: Path, **fake: Any) -> Order:
    spec, out = folder / "spec.json", folder / "out"
    spec.write_text(json.dumps({"fake": fake}))
    out.mkdir()
    return Order([str(spec), "--out", str(out)], str(folder), {"TMPDIR": str(folder)})


def heard(child: Child) -> list[Line]:
    lines, more = [], True
    while more:
        some, more = child.lines(timeout_s=0.1)
        lines += some
    return lines


def test_a_good_run(tmp_path: Path):
    with started(tmp_path, steps=3) as child:
        events = [line["event"] for line in heard(child)]
        ending = child.ending()
    assert events == [*["phase"] * 2, *["metric", "progress"] * 3, "phase", "artifact", "artifact", "done"]
    assert (ending.how, ending.exit_code) == ("done", 0)
    assert ending.last_line["report"]["student"] == {"accuracy": 0.5}
    assert ending.log_tail == ["the fake engine starts"]
    none_left(child.session.pid)


@pytest.fixture
def many_files() -> Iterator[None]:
    """Open already, so that every further descriptor has a number above 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    with ExitStack() as stack:
        for _ in range(1024):
            stack.enter_context(Path(os.devnull).open())
        yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_a_good_run_of_a_worker_with_many_open_files(tmp_path: Path):
    with started(tmp_path, steps=3) as child:
        assert heard(child)[-1]["event"] == "done"
        assert child.ending().how == "done"


@pytest.mark.parametrize(
    ("misbehaviour", "how", "words"),
    [
        ("segfault", "crashed", "SIGSEGV"),
        ("kill_itself", "killed", "SIGKILL"),
        ("vanish", "vanished", "exit code 0"),
        ("exit_three", "crashed", "exit code 3"),
        ("out_of_memory", "out_of_memory", "memory"),
        ("diverge", "error", "what is wrong"),
    ],
)
def test_each_bad_end_has_its_name(tmp_path: Path, misbehaviour: str, how: str, words: str):
    with started(tmp_path, at={"2": misbehaviour}) as child:
        heard(child)
        ending = child.ending()
    assert ending.how == how
    assert words in ending.message
    none_left(child.session.pid)


def test_what_is_no_line_is_log(tmp_path: Path):
    with started(tmp_path, steps=3, at={"2": "garbage"}) as child:
        heard(child)
        assert child.ending().log_tail == ["the fake engine starts", "not json", "[1, 2]", '{"no": "event"}']


def test_a_grandchild_does_not_outlive_the_engine(tmp_path: Path):
    """It holds the pipe open and hears no SIGTERM."""
    with started(tmp_path, steps=3, at={"2": "grandchild"}) as child:
        heard(child)
        assert child.ending().how == "done"
        none_left(child.session.pid)
    assert (tmp_path / "out" / "grandchild").exists()


def test_asked_to_stop_it_leaves_a_checkpoint(tmp_path: Path):
    with started(tmp_path, steps=100_000, checkpoint_every=100_000) as child:
        until(lambda: any(line["event"] == "metric" for line in child.lines(0.1)[0]), "the first step")
        child.session.ask_to_stop()
        lines = heard(child)
        assert lines[-1]["event"] == "checkpoint"
        assert child.ending().how == "stopped"


def test_leaving_the_block_kills_a_deaf_child(tmp_path: Path):
    with started(tmp_path, at={"2": "deaf"}) as child:
        until(lambda: len(in_session(child.session.pid)) == 2, "guard and engine")
        child.session.ask_to_stop()
    none_left(child.session.pid)


def test_past_its_deadline_it_is_killed(tmp_path: Path):
    with started(tmp_path, left_s=1, steps=100_000) as child:
        heard(child)
        ending = child.ending()
        assert (ending.how, ending.exit_code) == ("killed", -signal.SIGKILL)
        assert "cut off past its lease" in ending.message
        none_left(child.session.pid)


def test_ticks_keep_it_alive(tmp_path: Path):
    with started(tmp_path, left_s=1, steps=30, step_s=0.05) as child:
        child.session.tick(boottime() + 600)
        heard(child)
        assert child.ending().how == "done"


def test_a_dead_guard_does_not_leave_the_engine_behind(tmp_path: Path):
    with started(tmp_path, steps=100_000) as child:
        until(lambda: len(in_session(child.session.pid)) == 2, "guard and engine")
        os.kill(child.session.pid, signal.SIGKILL)
        heard(child)
        ending = child.ending()
        assert ending.how == "killed"
        assert ending.message == "the engine's guard was ended by SIGKILL"
        none_left(child.session.pid)
