"""Row 11: PostgreSQL crashes, or is frozen, for longer than two leases, while jobs are claimed, trained and finished.

A submit is answered 503 with Retry-After. Trainings go on, and nobody takes them over; a finish is tried until it is
in. Nobody has lost an attempt, and nothing needs a person.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proofs.faults.workers import SHORT_LEASE, Workers
from store.database import migrate
from tests.servers import STEPS, Server, api_process, own_postgres
from tests.worker.processes import until


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with own_postgres() as server:
        migrate(server.url)
        yield server


@pytest.mark.parametrize(
    ("away", "back"),
    [(Server.kill, Server.start), (Server.quit, Server.start), (Server.freeze, Server.wake)],
    ids=["killed", "stopped at once", "frozen"],
)
def test_everybody_waits_and_goes_on(
    tmp_path: Path, server: Server, away: Callable[[Server], None], back: Callable[[Server], None]
):
    with (
        Workers(tmp_path, server.url, **SHORT_LEASE) as workers,
        api_process(workers.settings, tmp_path / "api.log") as api,
    ):
        gates = [tmp_path / "done while it is away", tmp_path / "done when it is back"]
        ending, training = [workers.db.submit(steps=10, at={"7": "wait"}, gate=str(gate)) for gate in gates]
        for _ in range(3):
            workers.start()
        workers.db.until_checkpoint(ending)
        workers.db.until_checkpoint(training)
        time.sleep(1.25 * workers.settings.lease_s)  # so that the idle one may take over
        away(server)
        back_at = time.monotonic() + 2.25 * workers.settings.lease_s
        gates[0].touch()
        until(lambda: list(workers.settings.home.glob(f"scratch/{ending}.*/out/report.json")), "the end of a training")
        refused = api.post(tmp_path.name)
        assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
        assert int(refused.headers["Retry-After"]) > 0
        time.sleep(max(0, back_at - time.monotonic()))
        back(server)
        accepted = until(
            lambda: (answer := api.post(tmp_path.name)).status_code in (200, 201) and answer, "a job to be taken"
        )
        workers.assert_succeeded(accepted.json()["id"], STEPS, ["succeeded"])
        workers.assert_succeeded(ending, 10, ["succeeded"])
        gates[1].touch()
        workers.assert_succeeded(training, 10, ["succeeded"])
        workers.assert_nothing_left()
