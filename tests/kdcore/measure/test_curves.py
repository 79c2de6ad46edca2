import pytest

from kdcore.measure import curves
from kdcore.measure.curves import Curve, Curves


def filled(count: int) -> Curve:
    curve = Curve()
    for number in range(count):
        curve.add(10 * number, float(number))
    return curve


@pytest.mark.parametrize("count", [1, 7, 8, 9, 10, 16, 17, 100, 101, 1023])
def test_curve_is_bounded_and_evenly_thinned_with_its_first_and_last_point(monkeypatch, count):
    monkeypatch.setattr(curves, "POINTS", 8)
    curve = filled(count)
    assert len(curve.steps) == len(curve.values) <= 8
    assert curve.values[0] == 0 and curve.values[-1] == count - 1 and curve.steps[-1] == 10 * (count - 1)
    distances = {after - before for before, after in zip(curve.values[:-2], curve.values[1:-1], strict=True)}
    assert distances <= {float(curve.stride)}


def test_curves_that_are_resumed_go_on_as_those_that_never_stopped(monkeypatch):
    monkeypatch.setattr(curves, "POINTS", 8)
    whole, first = Curves(), Curves()
    for number in range(21):
        whole.add("student", number, {"train/loss": number / 3})
        first.add("student", number, {"train/loss": number / 3})
    resumed = Curves(first.state())
    for number in range(21, 50):
        for one in (whole, resumed):
            one.add("student", number, {"train/loss": number / 3})
    assert whole.trials == resumed.trials


def test_curves_of_a_key_are_those_of_the_trials_that_have_it():
    found = Curves()
    found.add("student", 1, {"train/loss": 1.0, "train/distillation_loss": 0.5})
    found.add("alone", 1, {"train/loss": 2.0})
    assert [trial for trial, _ in found.of("train/loss")] == ["student", "alone"]
    assert [trial for trial, _ in found.of("train/distillation_loss")] == ["student"]
    assert Curves(None).trials == {}
