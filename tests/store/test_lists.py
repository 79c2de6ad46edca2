"""Filters that combine, pages in any order, and what lists keep of a job."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import event, select, update

from store import jobs, lifecycle, lists, teachers
from store.database import Database
from store.jobs import JobQuery
from store.lists import NEWEST_FIRST, BadCursor, Order, facets_of, figures_of, summary_of
from store.tables import job_facets
from store.tables import jobs as job_rows
from tests.store.helpers import SHA256, running, submitted

DIGEST = "sha256:" + "a" * 64
SPEC = {
    "dataset": {"source": "flowers"},
    "teacher": {"checkpoint": "model:big"},
    "student": "convnet8",
    "method": "kd",
}
RESOLVED = {
    "dataset": {"source": f"blob:{DIGEST}"},
    "teacher": {"checkpoint": f"blob:sha256:{SHA256}", "architecture": "resnet56"},
    "student": {"architecture": "convnet8"},
    "method": {"name": "kd"},
}


def made(database: Database, **columns: Any) -> str:
    """Make a job with these columns, and return its id."""
    labels = columns.pop("labels", {})
    specs = {name: columns.pop(name) for name in ("spec", "resolved_spec") if name in columns}
    job = submitted(
        database, labels=labels, method=columns.pop("method", "kd"), name=columns.pop("name", None), **specs
    )
    if columns:
        with database.begin() as connection:
            connection.execute(update(job_rows).where(job_rows.c.id == job.id).values(**columns))
    return job.id


def found(database: Database, **query: Any) -> list[str]:
    """Return the ids of all pages, after a check that no page is longer than asked for."""
    ids: list[str] = []
    after = None
    while True:
        with database.connect() as connection:
            page, after = jobs.list_jobs(connection, "ours", JobQuery(**{"limit": 2, **query, "after": after}))
        assert len(page) <= 2
        ids += [job.id for job in page]
        if after is None:
            return ids


@pytest.fixture(params=["few", "many"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filters are rare, or all are frequent."""
    if request.param == "many":
        monkeypatch.setattr(lists, "RARE", 0)


@pytest.mark.usefixtures("both_ways")
def test_filters_combine(database: Database) -> None:
    values = itertools.product(("kd", "dkd"), ("vision", "speech"), ("failed", "cancelled"))
    by_values = {
        (method, team, status): made(database, method=method, labels={"team": team, "all": ""}, status=status)
        for method, team, status in values
    }
    for (method, team, status), id in by_values.items():
        wanted = [id]
        assert found(database, method=method, labels=[f"team:{team}", "all"], status=[status]) == wanted
    assert set(found(database, labels=["team:vision"])) == {
        id for (_, team, _), id in by_values.items() if team == "vision"
    }
    assert set(found(database, status="failed,cancelled", method="kd")) == {
        id for (method, _, _), id in by_values.items() if method == "kd"
    }
    assert found(database, labels=["team:vision", "team:speech"]) == []
    assert found(database, labels=["team:other"]) == found(database, method="fitnet") == []
    assert found(database, labels=["team:vision"], status=["queued"]) == []


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    "query", [{"labels": ["team:vision", "run:7"]}, {"status": ["queued"], "labels": ["team:vision"]}]
)
def test_filters_by_facet_are_looked_up_row_by_row_on_postgres(
    postgres_database_url: str, query: dict[str, Any]
) -> None:
    """However many rows have the facet: not by a join, for which all of them may be read."""
    database = Database(postgres_database_url)
    made(database, labels={"team": "vision", "run": "7"})
    plans = []
    with database.begin() as connection:

        @event.listens_for(connection, "before_cursor_execute")
        def explain(one: Any, cursor: Any, statement: str, parameters: Any, *rest: Any) -> None:
            if statement.startswith("SELECT jobs.id, jobs.created_at"):
                cursor.execute("EXPLAIN " + statement, parameters)
                plans.append("\n".join(line for (line,) in cursor.fetchall()))

        assert len(jobs.list_jobs(connection, "ours", JobQuery.model_validate(query))[0]) == 1
    database.dispose()
    assert plans and all("SubPlan" in one for one in plans), plans


def test_filters_by_what_the_spec_names(database: Database) -> None:
    job = made(database, spec=SPEC, resolved_spec=RESOLVED)
    made(database)
    for name in ("flowers", DIGEST, f"blob:{DIGEST}"):
        assert found(database, dataset=name) == [job]
    for name in ("big", "model:big", f"sha256:{SHA256}", "resnet56"):
        assert found(database, teacher=name) == [job]
    assert found(database, student="convnet8", dataset="flowers", teacher="big") == [job]
    assert (
        found(database, student="convnet4") == found(database, model="big") == found(database, dataset="flower") == []
    )


