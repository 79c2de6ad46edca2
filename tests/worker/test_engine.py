"""An engine's process from start to end, and the pool that keeps one ready."""

import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from base.clock import boottime
from kdcore.protocol import Order
from store.settings import Settings
from tests.worker.conftest import CPU
from tests.worker.job_database import OPTIONS, JobDatabase, waiting_engines, worker_process
from tests.worker.processes import FAKE_ENGINE, in_session, none_left, until
from worker import engine as engine_module
from worker.context import WorkerContext
from worker.engine import EnginePool, EngineProcess, EngineRun, Line, MemoryWatch
from worker.worker import Worker


@contextmanager
def running(tmp_path: Path, left_s: float = 600, most_bytes: int | None = None, **fake: Any) -> Iterator[EngineRun]:
    order = order_for(tmp_path, **fake)
    with (
        EngineProcess(FAKE_ENGINE, deadline=boottime() + left_s, environment=os.environ) as process,
        (tmp_path / "lock").open("w") as lock,
        EngineRun(process, order, log_path=tmp_path / "log", lock=lock.fileno(), most_bytes=most_bytes) as run,
    ):
        yield run


def order_for(folder: Path, **fake: Any) -> Order:
    spec, out = folder / "spec.json", folder / "out"
    spec.write_text(json.dumps({"fake": fake}))
    out.mkdir()
    return Order([str(spec), "--out", str(out)], str(folder), {"TMPDIR": str(folder)})


def all_lines(run: EngineRun) -> list[Line]:
    lines, more = [], True
    while more:
        batch, more = run.lines(timeout_s=0.1)
        lines += batch
    return lines


def test_engine_run_to_the_end(tmp_path: Path):
    with running(tmp_path, steps=3) as run:
        events = [line["event"] for line in all_lines(run)]
        ending = run.ending()
    assert events == [*["phase"] * 2, *["metric", "progress"] * 3, "phase", "artifact", "artifact", "done"]
    assert (ending.how, ending.exit_code) == ("done", 0)
    assert ending.last_line["report"]["student"] == {"accuracy": 0.5}
    assert ending.log_tail == ["the fake engine starts"]
    none_left(run.process.pid)


def test_engine_run_that_takes_too_much_memory_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_module, "LOOK_S", 0.05)
    monkeypatch.setattr(engine_module, "LIST_S", 0.05)
    with running(tmp_path, most_bytes=200_000_000, at={"2": "swell"}) as run:
        all_lines(run)
        ending = run.ending()
    assert ending.how == "over_memory"
    assert re.fullmatch(r"the engine took 0\.[23] GB of memory; it may take 0\.2 GB here \(DISTIL.*\)", ending.message)
    none_left(run.process.pid)


def test_engine_run_below_its_bound_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_module, "LOOK_S", 0.0)
    with running(tmp_path, most_bytes=1 << 40, steps=2) as run:
        all_lines(run)
        assert run.ending().how == "done"


def test_memory_watch_looks_no_more_often_than_it_should(monkeypatch: pytest.MonkeyPatch):
    looks = []
    monkeypatch.setattr(engine_module, "session_of", lambda session: [session])
    monkeypatch.setattr(engine_module, "taken_bytes", lambda process: looks.append(process) or 5)
    watch = MemoryWatch(17, most_bytes=5)
    assert [watch.is_over() for _ in range(100)] == [False] * 100 and looks == [17]
    assert not MemoryWatch(17, most_bytes=None).is_over() and looks == [17]
    assert MemoryWatch(17, most_bytes=4).is_over()


