"""The plan of a run: its faults and jobs, drawn from one seed. The same seed gives the same plan.

The course of a run is not repeated exactly: processes meet the same faults in the same order, but not at the same
instruction.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Setting = Literal["cluster", "embedded"]
Action = Literal["none", "cancel", "pause", "retry"]

LEASE_S = 3.0
HEARTBEAT_S = 0.5
LOOK_S = 0.5

KILLS: Mapping[Setting, Mapping[str, int]] = {
    "cluster": {"worker": 8, "engine": 5, "guard": 2, "api": 2, "valkey": 2, "postgres": 1},
    "embedded": {"server": 8, "worker": 5, "engine": 5, "guard": 2},
}
"""The number of each kind in a deck of twenty kills."""

OTHER_FAULTS: Mapping[Setting, Mapping[str, int]] = {
    "cluster": {
        "freeze a worker": 3,
        "freeze valkey": 1,
        "drop all wake-ups": 1,
        "send 300 wake-ups": 1,
        "fill the disk": 1,
        "leave little disk space": 1,
    },
    "embedded": {"freeze the server": 2, "freeze a worker": 2, "fill the disk": 1, "leave little disk space": 1},
}
"""The same for faults that kill nothing."""

OTHER_FAULTS_PER_KILL = 0.2
GAP_S = 1.0, 5.0
RESTART_S = 0.1, 1.5
DURATION_S = 1.2 * LEASE_S, 2.0 * LEASE_S
TRAINING_SHARE = 0.7

ACTIONS: Mapping[Action, int] = {"none": 14, "cancel": 2, "pause": 3, "retry": 1}


@dataclass(frozen=True)
class Fault:
    kind: str
    kills: bool
    after_s: float
    """Time since the fault before."""
    choice: float
    """The choice among the possible targets, from 0 (the first) to 1."""
    duration_s: float
    """Duration of the fault; a killed process is started again after this time."""
    needs_training: bool
    """The target must be training; else any target at any time."""


@dataclass(frozen=True)
class PlannedJob:
    """A job of one client: sent several times at once under one key, then perhaps cancelled, paused or retried."""

    key: str
    recipe: str
    senders: int
    action: Action
    action_after_s: float
    """Time between the start of the job and the action."""


def faults(seed: int, setting: Setting, kills: int) -> list[Fault]:
    """The given number of kills, and other faults between them."""
    chance = random.Random(f"faults {seed}")  # noqa: S311
    kill_kinds, other_kinds = _deal(chance, KILLS[setting]), _deal(chance, OTHER_FAULTS[setting])
    drawn: list[Fault] = []
    for _ in range(kills):
        drawn.append(_fault(chance, next(kill_kinds), True, RESTART_S))
        if chance.random() < OTHER_FAULTS_PER_KILL:
            drawn.append(_fault(chance, next(other_kinds), False, DURATION_S))
    return drawn


def jobs(seed: int, recipes: list[str]) -> Iterator[PlannedJob]:
    """An endless sequence of jobs."""
    # This text is part of the seed: another text gives other jobs than those of earlier runs.
    chance = random.Random(f"errands {seed}")  # noqa: S311
    recipe, actions = _deal(chance, dict.fromkeys(recipes, 1)), _deal(chance, ACTIONS)
    number = 0
    while True:
        number += 1
        action, senders, after_s = next(actions), chance.choice((2, 3)), chance.uniform(0.5, 4)
        yield PlannedJob(f"chaos-{seed}-{number}", next(recipe), senders, action, after_s)


def bodies(teacher: str) -> dict[str, dict[str, Any]]:
    """The request bodies by recipe: small jobs with every kind of state, each longer than a lease."""
    distilled = {"teacher": {"checkpoint": teacher}, "student": "convnet4"}
    alone = {"student": "convnet4", "method": "supervised"}
    peers = {"student": ["convnet4", "convnet4"], "method": "dml"}
    recipes: dict[str, tuple[dict[str, Any], int, int]] = {
        "supervised-1": (alone, 75, 1),
        "supervised-2": ({**alone, "training": {"ema": 0.99}}, 70, 2),
        "kd": ({**distilled, "method": "kd"}, 65, 3),
        "fitnet": ({**distilled, "method": "fitnet"}, 44, 4),
        "crd": ({**distilled, "method": {"name": "crd", "negatives": 256}}, 30, 5),
        "dml": (peers, 42, 6),
    }
    return {
        name: {
            "name": name,
            "dataset": "digits",
            **body,
            "training": {
                "epochs": epochs,
                "batch_size": 64,
                "seed": seed,
                "checkpoint_every_s": 0.3,
                **body.get("training", {}),
            },
        }
        for name, (body, epochs, seed) in recipes.items()
    }


TEACHER: dict[str, Any] = {
    "name": "teacher",
    "dataset": "digits",
    "student": "convnet8",
    "method": "supervised",
    "training": {"epochs": 6, "batch_size": 64, "seed": 1},
}


def _fault(chance: random.Random, kind: str, kills: bool, duration_s: tuple[float, float]) -> Fault:
    return Fault(
        kind,
        kills,
        after_s=chance.uniform(*GAP_S),
        choice=chance.random(),
        duration_s=chance.uniform(*duration_s),
        needs_training=chance.random() < TRAINING_SHARE,
    )


def _deal(chance: random.Random, deck: Mapping[Any, int]) -> Iterator[Any]:
    """Cards from shuffled decks, one deck after the other, so that each kind comes after a bounded time."""
    while True:
        cards = [kind for kind, times in deck.items() for _ in range(times)]
        chance.shuffle(cards)
        yield from cards