@pytest.mark.usefixtures("both_ways")
def test_filters_by_name_sender_and_time(database: Database) -> None:
    first = made(database, name="run 1", created_at=1000.0, created_by="key_" + "0" * 24, created_by_name="ci")
    second = made(database, name="run 20", created_at=2000.0)
    made(database, name="Run", created_at=3000.0)
    assert found(database, name="run ") == [second, first]
    assert found(database, name="run 2") == [second]
    assert found(database, name="%") == found(database, name="run_") == []
    assert found(database, sender="ci") == found(database, sender="key_" + "0" * 24) == [first]
    assert found(database, created_before="1970-01-01T00:33:20Z") == [first]
    assert found(database, created_after="1970-01-01T00:33:20Z", name="run") == [second]


def test_filters_see_one_project_only(database: Database) -> None:
    with database.begin() as connection:
        jobs.submit(connection, _of_theirs())
    assert found(database) == found(database, labels=["team"]) == found(database, method="kd") == []


def _of_theirs() -> Any:
    from tests.store.helpers import new_job

    return new_job(project="theirs", labels={"team": "x"}, spec=SPEC, resolved_spec=RESOLVED)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("column", ["accuracy", "finished_at", "name"])
def test_order_has_what_has_no_value_last(database: Database, column: str) -> None:
    given = {"name": ["b", "a", None, "a", "Z", None]}.get(column, [2.0, 1.0, None, 1.0, 0.5, None])
    ids = [made(database, **{column: value}, labels={"run": "1"}) for value in given]
    pairs = [(value, id) for value, id in zip(given, ids, strict=True) if value is not None]
    none = [id for value, id in zip(given, ids, strict=True) if value is None]
    for query in ({}, {"labels": ["run:1"]}):
        assert found(database, sort=column, **query) == [id for _, id in sorted(pairs)] + sorted(none)
        descending = [id for _, id in sorted(pairs, reverse=True)] + sorted(none, reverse=True)
        assert found(database, sort=f"-{column}", **query) == descending


def test_order_cursor_is_of_one_order() -> None:
    cursor = Order.named("-accuracy").cursor(0.1, "job_1")
    assert Order.named("-accuracy").position(cursor) == (0.1, "job_1")
    for other in ("accuracy", "-created_at"):
        with pytest.raises(BadCursor, match="sort=-accuracy"):
            Order.named(other).position(cursor)
    for broken in ("x", "!", "", cursor[:-3], NEWEST_FIRST.cursor("text", "job_1"), NEWEST_FIRST.cursor(True, "job_1")):
        with pytest.raises(BadCursor):
            NEWEST_FIRST.position(broken)
    with pytest.raises(ValidationError, match="after"):
        JobQuery(after="job_0")


def test_page_of_full_jobs_ends_after_some_bytes(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "PAGE_BYTES", 2500)
    ids = [made(database, spec={"method": "kd", "text": "x" * 1000}) for _ in range(3)]
    with database.connect() as connection:
        first, after = jobs.list_full_jobs(connection, "ours", JobQuery(limit=3))
        rest, end = jobs.list_full_jobs(connection, "ours", JobQuery(limit=3, after=after))
    assert [len(first), len(rest), end] == [2, 1, None]
    assert [job.id for job in (*first, *rest)] == ids[::-1]


def test_page_of_a_spec_that_is_too_large_has_one_job(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "PAGE_BYTES", 10)
    made(database), made(database)
    with database.connect() as connection:
        page, after = jobs.list_full_jobs(connection, "ours", JobQuery())
    assert len(page) == 1 and after is not None


def test_relabel_replaces_labels_and_keeps_other_facets(database: Database) -> None:
    job = made(database, spec=SPEC, resolved_spec=RESOLVED, labels={"team": "vision"})
    with database.begin() as connection:
        before = jobs.get(connection, job)
        changed = jobs.relabel(connection, job, {"state": "kept"}, "ours")
    assert changed.labels == {"state": "kept"} and changed.revision > before.revision
    assert found(database, labels=["team"]) == []
    assert found(database, labels=["state:kept"], teacher="big") == [job]


def test_student_of_an_awaited_job_is_a_facet(database: Database) -> None:
    teacher = running(database)
    job = made(database, resolved_spec={"teacher": {"checkpoint": f"job:{teacher.job.id}"}})
    assert found(database, teacher=f"job:{teacher.job.id}") == [job]
    with database.begin() as connection:
        teachers._write_digest(connection, job, teacher.job.id, "b" * 64)
    assert found(database, teacher="sha256:" + "b" * 64) == [job]


