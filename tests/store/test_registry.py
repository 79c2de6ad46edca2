import pytest

from store import registry as store_registry
from store.database import Database
from store.errors import NameTaken, NotFound
from store.records import PageQuery
from store.registry import NewEntry, Registry, datasets, get_inspection, models, put_inspection
from tests.store.helpers import SHA256, run_concurrently


@pytest.fixture(params=[models, datasets], ids=["models", "datasets"])
def registry(request: pytest.FixtureRequest) -> Registry:
    return request.param


def test_get_finds_an_entry_by_name_or_id_in_its_project_only(database: Database, registry: Registry):
    with database.begin() as connection:
        entry = registry.register(connection, NewEntry("ours", "resnet56", SHA256, {"num_classes": 100}, []))
        assert entry.id.startswith(("mdl_", "ds_"))
        assert (entry.sha256, entry.facts) == (SHA256, {"num_classes": 100})
        assert registry.get(connection, "ours", "resnet56") == registry.get(connection, "ours", entry.id) == entry
        with pytest.raises(NotFound, match="'resnet56'"):
            registry.get(connection, "theirs", "resnet56")


def test_register_takes_a_name_once_in_a_project(database: Database, registry: Registry):
    with database.begin() as connection:
        registry.register(connection, NewEntry("ours", "resnet56", SHA256, {}, []))
        registry.register(connection, NewEntry("theirs", "resnet56", SHA256, {}, []))
        with pytest.raises(NameTaken, match=r"there is already a .* named 'resnet56'"):
            registry.register(connection, NewEntry("ours", "resnet56", SHA256, {}, []))


def test_register_concurrently_adds_one_entry(database: Database, registry: Registry):
    def register() -> object:
        with database.begin() as connection:
            return registry.register(connection, NewEntry("ours", "resnet56", SHA256, {}, []))

    assert sorted(type(result).__name__ for result in run_concurrently([register] * 5))[1:] == ["NameTaken"] * 4


def test_list_page_is_newest_first(database: Database, registry: Registry):
    with database.begin() as connection:
        for name in "abc":
            registry.register(connection, NewEntry("ours", name, SHA256, {}, []))
        page, after = registry.list_page(connection, "ours", PageQuery(limit=2))
        rest, end = registry.list_page(connection, "ours", PageQuery(limit=2, after=after))
        assert registry.list_page(connection, "theirs", PageQuery(limit=2)) == ([], None)
    assert (len(page), len(rest), after, end) == (2, 1, page[-1].id, None)
    ids = [entry.id for entry in (*page, *rest)]
    assert ids == sorted(ids, reverse=True)


def test_delete_frees_the_name(database: Database, registry: Registry):
    with database.begin() as connection:
        registry.register(connection, NewEntry("ours", "resnet56", SHA256, {}, []))
        registry.delete(connection, "ours", "resnet56")
        with pytest.raises(NotFound):
            registry.delete(connection, "ours", "resnet56")
        registry.register(connection, NewEntry("ours", "resnet56", SHA256, {}, []))


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
