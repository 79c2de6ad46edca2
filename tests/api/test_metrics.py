"""Curves, chosen and thinned."""

import pytest

from api.schemas import MetricsView
from store import metrics
from tests.api.conftest import Service, problem

pytestmark = pytest.mark.anyio


async def trained(service: Service, steps: int) -> str:
    job_id = await service.submit()
    fence = await service.claim(job_id)
    for step in range(1, steps + 1):
        values = {"train/loss": 1 / step, "validation/accuracy": 1 - 1 / step}
        await service.db.write(
            metrics.record, job_id, fence, trial="student", step=step, epoch=step / 10, values=values
        )
    return job_id


async def test_curves_by_trial_and_key(service: Service) -> None:
    job_id = await trained(service, 2)
    told = (await service.http.get(f"/v1/jobs/{job_id}/metrics")).json()
    assert told["series"] == {
        "student": {"train/loss": [[1, 1.0], [2, 0.5]], "validation/accuracy": [[1, 0.0], [2, 0.5]]}
    }
    assert MetricsView.model_validate(told)


async def test_only_the_keys_and_steps_asked_for(service: Service) -> None:
    job_id = await trained(service, 3)
    query = {"keys": "train/loss", "after_step": 2}
    told = (await service.http.get(f"/v1/jobs/{job_id}/metrics", params=query)).json()
    assert told["series"] == {"student": {"train/loss": [[3, pytest.approx(1 / 3)]]}}


async def test_long_curves_are_thinned_and_keep_their_ends(service: Service) -> None:
    job_id = await trained(service, 60)
    told = (await service.http.get(f"/v1/jobs/{job_id}/metrics", params={"max_points": 10})).json()
    points = told["series"]["student"]["train/loss"]
    assert len(points) <= 10
    assert (points[0], points[-1]) == ([1, 1.0], [60, 1 / 60])


async def test_no_curve_yet(service: Service) -> None:
    job_id = await service.submit()
    assert (await service.http.get(f"/v1/jobs/{job_id}/metrics")).json() == {"series": {}}
    problem(await service.http.get("/v1/jobs/job_0/metrics"), 404, "not_found")
    problem(await service.http.get(f"/v1/jobs/{job_id}/metrics?max_points=1"), 422, "invalid_request")
