import pytest

from kdcore.documents import drawing


def test_line_chart_places_points_between_round_ticks():
    chart = drawing.line_chart("Loss", {"student": [(0, 0.0), (10, 1.0)]}, "%")
    (line,) = chart.lines
    assert [tick.label for tick in chart.y_ticks] == ["0 %", "20 %", "40 %", "60 %", "80 %", "100 %"]
    assert [tick.label for tick in chart.x_ticks] == ["0", "2", "4", "6", "8", "10"]
    left, right = line.points.split()
    assert left == f"{drawing.LEFT:.1f},{drawing.HEIGHT - drawing.BOTTOM:.1f}"
    assert right == f"{drawing.WIDTH - drawing.RIGHT:.1f},{drawing.TOP:.1f}"
    assert drawing.line_chart("Nothing", {}) is None
    assert drawing.line_chart("One point", {"student": [(3, 0.5)]}).lines[0].marks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.3, 0.7, [0.3, 0.4, 0.5, 0.6, 0.7]),
        (-1, 99, [0, 20, 40, 60, 80]),
        (2, 2.001, None),
    ],
)
def test_ticks_are_round_numbers_within_the_bounds(low, high, expected):
    found = drawing.ticks(low, high)
    assert found == expected if expected else len(found) >= 2
    assert all(low <= tick <= high for tick in found)


def test_reliability_draws_a_bin_at_its_confidence_and_accuracy():
    bins = [{"images": 0, "confidence": None, "accuracy": None}, {"images": 9, "confidence": 0.75, "accuracy": 0.5}]
    diagram = drawing.reliability(bins, None)
    side = drawing.SIDE
    assert diagram.bars == [(side / 2, side / 2, side / 2, side / 2)] and list(diagram.after) == []
    assert list(diagram.before) == [(0.75 * side, 0.5 * side, drawing.LARGEST_DOT)]


def test_span_has_the_whole_interval_and_zero():
    span = drawing.span(-0.5, 0.1, 0.4, (0.0, 1.0))
    assert 10 == span.low < span.zero < span.value < span.high < drawing.SPAN_WIDTH - 10
