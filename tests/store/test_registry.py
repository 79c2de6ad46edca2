from types import ModuleType

import pytest

from store import datasets, models
from store.database import Database
from store.errors import NameTaken, NotFound
from tests.store.scene import SHA256, at_once


@pytest.fixture(params=[models, datasets], ids=["models", "datasets"])
def shelf(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def test_found_by_name_and_by_id_in_its_project_only(database: Database, shelf: ModuleType):
    with database.begin() as connection:
        entry = shelf.register(connection, "ours", "resnet56", SHA256, {"num_classes": 100})
        assert entry.id.startswith(("mdl_", "ds_"))
        assert (entry.sha256, entry.facts) == (SHA256, {"num_classes": 100})
        assert shelf.get(connection, "ours", "resnet56") == shelf.get(connection, "ours", entry.id) == entry
        with pytest.raises(NotFound, match="'resnet56'"):
            shelf.get(connection, "theirs", "resnet56")


def test_a_name_is_given_once_in_a_project(database: Database, shelf: ModuleType):
    with database.begin() as connection:
        shelf.register(connection, "ours", "resnet56", SHA256, {})
        shelf.register(connection, "theirs", "resnet56", SHA256, {})
        with pytest.raises(NameTaken, match="named 'resnet56' already"):
            shelf.register(connection, "ours", "resnet56", SHA256, {})


def test_racing_registrations_of_a_name_leave_one(database: Database, shelf: ModuleType):
    def register() -> object:
        with database.begin() as connection:
            return shelf.register(connection, "ours", "resnet56", SHA256, {})

    assert sorted(type(answer).__name__ for answer in at_once([register] * 5))[1:] == ["NameTaken"] * 4


def test_pages_newest_first(database: Database, shelf: ModuleType):
    with database.begin() as connection:
        for name in "abc":
            shelf.register(connection, "ours", name, SHA256, {})
        page, after = shelf.list_page(connection, "ours", limit=2)
        rest, end = shelf.list_page(connection, "ours", limit=2, after=after)
        assert shelf.list_page(connection, "theirs", limit=2) == ([], None)
    assert (len(page), len(rest), after, end) == (2, 1, page[-1].id, None)
    everything = [entry.id for entry in (*page, *rest)]
    assert everything == sorted(everything, reverse=True)


def test_a_forgotten_name_may_be_given_again(database: Database, shelf: ModuleType):
    with database.begin() as connection:
        shelf.register(connection, "ours", "resnet56", SHA256, {})
        shelf.delete(connection, "ours", "resnet56")
        with pytest.raises(NotFound):
            shelf.delete(connection, "ours", "resnet56")
        shelf.register(connection, "ours", "resnet56", SHA256, {})
