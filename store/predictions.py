"""Predictions: images that a finished job's models are asked about. A row is a question and, later, its answer.

    waiting ──claim──▶ running ──finish──▶ answered | failed
       ▲                  │
       └──── release ─────┘

They are no jobs: they are not cancelled, retried or listed, and must not wait behind trainings. A claim's lease lasts
longer than any worker takes, so that none has to be extended; one that has expired is claimed again, once. The picture
is a file of its own (`FileStore.picture_path`), which is deleted with the answer. Rows are deleted after KEEP_S.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    and_,
    bindparam,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)

from base.errors import WorkerLost
from base.references import ALONE_FILE, BLOB, STUDENT_FILE
from store import artifacts, jobs, limits, workers
from store.errors import LimitReached, NotFound
from store.records import as_record, columns, database_now, new_id
from store.tables import predictions

State = Literal["waiting", "running", "answered", "failed"]
OPEN = ("waiting", "running")
MOST_WAITING = 20
"""The predictions of a project that may wait or run at a time: each has a picture on the disk."""
RETRY_AFTER_S = 2
LEASE_S = 180.0
"""Longer than a worker takes: it ends what takes longer (`worker/predictor.py`)."""
MOST_ATTEMPTS = 2
KEEP_S = 3600.0
"""The time for which an answer can be read."""

_LOST = WorkerLost("the workers that ran it stopped responding", "send the image again").as_dict()


@dataclass(frozen=True)
class Prediction:
    """One row of `predictions`, as clients see it."""

    id: str
    project: str
    job_id: str
    state: State
    answer: dict[str, Any] | None
    """The report of `kdcore.measure.predicting`."""
    error: dict[str, Any] | None
    created_at: float
    finished_at: float | None


@dataclass(frozen=True)
class Claimed:
    """A prediction that a worker runs, with what it needs of the job."""

    id: str
    job_id: str
    project: str
    sha256: str
    """Of the picture."""
    spec: dict[str, Any]
    """The job's resolved spec."""
    dataset: dict[str, Any]
    """The facts of its data set."""
    student: str
    """The digest of its student; empty if its file is gone, which the worker then says."""
    alone: str | None


def add(connection: Connection, project: str, job_id: str, prediction_id: str, sha256: str) -> Prediction:
    """Add a question. Its picture must be stored already. Raises LimitReached if too many of the project wait."""
    limits.lock(connection, project)
    counted = select(func.count()).where(predictions.c.project == project, predictions.c.state.in_(OPEN))
    if (used := connection.execute(counted).scalar_one()) >= MOST_WAITING:
        raise LimitReached("predictions_waiting", MOST_WAITING, used, RETRY_AFTER_S)
    values = {"id": prediction_id, "project": project, "job_id": job_id, "sha256": sha256, "state": "waiting"}
    row = insert(predictions).values(**values, created_at=database_now()).returning(*_COLUMNS)
    return as_record(Prediction, connection.execute(row).one())


def get(connection: Connection, project: str, prediction_id: str) -> Prediction:
    row = connection.execute(_BY_ID, {"id": prediction_id, "project": project}).one_or_none()
    if row is None:
        raise NotFound("prediction", prediction_id)
    return as_record(Prediction, row)


def why_it_waits(connection: Connection, prediction: Prediction, lease_s: float) -> str | None:
    """Return in words why there is no answer yet; None if there is one."""
    if prediction.state not in OPEN:
        return None
    if prediction.state == "running":
        return "a worker runs the job's models on it"
    if not workers.list_consuming(connection, lease_s):
        return "no worker runs now: start one, or check why the running ones do not respond"
    count = connection.execute(select(func.count()).where(_is_open())).scalar_one()
    return "it is next" if count == 1 else f"{count} images wait or are being answered, this one among them"


def has_claimable(connection: Connection) -> bool:
    """Return whether a claim would find one. Takes no lock, so polling is cheap."""
    return connection.execute(_first_claimable()).one_or_none() is not None


