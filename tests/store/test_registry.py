from typing import Any

import pytest
from sqlalchemy import Connection, update
from sqlalchemy.exc import IntegrityError

from store import registry as store_registry
from store.database import Database
from store.errors import NameTaken, NotFound
from store.lists import NEWEST_FIRST
from store.registry import Entry, EntryQuery, NewEntry, Registry, datasets, get_inspection, models, put_inspection
from tests.store.helpers import SHA256, run_concurrently

LEASE_S = 30.0
LOST = {"code": "unusable", "message": "the server ended", "hint": None, "errors": []}
ERROR = {**LOST, "message": "not a picture"}


@pytest.fixture(params=[models, datasets], ids=["models", "datasets"])
def registry(request: pytest.FixtureRequest) -> Registry:
    return request.param


def begun(connection: Connection, registry: Registry, project: str = "ours", name: str = "resnet56") -> Entry:
    return registry.register(connection, NewEntry(project, name, SHA256, {"name": name}, {}), "server 1", LEASE_S)


def expire(connection: Connection, registry: Registry) -> None:
    connection.execute(update(registry.table).where(registry.table.c.state == "inspecting").values(lease_until=1.0))


def claim(connection: Connection, registry: Registry, owner: str = "server 2") -> list[Entry]:
    return registry.claim_expired(connection, owner, LEASE_S, 10, 3, LOST)


def test_get_finds_an_entry_by_name_or_id_in_its_project_only(database: Database, registry: Registry):
    with database.begin() as connection:
        entry = begun(connection, registry)
        assert entry.id.startswith(("mdl_", "ds_"))
        assert (entry.sha256, entry.state, entry.facts, entry.attempts) == (SHA256, "inspecting", None, 1)
        assert registry.get(connection, "ours", "resnet56") == registry.get(connection, "ours", entry.id) == entry
        with pytest.raises(NotFound, match="'resnet56'"):
            registry.get(connection, "theirs", "resnet56")


def test_get_and_delete_take_an_id_before_a_name(database: Database, registry: Registry):
    """Earlier versions accepted a name that is the id of another entry."""
    with database.begin() as connection:
        entry = begun(connection, registry)
        trap = begun(connection, registry, name=entry.id)
        elsewhere = begun(connection, registry, "theirs", name=entry.id)
        assert registry.get(connection, "ours", entry.id) == entry
        assert registry.get(connection, "ours", trap.id) == trap
        assert registry.get(connection, "theirs", entry.id) == elsewhere
        assert registry.delete(connection, "ours", entry.id) == entry.id
        assert registry.get(connection, "ours", entry.id) == trap
        assert registry.delete(connection, "ours", entry.id) == trap.id
        assert registry.get(connection, "theirs", entry.id) == elsewhere


def test_register_takes_a_name_once_in_a_project(database: Database, registry: Registry):
    with database.begin() as connection:
        entry = begun(connection, registry)
        begun(connection, registry, "theirs")
        for _ in ("inspecting", "ready"):
            with pytest.raises(NameTaken, match=r"there is already a .* named 'resnet56'"):
                begun(connection, registry)
            registry.finish(connection, entry, "server 1", {"facts": {}})


def test_register_concurrently_adds_one_entry(database: Database, registry: Registry):
    def register() -> object:
        with database.begin() as connection:
            return begun(connection, registry)

    assert sorted(type(result).__name__ for result in run_concurrently([register] * 5))[1:] == ["NameTaken"] * 4


def test_register_replaces_a_refused_entry(database: Database, registry: Registry):
    with database.begin() as connection:
        refused = registry.refuse(connection, begun(connection, registry), "server 1", ERROR)
        assert refused is not None and (refused.state, refused.error) == ("refused", ERROR)
        entry = begun(connection, registry)
        assert registry.get(connection, "ours", "resnet56") == entry != refused


def test_finish_makes_an_entry_ready_for_its_owner_only(database: Database, registry: Registry):
    with database.begin() as connection:
        entry = begun(connection, registry)
        assert registry.finish(connection, entry, "server 2", {"facts": {}}) is None
        ready = registry.finish(connection, entry, "server 1", {"facts": {"num_classes": 100}, "warnings": []})
        assert ready is not None
        assert (ready.state, ready.facts, ready.progress) == ("ready", {"num_classes": 100}, None)
        assert registry.finish(connection, entry, "server 1", {"facts": {}}) is None, "it has ended"
        assert registry.refuse(connection, entry, "server 1", ERROR) is None
        assert not registry.withdraw(connection, entry, "server 1")
        assert registry.get(connection, "ours", "resnet56") == ready


def test_withdraw_leaves_no_entry(database: Database, registry: Registry):
    with database.begin() as connection:
        entry = begun(connection, registry)
        assert not registry.withdraw(connection, entry, "server 2")
        assert registry.withdraw(connection, entry, "server 1")
        with pytest.raises(NotFound):
            registry.get(connection, "ours", "resnet56")


def test_renew_extends_leases_writes_progress_and_returns_the_entries_that_are_still_owned(
    database: Database, registry: Registry
):
    progress = {"done": 3, "total": 10}
    with database.begin() as connection:
        first, second, gone = (begun(connection, registry, name=name) for name in "abc")
        expire(connection, registry)
        registry.delete(connection, "ours", "c")
        asked = {first.id: progress, second.id: None, gone.id: None}
        assert registry.renew(connection, "server 2", LEASE_S, asked) == set()
        assert registry.renew(connection, "server 1", LEASE_S, asked) == {first.id, second.id}
        assert not registry.has_expired(connection)
        assert registry.get(connection, "ours", "a").progress == progress