@pytest.fixture
def many_files() -> Iterator[None]:
    """1024 open files, so that every further descriptor has a number above 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    with ExitStack() as stack:
        for _ in range(1024):
            stack.enter_context(Path(os.devnull).open())
        yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_engine_run_of_a_worker_with_many_open_files(tmp_path: Path):
    with running(tmp_path, steps=3) as run:
        assert all_lines(run)[-1]["event"] == "done"
        assert run.ending().how == "done"


@pytest.mark.parametrize(
    ("misbehaviour", "how", "words"),
    [
        ("segfault", "crashed", "SIGSEGV"),
        ("kill_itself", "killed", "SIGKILL"),
        ("vanish", "vanished", "exit code 0"),
        ("exit_three", "crashed", "exit code 3"),
        ("out_of_memory", "out_of_memory", "memory"),
        ("diverge", "error", "reported an error"),
    ],
)
def test_engine_run_names_each_bad_ending(tmp_path: Path, misbehaviour: str, how: str, words: str):
    with running(tmp_path, at={"2": misbehaviour}) as run:
        all_lines(run)
        ending = run.ending()
    assert ending.how == how
    assert words in ending.message
    none_left(run.process.pid)


def test_engine_run_logs_text_that_is_not_a_line(tmp_path: Path):
    with running(tmp_path, steps=3, at={"2": "garbage"}) as run:
        all_lines(run)
        assert run.ending().log_tail == ["the fake engine starts", "not json", "[1, 2]", '{"no": "event"}']


def test_engine_run_ends_a_grandchild_of_the_engine(tmp_path: Path):
    """The grandchild keeps the pipe open and ignores SIGTERM."""
    with running(tmp_path, steps=3, at={"2": "grandchild"}) as run:
        all_lines(run)
        assert run.ending().how == "done"
        none_left(run.process.pid)
    assert (tmp_path / "out" / "grandchild").exists()


def test_request_stop_leaves_a_checkpoint(tmp_path: Path):
    with running(tmp_path, steps=100_000, checkpoint_every=100_000) as run:
        until(lambda: any(line["event"] == "metric" for line in run.lines(0.1)[0]), "the first step")
        run.process.request_stop()
        lines = all_lines(run)
        assert lines[-1]["event"] == "checkpoint"
        assert run.ending().how == "stopped"


def test_engine_process_kills_a_deaf_engine_at_the_end_of_its_block(tmp_path: Path):
    with running(tmp_path, at={"2": "deaf"}) as run:
        until(lambda: len(in_session(run.process.pid)) == 2, "guard and engine")
        run.process.request_stop()
    none_left(run.process.pid)


def test_engine_process_is_killed_at_its_deadline(tmp_path: Path):
    with running(tmp_path, left_s=1, steps=100_000) as run:
        all_lines(run)
        ending = run.ending()
        assert (ending.how, ending.exit_code) == ("killed", -signal.SIGKILL)
        assert "lease was not extended" in ending.message
        none_left(run.process.pid)


def test_extend_keeps_an_engine_process_alive(tmp_path: Path):
    with running(tmp_path, left_s=1, steps=30, step_s=0.05) as run:
        run.process.extend(boottime() + 600)
        all_lines(run)
        assert run.ending().how == "done"


def test_engine_run_ends_an_engine_whose_guard_is_killed(tmp_path: Path):
    with running(tmp_path, steps=100_000) as run:
        until(lambda: len(in_session(run.process.pid)) == 2, "guard and engine")
        os.kill(run.process.pid, signal.SIGKILL)
        all_lines(run)
        ending = run.ending()
        assert ending.how == "killed"
        assert ending.message == "the engine's guard was ended by SIGKILL"
        none_left(run.process.pid)


NO_ENGINE = OPTIONS.model_copy(update={"engine": ("/no/such/program",)})


@pytest.fixture
def engines(context: WorkerContext) -> Iterator[EnginePool]:
    engines = EnginePool(context, CPU)
    yield engines
    engines.close()


def waiting_pair(home: Path) -> tuple[int, int]:
    """The guard and the engine that waits for an order."""
    pair = until(lambda: len(found := waiting_engines(home)) == 2 and found, "an engine to wait")
    guard, engine = sorted(pair)
    return guard, engine


def test_engine_pool_keeps_one_engine_until_it_is_closed(engines: EnginePool, settings: Settings):
    engines.refill()
    pair = waiting_pair(settings.home)
    engines.refill()
    assert waiting_pair(settings.home) == pair, "the same engine, and no second one"
    engines.close()
    until(lambda: not waiting_engines(settings.home), "guard and engine to end")


def test_engine_pool_take_returns_each_engine_once(engines: EnginePool):
    engines.refill()
    with engines.take() as process:
        engines.refill()
        with engines.take() as other:
            assert other.pid != process.pid
    assert engines.take() is None


def test_engine_pool_refill_replaces_a_dead_engine(engines: EnginePool, settings: Settings):
    engines.refill()
    _, engine = waiting_pair(settings.home)
    os.kill(engine, signal.SIGKILL)
    until(engines._ready.has_ended, "its guard to end")
    engines.refill()
    assert engine not in waiting_pair(settings.home)
    os.kill(waiting_pair(settings.home)[1], signal.SIGKILL)
    until(engines._ready.has_ended, "the guard of the other one to end")
    assert engines.take() is None


def test_engine_pool_engine_is_ended_by_its_guard_if_it_is_not_extended(
    engines: EnginePool, context: WorkerContext, settings: Settings
):
    with engines.start(boottime() + 0.5) as process:
        none_left(process.pid)
    engines.refill()
    guard, _ = waiting_pair(settings.home)
    assert len(in_session(guard)) == 2


def test_engine_pool_of_a_killed_worker_leaves_no_engine(settings: Settings, tmp_path: Path):
    with worker_process(settings, tmp_path / "log") as worker:
        waiting_pair(settings.home)
        worker.kill()
        until(lambda: not waiting_engines(settings.home), "guard and engine to end")


def test_engine_pool_refill_starts_none_without_the_option_warm(context: WorkerContext, settings: Settings):
    context.options = context.options.model_copy(update={"warm": False})
    engines = EnginePool(context, CPU)
    engines.refill()
    assert engines.take() is None


def test_engine_pool_refill_starts_none_in_a_draining_worker(engines: EnginePool, context: WorkerContext):
    context.drain.request()
    engines.refill()
    assert engines.take() is None


def test_engine_pool_refill_survives_a_program_that_cannot_be_started(
    context: WorkerContext, caplog: pytest.LogCaptureFixture
):
    context.options = NO_ENGINE
    engines = EnginePool(context, CPU)
    engines.refill()
    with engines.take() or pytest.fail("no guard was running") as process:
        until(process.has_ended, "the guard to find no program")
        assert b"/no/such/program" in process.early_output()


def test_engine_pool_engine_uses_no_processor_time_while_it_waits(engines: EnginePool, settings: Settings):
    engines.refill()
    _, engine = waiting_pair(settings.home)
    until(lambda: engines.is_ready, "the engine to have imported all")
    time.sleep(0.05)  # it begins to wait just after it has reported ready
    before = _cpu_ticks(engine)
    time.sleep(0.3)
    assert _cpu_ticks(engine) == before


def test_engine_pool_engine_that_froze_while_it_waited_costs_its_job_nothing(
    settings: Settings, db: JobDatabase, start_worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
):
    """It does not accept the order; another one is running, in the same attempt."""
    monkeypatch.setattr(engine_module, "BEGINS_IN_S", 0.3)
    worker = start_worker()
    until(lambda: worker.slots[0].engines.is_ready, "an engine to have imported all")
    _, engine = waiting_pair(settings.home)
    os.kill(engine, signal.SIGSTOP)
    job_id = db.submit(steps=5)
    db.assert_trained(job_id, 5)
    assert [attempt.how for attempt in db.attempts(job_id)] == ["succeeded"]
    assert engine not in waiting_engines(settings.home)


def test_engine_that_cannot_start_is_the_error_of_its_job(settings: Settings, db: JobDatabase):
    job_id = db.submit(max_attempts=1)
    worker = Worker(settings, NO_ENGINE, listens=False, devices=[CPU])
    try:
        worker.start()
        job = db.until(job_id, "failed")
    finally:
        worker.stop()
    assert "/no/such/program" in job.error["message"]


def _cpu_ticks(process: int) -> int:
    _, _, rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")
    return sum(int(field) for field in rest.split()[11:13])


def test_silence_is_counted_between_lines_and_without_pauses_of_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clock = SimpleNamespace(now=boottime())
    with running(tmp_path, steps=1, at={"1": "wait"}, gate=str(tmp_path / "gate")) as run:
        until(lambda: [one for one in run.lines(0.05)[0] if one["event"] == "progress"], "the first step")
        monkeypatch.setattr(engine_module, "boottime", lambda: clock.now)
        run._polled_at = clock.now
        for passed_s, expected in ((0.5, 0.5), (0.5, 1.0), (3600, 1.0 + engine_module.LONGEST_PAUSE_S)):
            clock.now += passed_s
            run.lines(0)
            assert run.silent_s == pytest.approx(expected)
        (tmp_path / "gate").touch()
        assert all_lines(run)[-1]["event"] == "done"
        assert run.silent_s <= engine_module.LONGEST_PAUSE_S
