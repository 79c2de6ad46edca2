from store import measurements
from store.database import Database

KEY, OTHER = "a" * 64, "b" * 64


def test_put_and_get_by_project_kind_and_key(database: Database):
    with database.begin() as connection:
        measurements.put(connection, "ours", "evaluation", KEY, {"accuracy": 0.7})
        measurements.put(connection, "ours", "cost", KEY, {"seconds": 3})
        assert measurements.get(connection, "ours", "evaluation", KEY) == {"accuracy": 0.7}
        assert measurements.get(connection, "ours", "cost", KEY) == {"seconds": 3}
        assert measurements.get(connection, "ours", "evaluation", OTHER) is None
        assert measurements.get(connection, "theirs", "evaluation", KEY) is None


def test_put_replaces_earlier_figures(database: Database):
    with database.begin() as connection:
        for accuracy in (0.7, 0.8):
            measurements.put(connection, "ours", "evaluation", KEY, {"accuracy": accuracy})
        assert measurements.get(connection, "ours", "evaluation", KEY) == {"accuracy": 0.8}
