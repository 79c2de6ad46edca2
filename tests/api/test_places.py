"""Places for inspections: turns, the trial place, and the bounds of the waiting room."""

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from api.inspections import Inspector
from api.places import AskerBusy, Busy, Places
from kdcore.catalog import DatasetFacts
from tests.api.conftest import DATASET

pytestmark = pytest.mark.anyio


class Work:
    """Inspections that end when they are told to. `begun` has their names, in order."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.begun: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[str]] = {}

    def __call__(self, name: str) -> Callable[[], Coroutine[Any, Any, str]]:
        async def work() -> str:
            self.begun.append(name)
            await self.ends.setdefault(name, asyncio.Event()).wait()
            return name

        return work

    async def ask(self, *names: str) -> None:
        """Ask for inspections; the first letter of a name is that of its asker."""
        for name in names:
            self.tasks[name] = asyncio.create_task(self.places.run(name[0], self(name)))
        await settled()

    async def end(self, *names: str) -> None:
        for name in names:
            self.ends.setdefault(name, asyncio.Event()).set()
        await settled()


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_places_are_dealt_by_turns() -> None:
    """Five of `a` came first, and still `b` is next whenever a place is free."""
    work = Work(Places(1, trial_s=1000))
    await work.ask("a1", "a2", "a3", "a4", "b1", "b2")
    assert work.begun == ["a1", "a2"], "a regular place and the trial place"
    for name in ("a1", "b1", "a2", "b2", "a3", "a4"):
        await work.end(name)
    assert work.begun == ["a1", "a2", "b1", "b2", "a3", "a4"]
    assert [await task for task in work.tasks.values()] == list(work.tasks)


async def test_places_end_a_long_trial_only_if_another_waits() -> None:
    work = Work(Places(1, trial_s=0.0))
    await work.ask("a1", "a2")
    await asyncio.sleep(0.03)
    assert work.begun == ["a1", "a2"] and not work.tasks["a2"].done()
    await work.ask("b1")
    assert work.begun == ["a1", "a2", "b1"], "b1 has the trial place of a2"
    await work.end("b1", "a1")
    assert work.begun[3:] == ["a2"], "it begins again in the regular place"
    await work.end("a2")
    assert await work.tasks["a2"] == "a2"


async def test_places_let_a_trial_go_on_in_a_regular_place() -> None:
    work = Work(Places(1, trial_s=0.0))
    await work.ask("a1", "a2")
    await work.end("a1")
    await work.ask("b1", "b2")
    assert work.begun == ["a1", "a2", "b1", "b2"], "a2 was not begun again, b1 has had its trial"
    await work.end("a2", "b1", "b2")
    assert await asyncio.gather(*work.tasks.values()) == ["a1", "a2", "b1", "b2"]


async def test_places_of_who_leaves_are_free() -> None:
    work = Work(Places(1, trial_s=1000))
    await work.ask("a1", "a2", "a3", "a4")
    for name in ("a3", "a1", "a2"):
        work.tasks[name].cancel()
    await settled()
    assert work.begun == ["a1", "a2", "a4"]
    await work.end("a4")
    assert await work.tasks["a4"] == "a4" and work.places.is_free


async def test_places_pass_on_what_the_work_raises() -> None:
    async def broken() -> None:
        raise ValueError("torn")

    places = Places(0)
    with pytest.raises(ValueError, match="torn"):
        await places.run("a", broken)
    assert places.is_free


async def test_places_bound_the_waiting_room() -> None:
    work = Work(Places(1, trial_s=1000, most_waiting=3, most_of_one=2))
    await work.ask("a1", "a2", "a3", "a4")
    with pytest.raises(AskerBusy, match="2 inspections of yours wait already"):
        await work.places.run("a", work("a5"))
    await work.ask("b1")
    with pytest.raises(Busy, match="3 inspections wait already") as raised:
        await work.places.run("c", work("c1"))
    assert type(raised.value) is Busy and raised.value.retry_after_s > 0
    await work.end("a1")
    await work.ask("c1")
    assert not work.tasks["c1"].done()
    await work.end("a2", "a3", "a4", "b1", "c1")
    assert len(await asyncio.gather(*work.tasks.values())) == 6


async def test_inspector_answers_a_quick_asker_while_slow_files_are_read(tmp_path: Path) -> None:
    """Slow children of one asker have all places, also the trial place; a second asker, and the same one, get facts."""
    facts = json.dumps({"ok": True, "facts": DATASET.model_dump(mode="json")})
    script = tmp_path / "engine.py"
    script.write_text(f"import sys, time\nif 'slow' in sys.argv[-1]:\n    time.sleep(600)\nprint({facts!r})\n")
    inspector = Inspector(tmp_path / "inspect", [sys.executable, str(script)], parallel=1)
    inspector._places_of_data = Places(1, trial_s=0.0)
    slow = [asyncio.create_task(inspector.inspect(DatasetFacts, f"slow{n}", asker="a")) for n in range(2)]
    try:
        await asyncio.sleep(0)
        for asker in ("b", "a"):
            async with asyncio.timeout(60):
                assert await inspector.inspect(DatasetFacts, "quick.npz", asker=asker) == DATASET
        assert not any(task.done() for task in slow)
    finally:
        for task in slow:
            task.cancel()
        await asyncio.wait(slow)
    assert not list((tmp_path / "inspect").iterdir())
