from store import inspections
from store.database import Database
from tests.store.scene import SHA256


def test_an_answer_is_kept_by_digest_kind_and_key(database: Database):
    with database.begin() as connection:
        assert inspections.get(connection, SHA256, "model", "resnet20") is None
        inspections.put(connection, SHA256, "model", "resnet20", {"num_classes": 10})
        assert inspections.get(connection, SHA256, "model", "resnet20") == {"num_classes": 10}
        assert inspections.get(connection, SHA256, "model", "resnet56") is None
        assert inspections.get(connection, SHA256, "dataset", "resnet20") is None


def test_a_later_answer_replaces_it(database: Database):
    with database.begin() as connection:
        inspections.put(connection, SHA256, "dataset", "", {"train": 1})
        inspections.put(connection, SHA256, "dataset", "", {"train": 2})
        assert inspections.get(connection, SHA256, "dataset") == {"train": 2}
