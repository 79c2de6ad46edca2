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


async def test_metrics_series_by_trial_and_key(service: Service) -> None:
    job_id = await trained(service, 2)
    body = (await service.http.get(f"/v1/jobs/{job_id}/metrics")).json()
    assert body["series"] == {
        "student": {"train/loss": [[1, 1.0], [2, 0.5]], "validation/accuracy": [[1, 0.0], [2, 0.5]]}
    }
    assert MetricsView.model_validate(body)


async def test_metrics_series_of_requested_keys_and_steps(service: Service) -> None:
    job_id = await trained(service, 3)
    query = {"keys": "train/loss", "after_step": 2}
    body = (await service.http.get(f"/v1/jobs/{job_id}/metrics", params=query)).json()
    assert body["series"] == {"student": {"train/loss": [[3, pytest.approx(1 / 3)]]}}


async def test_metrics_series_are_thinned(service: Service) -> None:
    job_id = await trained(service, 60)
    body = (await service.http.get(f"/v1/jobs/{job_id}/metrics", params={"max_points": 10})).json()
    points = body["series"]["student"]["train/loss"]
    assert len(points) <= 10
    assert (points[0], points[-1]) == ([1, 1.0], [60, 1 / 60])


async def test_metrics_series_of_a_queued_job_are_empty(service: Service) -> None:
    job_id = await service.submit()
    assert (await service.http.get(f"/v1/jobs/{job_id}/metrics")).json() == {"series": {}}
    problem(await service.http.get("/v1/jobs/job_0/metrics"), 404, "not_found")
    problem(await service.http.get(f"/v1/jobs/{job_id}/metrics?max_points=1"), 422, "invalid_request")
