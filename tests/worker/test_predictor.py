"""Predictions on a worker: an engine of their own, its bounds, and what is left after it."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from store import lifecycle, predictions
from store.artifacts import NewArtifact
from store.predictions import Prediction
from tests.worker.job_database import JobDatabase
from tests.worker.processes import until
from worker import engine, predictor
from worker.context import Options, WorkerContext
from worker.engine import Ending
from worker.predictor import MEMORY_BYTES, Predictor, error_of, memory_bytes
from worker.worker import Worker

PICTURE = b"the bytes of a picture"


@pytest.fixture
def job(db: JobDatabase) -> Callable[..., str]:
    """A job that has succeeded. Its engine will do in a prediction what `fake` says."""

    def make(teacher: Any = None, **fake: Any) -> str:
        job_id = db.submit(resolved={"teacher": teacher}, **{"steps": 1, "step_s": 0, **fake})
        student = db.files.put_stream([b"weights"])
        with db.database.begin() as connection:
            claim = lifecycle.claim(connection, "trainer", 30, takeover=False)
            assert claim is not None
            made = [NewArtifact("student.safetensors", student.sha256, student.bytes, "application/octet-stream")]
            lifecycle.finish_succeeded(connection, job_id, claim.fence, {"dataset": {}}, made)
        return job_id

    return make


def ask(db: JobDatabase, job_id: str, content: bytes | None = PICTURE) -> Prediction:
    prediction_id = predictions.make_id()
    if content is not None:
        path = db.files.picture_path(prediction_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with db.database.begin() as connection:
        return predictions.add(connection, "p", job_id, prediction_id, hashlib.sha256(PICTURE).hexdigest())


def read(db: JobDatabase, asked: Prediction) -> Prediction:
    with db.database.connect() as connection:
        return predictions.get(connection, "p", asked.id)


def work(context: WorkerContext) -> Predictor:
    """Let a predictor do one prediction in this thread."""
    one = Predictor(context)
    assert one.work()
    one._engines.close()
    assert not list((context.settings.home / "predictions").glob("*"))
    return one


def test_predictor_answers_beside_a_busy_slot(
    db: JobDatabase, job: Callable[..., str], start_worker: Callable[..., Worker]
):
    asked = ask(db, job(report={"seconds": 1}))
    worker = start_worker()
    long = db.submit(steps=100_000)
    db.until(long, "running")
    until(lambda: read(db, asked).state == "answered", "the answer")
    found = read(db, asked)
    assert found.answer is not None and found.answer["seconds"] == 1 and found.error is None
    assert not db.files.picture_path(asked.id).exists()
    assert db.job(long).status == "running"
    worker.drain()
    assert worker._predictor is not None and worker._predictor.join(10)


def test_a_worker_can_be_told_to_answer_none(settings: Any):
    worker = Worker(settings, Options(predictions=False), listens=False)
    assert worker._predictor is None
    worker.context.close()


def test_work_gives_the_engine_its_inputs_and_no_more(
    context: WorkerContext, db: JobDatabase, job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    teacher = db.files.put_stream([b"the teacher"]).sha256
    orders = []
    send_order = engine.send_order
    monkeypatch.setattr(engine, "send_order", lambda channel, order, **more: orders.append(order) or send_order(channel, order, **more))  # fmt: skip  # noqa: E501
    asked = ask(db, job(teacher={"checkpoint": f"blob:sha256:{teacher}"}))
    work(context)
    assert read(db, asked).state == "answered"
    (order,) = orders
    inputs = [given for name, given in zip(order.arguments, order.arguments[1:], strict=False) if name == "--input"]
    student = hashlib.sha256(b"weights").hexdigest()
    assert sorted(inputs) == sorted(f"blob:sha256:{one}={db.files.path(one)}" for one in (teacher, student))
    assert "--cache" in order.arguments and "--resume" not in order.arguments


def test_work_has_nothing_to_do_without_a_question(context: WorkerContext):
    assert not Predictor(context).work()


@pytest.mark.parametrize(
    ("how", "code", "retryable"),
    [
        ("no_image", "dataset_unreadable", False),
        ("segfault", "internal", True),
        ("vanish", "internal", True),
        ("out_of_memory", "out_of_memory", True),
    ],
)
def test_work_says_how_an_engine_has_ended(
    context: WorkerContext, db: JobDatabase, job: Callable[..., str], how: str, code: str, retryable: bool
):
    asked = ask(db, job(steps=2, at={"1": how}))
    work(context)
    found = read(db, asked)
    assert found.state == "failed" and found.error is not None
    assert (found.error["code"], found.error["retryable"]) == (code, retryable)
    assert not db.files.picture_path(asked.id).exists()


def test_work_ends_an_engine_that_takes_too_much_memory(
    context: WorkerContext, db: JobDatabase, job: Callable[..., str]
):
    one = Predictor(context)
    one._most_bytes = 200_000_000
    asked = ask(db, job(steps=2, at={"1": "swell"}))
    assert one.work()
    error = read(db, asked).error
    assert error is not None and (error["code"], error["retryable"]) == ("out_of_memory", False)


def test_work_ends_an_engine_that_takes_too_long(
    context: WorkerContext, db: JobDatabase, job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(predictor, "LIMIT_S", 0.3)
    asked = ask(db, job(steps=2, at={"1": "deaf"}))
    work(context)
    error = read(db, asked).error
    assert error is not None and error["code"] == "deadline_exceeded"


@pytest.mark.parametrize("content", [None, b"other bytes"])
def test_work_refuses_a_picture_that_is_gone_or_another(
    context: WorkerContext, db: JobDatabase, job: Callable[..., str], content: bytes | None
):
    asked = ask(db, job(), content)
    work(context)
    error = read(db, asked).error
    assert error is not None and error["message"] == "the image is gone or damaged"


def test_work_ends_a_prediction_after_any_fault_of_the_worker(
    context: WorkerContext, db: JobDatabase, job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    """Else it would be claimed again and again, before all others."""
    asked = ask(db, job())
    monkeypatch.setattr(Predictor, "_prepare", lambda *_: {}["nothing"])
    work(context)
    error = read(db, asked).error
    assert error is not None and error["message"] == "the worker failed: KeyError: 'nothing'"


def test_a_drained_worker_leaves_the_question_to_others(
    context: WorkerContext, db: JobDatabase, job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    asked = ask(db, job(steps=2, at={"1": "deaf"}))
    lines = engine.EngineRun.lines

    def and_drain(run: engine.EngineRun, timeout_s: float) -> Any:
        context.drain.request()
        return lines(run, timeout_s)

    monkeypatch.setattr(engine.EngineRun, "lines", and_drain)
    work(context)
    assert read(db, asked).state == "waiting"
    assert db.files.picture_path(asked.id).exists()


def test_an_engine_is_kept_ready_for_a_while_after_an_image(
    context: WorkerContext, db: JobDatabase, job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    one = Predictor(context)
    one._keep_or_end_engine()
    assert one._engines._ready is None
    ask(db, job())
    assert one.work()
    one._keep_or_end_engine()
    assert one._engines._ready is not None
    now = predictor.boottime()
    monkeypatch.setattr(predictor, "boottime", lambda: now + predictor.KEEP_S + 60)
    one._keep_or_end_engine()
    assert one._engines._ready is None


def test_tidy_deletes_pictures_that_nobody_waits_for(
    context: WorkerContext, db: JobDatabase, job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    """Of an API process that ended before it wrote the row, and of a job that was deleted."""
    asked = ask(db, job())
    young, old = (db.files.picture_path(name) for name in ("pred_young", "pred_old"))
    for path in (young, old):
        path.write_bytes(PICTURE)
    ages = []

    def pictures(files: Any, older_than_s: float) -> list[Any]:
        ages.append(older_than_s)
        return [old, files.picture_path(asked.id)]

    monkeypatch.setattr(type(context.files), "pictures", pictures)
    Predictor(context)._tidy()
    # Longer than a picture takes to arrive, since its row comes after it.
    assert 60 < ages[0] <= 600
    assert young.exists() and not old.exists() and db.files.picture_path(asked.id).exists()


def test_pictures_are_listed_by_their_age(context: WorkerContext):
    path = context.files.picture_path("pred_1")
    path.parent.mkdir(parents=True)
    path.write_bytes(PICTURE)
    assert context.files.pictures(older_than_s=3600) == []
    assert context.files.pictures(older_than_s=0) == [path]


def test_memory_bytes_is_a_tenth_of_the_host_within_bounds():
    least, most = MEMORY_BYTES
    assert memory_bytes(None, None) == memory_bytes(None, 10**12) == most
    assert memory_bytes(None, 10**9) == least
    assert memory_bytes(None, 20 * 10**9) == 2 * 10**9
    assert memory_bytes(500_000_000, 10**12) == 500_000_000


def test_error_of_an_engine_that_the_host_has_killed():
    ending = Ending("killed", "the engine was ended by SIGKILL", 137, None, [])
    assert error_of(ending)["code"] == "internal" and "SIGKILL" in error_of(ending)["message"]
    assert error_of(replace(ending, how="out_of_memory"))["retryable"]
    assert not error_of(replace(ending, how="over_memory"))["retryable"]
