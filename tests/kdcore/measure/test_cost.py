"""The meter of a job, with a clock that the test moves."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from base.wire import Timings
from kdcore.measure import cost
from kdcore.measure.cost import ACTIVITIES, CostMeter, peak_memory
from kdcore.spec import Stage
from kdcore.spec.cost import StageCost

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """`clock.pass_by(seconds)` moves the meter's clock."""
    clock = SimpleNamespace(now=1000.0)
    clock.pass_by = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(cost, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


STUDENT = Stage("student", epochs=5, steps=500)


def epoch(clock, stage, steps, evaluation_s, save_s=0.0, held_out=10, number=1):
    """Take an epoch, with its number from 1, of steps of these lengths, each followed by a save."""
    position = SimpleNamespace(step=0, epoch=number - 1)
    training = SimpleNamespace(position=position, training_set=SimpleNamespace(held_out=[0] * held_out))
    after_step = stage.around(lambda _: clock.pass_by(save_s))
    for position.step, seconds in enumerate(steps, 1):
        clock.pass_by(seconds)
        if position.step < len(steps):
            after_step(training)
    stage.before_evaluation(training)
    clock.pass_by(evaluation_s)
    position.step, position.epoch = 0, number
    after_step(training)


def test_stage_meter_leaves_out_the_first_steps_and_the_saves(clock):
    meter = CostMeter()
    epoch(clock, meter.stage(STUDENT), [9, 9, 9, 2, 3, 4], evaluation_s=5, save_s=100)
    assert meter.stages == {"student": pytest.approx({"step_s": 3, "held_out_image_s": 0.5})}


def test_stage_meter_takes_the_median_of_the_epochs(clock):
    meter = CostMeter()
    stage = meter.stage(STUDENT)
    for step_s, evaluation_s in ((1, 10), (2, 40), (9, 20)):
        epoch(clock, stage, [step_s] * 4, evaluation_s)
    assert meter.stages["student"] == pytest.approx({"step_s": 2, "held_out_image_s": 2})


def test_stage_meter_of_very_short_epochs_drops_the_first_as_soon_as_there_is_a_second(clock):
    meter = CostMeter()
    stage = meter.stage(STUDENT)
    epoch(clock, stage, [8, 4], 1)
    assert meter.stages["student"]["step_s"] == pytest.approx(6)
    epoch(clock, stage, [2, 2], 1)
    assert meter.stages["student"]["step_s"] == pytest.approx(2)


def test_stage_meter_keeps_epochs_for_int8_apart(clock):
    """The first steps of the fourth epoch find the ranges and are not counted, either; and an attempt that continues
    there adds to what the earlier one has measured."""
    first = CostMeter()
    stage = first.stage(replace(STUDENT, aware_epochs=2))
    for number in (1, 2, 3):
        epoch(clock, stage, [1] * 4, 10, number=number)
    in_float = {"step_s": 1, "held_out_image_s": 1}
    assert first.stages == {"student": pytest.approx(in_float)}
    epoch(clock, stage, [50, 9, 9, 2, 4], 30, number=4)
    assert first.stages == {"student": in_float, "student/int8": pytest.approx({"step_s": 3, "held_out_image_s": 3})}
    second = CostMeter(first.state())
    epoch(clock, second.stage(replace(STUDENT, aware_epochs=2)), [9, 9, 9, 4], 20, number=5)
    assert second.stages == {"student": in_float, "student/int8": pytest.approx({"step_s": 4, "held_out_image_s": 2})}


def test_meter_counts_the_files_of_one_pass(clock):
    """A stop between two files is no whole pass; `timings` has the seconds of both."""
    first = CostMeter()
    with pytest.raises(KeyboardInterrupt), first.exporting():
        clock.pass_by(5)
        state = first.state()
        raise KeyboardInterrupt
    assert first.exporting_s is None
    second = CostMeter(state)
    with second.exporting():
        clock.pass_by(7)
    assert (second.exporting_s, second.timings()["exporting"]) == (7, 12)


def test_stage_meter_lets_a_stop_through(clock):
    def stop(_):
        raise KeyboardInterrupt

    training = SimpleNamespace(position=SimpleNamespace(step=1, epoch=0))
    with pytest.raises(KeyboardInterrupt):
        CostMeter().stage(STUDENT).around(stop)(training)


def test_meter_adds_up_the_attempts(clock):
    first = CostMeter()
    first.prepared(CPU, clock.now - 7)
    epoch(clock, first.stage(STUDENT), [1, 1], 1)
    state = first.state()
    assert state["seconds"] == pytest.approx(10)
    clock.pass_by(500)
    second = CostMeter({**state, "memory_bytes": 1 << 50})
    second.prepared(CPU, clock.now)
    clock.pass_by(5)
    assert second.seconds == pytest.approx(15)
    assert second.stages == first.stages
    assert second.memory_bytes == 1 << 50


def test_meter_divides_all_attempts_into_what_was_done_and_a_block_inside_of_another_counts_alone(clock):
    first = CostMeter()
    first.count({"imports": 2, "data": 3})
    with first.during("teacher_check"):
        clock.pass_by(4)
    clock.pass_by(100)
    with pytest.raises(KeyboardInterrupt), first.during("training/student"):
        epoch(clock, first.stage(STUDENT), [1, 1], evaluation_s=5, save_s=10)
        with first.during("caching"):
            clock.pass_by(7)
        clock.pass_by(0.5)
        state = first.state()
        raise KeyboardInterrupt
    second = CostMeter(state)
    second.count({"data": 1})
    with second.during("training/student"):
        clock.pass_by(3)
        # One save between the steps, and one after the evaluation.
        assert second.timings()["training"] == {"student": 1 + 1 + 2 * 10 + 0.5 + 3}
        clock.pass_by(1)
    with second.during("training/alone"):
        clock.pass_by(2)
    with second.during("evaluating"):
        clock.pass_by(6)
    timings = second.timings()
    assert timings.pop("training") == {"student": 26.5, "alone": 2}
    known = {"imports": 2, "data": 4, "teacher_check": 4, "caching": 7, "held_out": 5, "evaluating": 6}
    assert timings == {**known, "preparing": 0, "exporting": 0}


def test_move_counts_a_part_of_the_present_activity_for_another_one(clock):
    meter = CostMeter()
    meter.move(9, "caching")  # What is in no activity is no part of the sum.
    with meter.during("training/student"):
        clock.pass_by(4)
        meter.move(1.5, "caching")
        with meter.during("caching"):
            clock.pass_by(2)
            meter.move(1, "caching")
    timings = meter.timings()
    assert (timings["training"], timings["caching"]) == ({"student": 2.5}, 3.5)


def test_meter_of_a_checkpoint_without_timings_counts_from_there(clock):
    meter = CostMeter({"seconds": 5.0, "memory_bytes": 1, "stages": {}})
    with meter.during("evaluating"):
        clock.pass_by(2)
    assert meter.timings()["evaluating"] == 2 and meter.timings()["training"] == {}


def test_activities_are_those_that_the_service_answers():
    assert tuple(Timings.__annotations__) == ACTIVITIES


def test_meter_gives_the_cost_of_a_job(clock):
    meter = CostMeter()
    meter.prepared(CPU, clock.now - 7)
    epoch(clock, meter.stage(STUDENT), [1, 1], 1)
    with meter.measuring(50):
        clock.pass_by(25)
    found = meter.cost(bf16=True)
    assert found.stages == {"student": StageCost(step_s=1, held_out_image_s=0.1)}
    assert (found.preparing_s, found.test_image_s, found.precision) == (pytest.approx(7), 0.5, "bf16")
    assert (found.device, found.threads) == ("cpu", torch.get_num_threads())
    assert 0 < found.memory_fixed_bytes <= found.memory_bytes


def test_peak_memory_rises_with_what_is_used_and_never_falls():
    before = peak_memory(CPU)
    much = torch.ones(before + (64 << 20), dtype=torch.uint8)
    during = peak_memory(CPU)
    del much
    assert during >= before + (32 << 20)
    # The kernel counts pages in batches.
    assert peak_memory(CPU) > during - (4 << 20)


def test_meter_reads_the_hosts_clock():
    meter = CostMeter()
    meter.prepared(CPU, time.monotonic() - 3)
    assert 3 <= meter.seconds < 60
