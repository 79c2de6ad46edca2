"""The engine that is kept ready: there when it is wanted, replaced when it is not, and never a job's misfortune."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from base.clock import boottime
from store.settings import Settings
from tests.worker.conftest import CPU
from tests.worker.processes import in_session, none_left, until
from tests.worker.table import OPTIONS, Table, waiting_engines, worker_process
from worker import child
from worker.desk import Desk
from worker.engines import Engines
from worker.service import Worker

NO_ENGINE = OPTIONS.model_copy(update={"engine": ("/no/such/program",)})


@pytest.fixture
def desk(settings: Settings) -> Iterator[Desk]:
    desk = Desk(settings, OPTIONS, ring=lambda: None)
    yield desk
    desk.close()


@pytest.fixture
def engines(desk: Desk) -> Iterator[Engines]:
    engines = Engines(desk, CPU)
    yield engines
    engines.let_go()


def one_waits(home: Path) -> tuple[int, int]:
    """Its guard and itself, once it has blocked for its order."""
    pair = until(lambda: len(found := waiting_engines(home)) == 2 and found, "an engine to wait")
    guard, engine = sorted(pair)
    return guard, engine


def test_one_waits_until_it_is_let_go(engines: Engines, settings: Settings):
    engines.keep_one()
    pair = one_waits(settings.home)
    engines.keep_one()
    assert one_waits(settings.home) == pair, "kept, and no second one"
    engines.let_go()
    assert not waiting_engines(settings.home)


def test_it_is_used_once(engines: Engines):
    engines.keep_one()
    with engines.take() as session:
        engines.keep_one()
        with engines.take() as other:
            assert other.pid != session.pid
    assert engines.take() is None


def test_a_dead_one_is_replaced(engines: Engines, settings: Settings):
    engines.keep_one()
    _, engine = one_waits(settings.home)
    os.kill(engine, signal.SIGKILL)
    until(lambda: not waiting_engines(settings.home), "its guard to leave with it")
    engines.keep_one()
    assert engine not in one_waits(settings.home)
    os.kill(one_waits(settings.home)[1], signal.SIGKILL)
    until(lambda: not waiting_engines(settings.home), "the other's guard too")
    assert engines.take() is None


def test_without_ticks_its_guard_ends_it(engines: Engines, desk: Desk, settings: Settings):
    with engines.start(boottime() + 0.5) as session:
        none_left(session.pid)
    engines.keep_one()
    guard, _ = one_waits(settings.home)
    assert len(in_session(guard)) == 2


def test_a_killed_worker_leaves_none_that_waits(settings: Settings, tmp_path: Path):
    with worker_process(settings, tmp_path / "log") as worker:
        one_waits(settings.home)
        worker.kill()
        until(lambda: not waiting_engines(settings.home), "guard and engine to end")


def test_none_is_kept_where_none_is_wanted(desk: Desk, settings: Settings):
    desk.options = desk.options.model_copy(update={"warm": False})
    engines = Engines(desk, CPU)
    engines.keep_one()
    assert engines.take() is None


def test_a_leaving_worker_starts_none(engines: Engines, desk: Desk):
    desk.drain.ask()
    engines.keep_one()
    assert engines.take() is None


def test_one_that_cannot_be_started_is_no_reason_to_stop(desk: Desk, caplog: pytest.LogCaptureFixture):
    desk.options = NO_ENGINE
    engines = Engines(desk, CPU)
    engines.keep_one()
    with engines.take() or pytest.fail("its guard was started") as session:
        until(session.has_ended, "its guard to find no program")
        assert b"/no/such/program" in session.printed()


def test_waiting_costs_no_time_of_a_processor(engines: Engines, settings: Settings):
    engines.keep_one()
    _, engine = one_waits(settings.home)
    until(lambda: engines.is_ready, "the engine to have imported all")
    time.sleep(0.05)  # for it to go from its word to its wait
    before = _cpu_ticks(engine)
    time.sleep(0.3)
    assert _cpu_ticks(engine) == before


def test_an_engine_that_froze_while_it_waited_costs_its_job_nothing(
    settings: Settings, table: Table, start_worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
):
    """It takes no order; another one is started, in the same attempt."""
    monkeypatch.setattr(child, "ANSWERS_IN_S", 0.3)
    worker = start_worker()
    until(lambda: worker.slots[0].engines.is_ready, "an engine to have imported all")
    _, engine = one_waits(settings.home)
    os.kill(engine, signal.SIGSTOP)
    job_id = table.submit(steps=5)
    table.assert_trained(job_id, 5)
    assert [attempt.how for attempt in table.attempts(job_id)] == ["succeeded"]
    assert engine not in waiting_engines(settings.home)


def test_an_engine_that_cannot_start_is_the_jobs_error(settings: Settings, table: Table):
    job_id = table.submit(max_attempts=1)
    worker = Worker(settings, NO_ENGINE, listens=False, devices=[CPU])
    try:
        worker.start()
        job = table.until(job_id, "failed")
    finally:
        worker.stop()
    assert "/no/such/program" in job.error["message"]


def _cpu_ticks(process: int) -> int:
    _, _, rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")
    return sum(int(field) for field in rest.split()[11:13])