def test_claim_expired_takes_an_inspection_over_once_and_the_owner_before_cannot_write_any_more(
    database: Database, registry: Registry
):
    with database.begin() as connection:
        entry = begun(connection, registry)
        assert claim(connection, registry) == [] and not registry.has_expired(connection)
        expire(connection, registry)
        assert registry.has_expired(connection)
        (taken,) = claim(connection, registry)
        assert (taken.id, taken.attempts, taken.request) == (entry.id, 2, {"name": "resnet56"})
        assert claim(connection, registry) == []
        assert registry.finish(connection, entry, "server 1", {"facts": {}}) is None
        assert registry.finish(connection, taken, "server 2", {"facts": {}}) is not None


def test_claim_expired_by_two_servers_at_once_gives_it_to_one(database: Database, registry: Registry):
    with database.begin() as connection:
        begun(connection, registry)
        expire(connection, registry)

    def take(owner: str) -> int:
        with database.begin() as connection:
            return len(claim(connection, registry, owner))

    assert sum(run_concurrently([lambda one=one: take(f"server {one}") for one in range(2, 6)])) == 1


def test_claim_expired_refuses_what_was_begun_too_often(database: Database, registry: Registry):
    with database.begin() as connection:
        begun(connection, registry)
        for attempts in (2, 3):
            expire(connection, registry)
            assert [entry.attempts for entry in claim(connection, registry)] == [attempts]
        expire(connection, registry)
        assert claim(connection, registry) == []
        entry = registry.get(connection, "ours", "resnet56")
        assert (entry.state, entry.error) == ("refused", LOST)


def test_release_lets_others_begin_again_and_counts_only_an_error(database: Database, registry: Registry):
    with database.begin() as connection:
        entry = begun(connection, registry)
        registry.release(connection, entry, "server 1", -1.0)
        (entry,) = claim(connection, registry, "server 1")
        assert entry.attempts == 1
        registry.release(connection, entry, "server 1", 60.0, ERROR)
        assert claim(connection, registry) == [], "not yet"
        expire(connection, registry)
        (entry,) = claim(connection, registry)
        assert (entry.attempts, entry.error) == (2, ERROR)


@pytest.mark.parametrize("values", [{"state": "lost"}, {"state": "ready"}, {"lease_until": None}], ids=str)
def test_registered_table_refuses_a_contradictory_row(database: Database, registry: Registry, values: dict[str, Any]):
    with database.begin() as connection:
        begun(connection, registry)
    with pytest.raises(IntegrityError), database.begin() as connection:
        connection.execute(update(registry.table).values(**values))


def test_list_page_is_newest_first(database: Database, registry: Registry):
    with database.begin() as connection:
        for name in "abc":
            begun(connection, registry, name=name)
        page, after = registry.list_page(connection, "ours", EntryQuery(limit=2))
        rest, end = registry.list_page(connection, "ours", EntryQuery(limit=2, after=after))
        assert registry.list_page(connection, "theirs", EntryQuery(limit=2)) == ([], None)
    assert (len(page), len(rest), end) == (2, 1, None)
    assert after == NEWEST_FIRST.cursor(page[-1].created_at, page[-1].id)
    ids = [entry.id for entry in (*page, *rest)]
    assert ids == sorted(ids, reverse=True)


def test_delete_frees_the_name(database: Database, registry: Registry):
    with database.begin() as connection:
        entry = begun(connection, registry)
        assert registry.delete(connection, "ours", "resnet56") == entry.id
        with pytest.raises(NotFound):
            registry.delete(connection, "ours", "resnet56")
        begun(connection, registry)


def test_get_inspection_by_digest_kind_and_key(database: Database):
    with database.begin() as connection:
        assert get_inspection(connection, SHA256, "model", "resnet20") is None
        put_inspection(connection, SHA256, "model", "resnet20", {"num_classes": 10})
        assert get_inspection(connection, SHA256, "model", "resnet20") == {"num_classes": 10}
        assert get_inspection(connection, SHA256, "model", "resnet56") is None
        assert get_inspection(connection, SHA256, "dataset", "resnet20") is None


def test_put_inspection_replaces_an_earlier_one(database: Database):
    with database.begin() as connection:
        put_inspection(connection, SHA256, "dataset", "", {"train": 1})
        put_inspection(connection, SHA256, "dataset", "", {"train": 2})
        assert get_inspection(connection, SHA256, "dataset") == {"train": 2}


KEY = "a" * 64
"""Of a measurement."""


def test_get_measurement_returns_none_before_a_measurement(database: Database) -> None:
    with database.begin() as connection:
        assert store_registry.get_measurement(connection, "p", "cost", KEY) is None


def test_put_measurement_replaces_what_was_measured_before(database: Database) -> None:
    with database.begin() as connection:
        store_registry.put_measurement(connection, "p", "cost", KEY, {"step_s": 1.5})
        store_registry.put_measurement(connection, "p", "cost", KEY, {"step_s": 2.0, "stages": [1]})
        assert store_registry.get_measurement(connection, "p", "cost", KEY) == {"step_s": 2.0, "stages": [1]}


@pytest.mark.parametrize(("project", "kind", "key"), [("q", "cost", KEY), ("p", "evaluation", KEY), ("p", "cost", "b")])
def test_get_measurement_does_not_find_another_projects_kinds_or_keys_figures(
    database: Database, project: str, kind: store_registry.Measured, key: str
) -> None:
    with database.begin() as connection:
        store_registry.put_measurement(connection, "p", "cost", KEY, {"step_s": 1.5})
        assert store_registry.get_measurement(connection, project, kind, key) is None
