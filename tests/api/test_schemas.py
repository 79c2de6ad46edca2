"""Views are filled from records."""

from types import SimpleNamespace

import pytest

from api.schemas import DatasetView, MeasuredModelView, ModelView, iso, view_of
from base.wire import Dataset, EventView, MeasuredModel, Model


def test_iso_has_milliseconds_and_utc() -> None:
    assert iso(1_700_000_000.5) == "2023-11-14T22:13:20.500Z"
    assert iso(None) is None


def test_view_of_copies_the_fields_of_the_view_and_converts_times() -> None:
    record = SimpleNamespace(job_id="job_1", seq=3, at=1_700_000_000.5, type="queued", data={})
    view = view_of(EventView, record)
    assert view == {"seq": 3, "at": "2023-11-14T22:13:20.500Z", "type": "queued", "data": {}}
    assert list(view) == list(EventView.__annotations__)
    assert view_of(EventView, record, type="failed")["type"] == "failed"


def test_view_of_raises_if_the_record_lacks_a_field() -> None:
    with pytest.raises(KeyError, match="type"):
        view_of(EventView, SimpleNamespace(seq=3, at=0.0, data={}))


def test_model_view_and_dataset_view_have_the_fields_that_clients_read() -> None:
    assert ModelView.model_fields.keys() == Model.__annotations__.keys()
    assert MeasuredModelView.model_fields.keys() == MeasuredModel.__annotations__.keys()
    assert DatasetView.model_fields.keys() == Dataset.__annotations__.keys()
