from store import ids
from store.ids import DIGITS, new_id


def test_an_id_says_its_kind_and_is_short_enough_for_its_column():
    assert new_id("job").startswith("job_")
    assert len(new_id("job")) == 28


def test_later_ids_sort_behind_earlier_ones(monkeypatch):
    moments = [0, 1, 31, 32, 1_795_266_002_033, 2**50 - 1]
    made = []
    for moment_ms in moments:
        monkeypatch.setattr(ids.time, "time_ns", lambda moment_ms=moment_ms: moment_ms * 1_000_000)
        made.append(new_id("job"))
    assert made == sorted(made)


def test_ids_of_one_moment_differ():
    assert len({new_id("job") for _ in range(1000)}) == 1000


def test_the_digits_are_in_order_and_none_is_mistaken_for_another():
    assert list(DIGITS) == sorted(set(DIGITS))
    assert not set("ilou") & set(DIGITS)
