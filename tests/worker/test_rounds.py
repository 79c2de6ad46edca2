"""What is done again and again goes on after a round that failed, and ends when it is told to."""

from base.clock import JITTER, jittered
from tests.worker.processes import until
from worker.rounds import Rounds


class Counting(Rounds):
    done = 0

    def round(self) -> None:
        self.done += 1
        if self.done == 2:
            raise RuntimeError("the second round fails")


def test_a_round_that_fails_is_followed_by_others_until_the_end():
    rounds = Counting("counting", every_s=0.01)
    rounds.start()
    until(lambda: rounds.done > 3, "rounds after the one that failed")
    assert rounds.stop(timeout_s=30)
    done = rounds.done
    assert rounds.stop() and rounds.done == done


def test_one_that_never_began_has_ended():
    assert Counting("counting", every_s=1, first_s=600).stop()


def test_whoever_looks_together_is_spread_over_time():
    waits = {jittered(10) for _ in range(50)}
    assert len(waits) > 1
    assert all(10 * (1 - JITTER) <= wait <= 10 for wait in waits)
