"""What a storm will do, drawn from one seed before it begins: plain data, the same for the same seed.

What comes of it is not repeated to the millisecond: processes meet the same faults in the same order, not at the same
instruction.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Setting = Literal["cluster", "embedded"]
Wish = Literal["none", "cancel", "pause", "retry"]

LEASE_S = 3.0
HEARTBEAT_S = 0.5
LOOK_S = 0.5

KILLS: Mapping[Setting, Mapping[str, int]] = {
    "cluster": {"worker": 8, "engine": 5, "guard": 2, "api": 2, "valkey": 2, "postgres": 1},
    "embedded": {"server": 8, "worker": 5, "engine": 5, "guard": 2},
}
"""How often each is killed, in a deck of twenty."""

OTHERS: Mapping[Setting, Mapping[str, int]] = {
    "cluster": {
        "freeze a worker": 3,
        "freeze valkey": 1,
        "drop all rings": 1,
        "ring 300 times": 1,
        "fill the disk": 1,
        "leave no room to start": 1,
    },
    "embedded": {"freeze the server": 2, "freeze a worker": 2, "fill the disk": 1, "leave no room to start": 1},
}
"""What else happens, from decks of its own."""

OTHERS_PER_KILL = 0.2
GAP_S = 1.0, 5.0
RESTART_S = 0.1, 1.5
AT_WORK = 0.7
LASTING_S = 1.2 * LEASE_S, 2.0 * LEASE_S

WISHES: Mapping[Wish, int] = {"none": 14, "cancel": 2, "pause": 3, "retry": 1}


@dataclass(frozen=True)
class Fault:
    kind: str
    kills: bool
    after_s: float
    """Since the fault before."""
    which: float
    """Which of the possible victims, as a part of their number."""
    for_s: float
    """How long it lasts; what was killed is started again after so long."""
    at_work: bool
    """Who trains is to meet it, rather than anybody at any moment."""


@dataclass(frozen=True)
class Errand:
    """One job of one client: sent by so many at once under one key, and then wished something."""

    key: str
    recipe: str
    senders: int
    wish: Wish
    patience_s: float
    """From its start to the wish."""


def faults(seed: int, setting: Setting, kills: int) -> list[Fault]:
    """So many kills, and other faults between them."""
    chance = random.Random(f"faults {seed}")  # noqa: S311
    deaths, others = _dealt(chance, KILLS[setting]), _dealt(chance, OTHERS[setting])
    drawn: list[Fault] = []
    for _ in range(kills):
        drawn.append(_fault(chance, next(deaths), True, RESTART_S))
        if chance.random() < OTHERS_PER_KILL:
            drawn.append(_fault(chance, next(others), False, LASTING_S))
    return drawn


def errands(seed: int, recipes: list[str]) -> Iterator[Errand]:
    """Jobs without end."""
    chance = random.Random(f"errands {seed}")  # noqa: S311
    dealt, wishes = _dealt(chance, dict.fromkeys(recipes, 1)), _dealt(chance, WISHES)
    number = 0
    while True:
        number += 1
        wish, senders, patience_s = next(wishes), chance.choice((2, 3)), chance.uniform(0.5, 4)
        yield Errand(f"chaos-{seed}-{number}", next(dealt), senders, wish, patience_s)


def bodies(teacher: str) -> dict[str, dict[str, Any]]:
    """The jobs by name: small, of every kind of state, and each longer than a lease."""
    taught = {"teacher": {"checkpoint": teacher}, "student": "convnet4"}
    alone = {"student": "convnet4", "method": "supervised"}
    peers = {"student": ["convnet4", "convnet4"], "method": "dml"}
    wanted: dict[str, tuple[dict[str, Any], int, int]] = {
        "supervised-1": (alone, 75, 1),
        "supervised-2": ({**alone, "training": {"ema": 0.99}}, 70, 2),
        "kd": ({**taught, "method": "kd"}, 65, 3),
        "fitnet": ({**taught, "method": "fitnet"}, 44, 4),
        "crd": ({**taught, "method": {"name": "crd", "negatives": 256}}, 30, 5),
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
        for name, (body, epochs, seed) in wanted.items()
    }


TEACHER: dict[str, Any] = {
    "name": "teacher",
    "dataset": "digits",
    "student": "convnet8",
    "method": "supervised",
    "training": {"epochs": 6, "batch_size": 64, "seed": 1},
}


def _fault(chance: random.Random, kind: str, kills: bool, lasting_s: tuple[float, float]) -> Fault:
    return Fault(
        kind, kills, chance.uniform(*GAP_S), chance.random(), chance.uniform(*lasting_s), chance.random() < AT_WORK
    )


def _dealt(chance: random.Random, deck: Mapping[Any, int]) -> Iterator[Any]:
    """Cards from shuffled decks, one deck after the other: no kind is long in coming."""
    while True:
        cards = [kind for kind, times in deck.items() for _ in range(times)]
        chance.shuffle(cards)
        yield from cards
