"""Views are filled from records."""

from types import SimpleNamespace

import pytest

from api.schemas import EventView, iso


def test_iso_has_milliseconds_and_utc() -> None:
    assert iso(1_700_000_000.5) == "2023-11-14T22:13:20.500Z"
    assert iso(None) is None


def test_view_of_copies_the_fields_of_the_view_and_converts_times() -> None:
    record = SimpleNamespace(job_id="job_1", seq=3, at=1_700_000_000.5, type="queued", data={})
    view = EventView.of(record)
    assert view == {"seq": 3, "at": "2023-11-14T22:13:20.500Z", "type": "queued", "data": {}}
    assert list(view) == list(EventView.model_fields)
    assert EventView.of(record, type="failed")["type"] == "failed"


def test_view_of_raises_if_the_record_lacks_a_field() -> None:
    with pytest.raises(KeyError, match="type"):
        EventView.of(SimpleNamespace(seq=3, at=0.0, data={}))