def claim(connection: Connection, owner: str) -> Claimed | None:
    """Claim the oldest one that waits, or whose lease has expired. Projects take turns, so that none waits behind all
    images of another."""
    first = _first_claimable().with_for_update(skip_locked=True, of=predictions).scalar_subquery()
    changed = (
        update(predictions)
        .where(predictions.c.id == first)
        .values(
            state="running",
            owner=owner,
            lease_until=database_now() + LEASE_S,
            attempts=predictions.c.attempts + 1,
        )
        .returning(predictions.c.id, predictions.c.job_id, predictions.c.project, predictions.c.sha256)
    )
    row = connection.execute(changed).one_or_none()
    if row is None:
        return None
    job = jobs.get(connection, row.job_id)
    files = {one.name: one.sha256 for one in artifacts.list_artifacts(connection, row.job_id)}
    # The baseline of another job is a blob in the resolved spec.
    baseline = str(job.resolved_spec.get("baseline") or "")
    alone = files.get(ALONE_FILE) or (baseline.removeprefix(BLOB) if baseline.startswith(BLOB) else None)
    return Claimed(
        **row._mapping,
        spec=job.resolved_spec,
        dataset=(job.result or {}).get("dataset") or {},
        student=files.get(STUDENT_FILE, ""),
        alone=alone,
    )


def finish(
    connection: Connection,
    prediction_id: str,
    owner: str,
    *,
    answer: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
) -> bool:
    """Write the answer, or the error. Returns False if another worker has it, or it was deleted with its job."""
    ended = {"state": "failed" if answer is None else "answered", "answer": answer, "error": error}
    return _change(connection, prediction_id, owner, **ended, finished_at=database_now())


def release(connection: Connection, prediction_id: str, owner: str) -> bool:
    """Let another worker run it: this one stops. It costs no attempt."""
    return _change(connection, prediction_id, owner, state="waiting", attempts=predictions.c.attempts - 1)


def expire(connection: Connection) -> Sequence[str]:
    """End those that no worker will end, and delete old rows. Returns the ids of all these: no picture is needed."""
    lost = and_(_is_open(), _lease_expired(), predictions.c.attempts >= MOST_ATTEMPTS)
    ended = {"state": "failed", "error": _LOST, "owner": None, "lease_until": None, "finished_at": database_now()}
    failed = connection.scalars(update(predictions).where(lost).values(**ended).returning(predictions.c.id)).all()
    old = predictions.c.created_at < database_now() - KEEP_S
    gone = connection.scalars(delete(predictions).where(old).returning(predictions.c.id)).all()
    return [*failed, *gone]


def known(connection: Connection, ids: Sequence[str]) -> set[str]:
    """Return those of these ids that have a row."""
    return set(connection.scalars(select(predictions.c.id).where(predictions.c.id.in_(ids))))


def make_id() -> str:
    return new_id("pred")


def _change(connection: Connection, prediction_id: str, owner: str, **values: Any) -> bool:
    mine = and_(predictions.c.id == prediction_id, predictions.c.owner == owner, predictions.c.state == "running")
    changed = update(predictions).where(mine).values(owner=None, lease_until=None, **values).returning(literal(1))
    return connection.execute(changed).one_or_none() is not None


def _first_claimable() -> Any:
    waits = predictions.c.state == "waiting"
    may = or_(waits, and_(_lease_expired(), predictions.c.attempts < MOST_ATTEMPTS))
    other = predictions.alias("other")
    earlier = select(func.count()).where(
        other.c.project == predictions.c.project, _is_open(other), other.c.created_at < predictions.c.created_at
    )
    order = earlier.scalar_subquery(), predictions.c.created_at, predictions.c.id
    return select(predictions.c.id).where(_is_open(), may).order_by(*order).limit(1)


def _is_open(rows: FromClause = predictions) -> ColumnElement[bool]:
    """The condition of the partial index, as text: SQLite uses the index only if it finds the same words."""
    return rows.c.state.in_(bindparam("open", OPEN, expanding=True, literal_execute=True))


def _lease_expired() -> ColumnElement[bool]:
    return and_(predictions.c.state == "running", predictions.c.lease_until < database_now())


_COLUMNS = columns(predictions, Prediction)
_BY_ID = select(*_COLUMNS).where(predictions.c.id == bindparam("id"), predictions.c.project == bindparam("project"))