def test_finish_succeeded_keeps_the_figures(database: Database) -> None:
    claim = running(database)
    result = {"student": {"accuracy": 0.9, "parameters": 5, "bytes": 20}, "alone": {"accuracy": 0.8}, "gain": 0.1}
    result["proof"] = {"gap_closed": {"value": 0.5, "low": 0.2, "high": 0.8}, "no_gap": None}
    with database.begin() as connection:
        assert lifecycle.finish_succeeded(connection, claim.job.id, claim.fence, result, [])
        accuracy = select(job_rows.c.accuracy).where(job_rows.c.id == claim.job.id)
        assert connection.execute(accuracy).scalar_one() == 0.9
        job = jobs.get(connection, claim.job.id)
    assert job.figures == figures_of(result)
    assert job.figures == {
        **{"accuracy": 0.9, "parameters": 5, "bytes": 20, "gain": 0.1},
        **{"teacher_accuracy": None, "alone_accuracy": 0.8, "seconds": None},
        "gap_closed": 0.5,
    }


MEANS = {
    "gain": {"value": 0.03, "low": 0.01, "high": 0.05},
    "gap_closed": {"value": 0.3, "low": 0.1, "high": 0.5},
    "gain_on_other_images": None,
    "gap_closed_on_other_images": None,
}
ELSEWHERE = {**MEANS, "gain_on_other_images": {"value": 0.02}, "gap_closed_on_other_images": {"value": 0.2}}


@pytest.mark.parametrize(
    ("low", "over", "gap", "gain"),
    [
        (0.05, None, 0.5, 0.1),
        (0.05, MEANS, 0.3, 0.03),
        (-0.05, MEANS, 0.5, 0.1),
        (-0.05, ELSEWHERE, 0.2, 0.02),
        (0.05, {**ELSEWHERE, "gap_closed_on_other_images": None}, None, 0.02),
        (0.05, {**MEANS, "gain": None, "gap_closed": None}, 0.5, 0.1),
    ],
    ids=["one seed", "mean", "images leave it open", "seeds and images", "no gap stated", "no mean of all seeds"],
)
def test_figures_are_those_of_the_sentence(low: float, over: Any, gap: float | None, gain: float) -> None:
    """By the rule of `_ruling` in `kdcore/measure/verdict.py`. Other figures are of the delivered seed."""
    proof = {"gap_closed": {"value": 0.5}, "gain": {"value": 0.1, "low": low, "high": 0.15}, "over_seeds": over}
    figures = figures_of({"student": {"accuracy": 0.9}, "alone": {"accuracy": 0.8}, "gain": 0.1, "proof": proof})
    assert (figures["gap_closed"], figures["gain"], figures["accuracy"]) == (gap, gain, 0.9)


def test_figures_of_an_evaluation_are_those_of_its_model() -> None:
    assert figures_of({"accuracy": 0.7, "parameters": 3})["accuracy"] == 0.7


def test_list_shows_the_student_of_an_export_and_the_network_of_a_benchmark() -> None:
    assert figures_of({"job": "job_1", "measured": {"accuracy": 0.7, "parameters": 3}})["accuracy"] == 0.7
    assert summary_of({"architecture": "convnet4"}, {"architecture": "convnet4"})["model"] == "convnet4"


def test_summary_and_facets_of_long_specs_are_bounded() -> None:
    several = [{"checkpoint": f"model:{'x' * 1000}{number}"} for number in range(20)]
    shown = summary_of({"dataset": "d" * 1000}, {"teacher": several, "student": {"architecture": "s"}})
    assert [len(shown["teachers"]), len(shown["dataset"]), shown["students"]] == [lists.SHOWN_NAMES, lists.VALUE, ["s"]]
    assert max(len(value) for _, value in facets_of({"teacher": several}, {})) == lists.VALUE


def test_delete_removes_the_facets(database: Database) -> None:
    job = made(database, labels={"team": "x"}, status="failed")
    with database.begin() as connection:
        jobs.delete(connection, job)
        assert connection.execute(select(job_facets)).all() == []


@pytest.fixture(autouse=True)
def _ids_in_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give jobs of the same millisecond ids in the order in which they are made."""
    numbers = itertools.count()
    monkeypatch.setattr(jobs, "new_id", lambda prefix: f"{prefix}_{next(numbers):024d}")
    yield
