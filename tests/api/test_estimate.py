"""The estimate of a job: from measurements, by a probe, or by the parameters; and the warning about memory."""

from typing import Any

import pytest

from api.inspections import Refused
from kdcore.catalog import named_facts
from kdcore.spec import JobSpec, Known
from kdcore.spec.cost import JobCost, StageCost, cost_rows, least_memory
from store import registry, workers
from tests.api.conftest import SUPERVISED, Service
from tests.api.test_submission import kd, teacher

pytestmark = pytest.mark.anyio

COST = JobCost(
    basis="measured",
    device="cpu",
    device_name="x86_64",
    threads=1,
    precision="fp32",
    preparing_s=2.0,
    stages={
        "student": StageCost(step_s=0.5, held_out_image_s=0.01),
        "alone": StageCost(step_s=0.1, held_out_image_s=0),
    },
    test_image_s=0.1,
    memory_bytes=1_000_000_000,
    memory_fixed_bytes=200_000_000,
    exporting_s=7.0,
)
UNKNOWN = {"preparing": None, "training": None, "evaluating": None, "exporting": None}
DIGITS = Known(dataset=named_facts("digits", None))
"""1437 images to train with, 144 of them held out, and 360 test images; 20 steps of 64 in an epoch."""


async def validated(service: Service, query: str = "", **changes: Any) -> dict[str, Any]:
    answer = await service.http.post(f"/v1/jobs/validate{query}", json={**SUPERVISED, **changes})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def measured(service: Service, project: str = "default", cost: JobCost = COST, **changes: Any) -> None:
    """Keep the cost of a job as a worker does when it has succeeded."""
    spec = JobSpec.model_validate((await validated(service, "?probe=false", **changes))["resolved_spec"])
    for key, figures in cost_rows(spec, DIGITS, cost).items():
        await service.db.write(registry.put_measurement, project, "cost", key, figures)


async def has_worker(service: Service, *devices: dict[str, Any]) -> None:
    rows = [{"job": None, "state": "idle", "seen_s": 0.1, **device} for device in devices]
    await service.db.write(workers.record_heartbeat, "worker-1", "host", rows, None)


async def test_validate_estimates_what_was_measured_before(service: Service) -> None:
    await measured(service)
    found = (await validated(service))["estimate"]
    # 3 epochs of 20 steps; 144 held-out images after each, 360 test images at the end.
    expected = {"preparing": 2, "training": 30, "evaluating": 4.3 + 36, "exporting": 7}
    assert found["seconds_by_phase"] == pytest.approx(expected, abs=0.1)
    assert found["seconds"] == pytest.approx(79.3, abs=0.1)
    assert (found["memory_bytes"], found["device"], found["basis"]) == (COST.memory_bytes, "cpu, 1 thread", "measured")
    assert found["steps"] == 60
    assert service.inspector.probes == []


async def test_validate_scales_what_was_measured_with_another_batch(service: Service) -> None:
    await measured(service)
    found = (await validated(service, training={"epochs": 3, "batch_size": 32}))["estimate"]
    assert found["seconds_by_phase"]["training"] == pytest.approx(3 * 40 * 0.25)
    assert (found["memory_bytes"], found["basis"]) == (600_000_000, "measured")
    assert (found["seconds_by_phase"]["preparing"], found["seconds_by_phase"]["exporting"]) == (None, 7)


async def test_validate_never_takes_a_float_training_for_one_that_ends_in_int8(service: Service) -> None:
    await measured(service)
    found = (await validated(service, "?probe=false", quantization={"aware": True, "epochs": 1}))["estimate"]
    assert (found["seconds"], found["seconds_by_phase"], found["basis"]) == (None, UNKNOWN, "parameters")


async def test_validate_does_not_learn_from_another_project(service: Service) -> None:
    await measured(service, project="another")
    found = (await validated(service, "?probe=false"))["estimate"]
    assert (found["seconds"], found["seconds_by_phase"], found["device"]) == (None, UNKNOWN, None)


async def test_validate_probes_once_what_was_never_measured(service: Service) -> None:
    probed = {"basis": "probe", "preparing_s": None, "exporting_s": None}
    service.inspector.cost = COST.model_copy(update=probed)
    for _ in range(2):
        found = (await validated(service))["estimate"]
        assert (found["basis"], found["seconds_by_phase"]["preparing"]) == ("probe", None)
        assert found["seconds_by_phase"]["exporting"] is None
        assert found["seconds"] == pytest.approx(70.3, abs=0.1)
    (asked,) = service.inspector.probes
    assert asked.spec.students[0].architecture == "convnet8" and asked.dataset.image_size == (8, 8)
    assert asked.threads is not None and asked.threads >= 1
    await measured(service)
    assert (await validated(service))["estimate"]["basis"] == "measured"


async def test_a_probe_never_replaces_what_a_job_has_measured(service: Service) -> None:
    """The student is known from an earlier job, its baseline is not: only that is taken from the probe."""
    spec = {"method": "supervised"}
    await measured(service, cost=COST, **spec)
    await teacher(service)
    service.inspector.cost = COST.model_copy(
        update={
            "basis": "probe",
            "stages": {name: StageCost(step_s=9, held_out_image_s=9) for name in ("student", "alone")},
        }
    )
    answer = await service.http.post("/v1/jobs/validate", json=kd(baseline="train", training={"epochs": 40}))
    assert answer.json()["estimate"]["basis"] == "probe"
    found = (await validated(service))["estimate"]
    assert (found["basis"], found["seconds_by_phase"]["training"]) == ("measured", 30)


@pytest.mark.parametrize(
    "refused", [Refused("internal", "no", final=False), Refused("spec_invalid", "a program", final=True)]
)
async def test_validate_answers_without_seconds_when_the_probe_fails(service: Service, refused: Refused) -> None:
    service.inspector.cost = refused
    body = await validated(service)
    found = body["estimate"]
    assert body["valid"] and len(service.inspector.probes) == 1
    assert (found["seconds"], found["seconds_by_phase"], found["basis"]) == (None, UNKNOWN, "parameters")
    assert found["memory_bytes"] == least_memory(found["parameters"]["student"], 0)


async def test_validate_runs_no_probe_for_faults_nor_when_told_not_to(service: Service) -> None:
    assert not (await validated(service, alpha=-1))["valid"]
    assert (await validated(service, "?probe=false"))["valid"]
    assert service.inspector.probes == []


async def test_validate_runs_no_probe_of_huge_batches(service: Service) -> None:
    found = await validated(service, dataset="cifar10", student="resnet20", training={"batch_size": 30_000})
    assert found["valid"] and found["estimate"]["basis"] == "parameters"
    assert service.inspector.probes == []


async def test_submit_never_waits_for_a_probe(service: Service) -> None:
    await service.submit()
    assert service.inspector.probes == []


async def test_the_estimate_is_that_of_the_workers_kind_of_device(service: Service) -> None:
    gpu = COST.model_copy(update={"device": "cuda", "device_name": "NVIDIA H200"})
    await measured(service)
    await measured(service, cost=gpu)
    for worker, training, device in (
        ({"name": "cpu"}, {}, "cpu, 1 thread"),
        ({"name": "cuda:0"}, {}, "cuda, NVIDIA H200"),
        ({"name": "cuda:0"}, {"device": "cpu"}, "cpu, 1 thread"),
    ):
        await has_worker(service, worker)
        found = await validated(service, training={"epochs": 3, "batch_size": 64, **training})
        assert found["estimate"]["device"] == device


SHORT = {"name": "cpu", "memory_bytes": 600_000_000}


async def test_memory_short_names_the_largest_batch_that_fits(service: Service) -> None:
    """1 GB with 64 images, 0.2 GB of it fixed: 0.6 GB are enough for 32."""
    await measured(service)
    await has_worker(service, SHORT)
    (warning,) = (await validated(service))["warnings"]
    assert (warning["code"], warning["pointer"]) == ("memory_short", "/training/batch_size")
    assert "1.0 GB" in warning["message"] and "0.6 GB" in warning["message"]
    assert warning["hint"] == "a batch_size of 32 or less would fit"
    job = await service.http.get(f"/v1/jobs/{await service.submit()}")
    assert job.json()["warnings"] == [warning]
    assert (await validated(service, training={"epochs": 3, "batch_size": 32}))["warnings"] == []


async def test_memory_short_refuses_a_strict_spec(service: Service) -> None:
    await measured(service)
    await has_worker(service, SHORT)
    body = await validated(service, strict=True)
    assert (body["valid"], body["resolved_spec"], body["estimate"]) == (False, None, None)
    (fault,) = body["errors"]
    assert fault["code"] == "warning_refused" and fault["pointer"] == "/training/batch_size"
    answer = await service.http.post("/v1/jobs", json={**SUPERVISED, "strict": True})
    assert (answer.status_code, answer.json()["code"]) == (422, "warning_refused")


async def test_memory_short_is_silent_where_one_device_has_enough_or_nothing_is_known(service: Service) -> None:
    await measured(service)
    assert (await validated(service))["warnings"] == []
    for devices in (
        [SHORT, {"name": "cpu:1", "memory_bytes": 2_000_000_000}],
        [{"name": "cpu"}],
        [{"name": "cuda:0", "memory_bytes": 1}],
    ):
        await has_worker(service, *devices)
        assert (await validated(service))["warnings"] == []


async def test_memory_short_by_the_parameters_alone(service: Service) -> None:
    await has_worker(service, {"name": "cuda:0", "memory_bytes": 1000})
    (warning,) = (await validated(service))["warnings"]
    assert warning["code"] == "memory_short" and "at least" in warning["message"]
    assert "network" in warning["hint"]


async def test_workers_list_the_memory_of_their_devices(service: Service) -> None:
    await has_worker(service, SHORT, {"name": "cpu:1"})
    (worker,) = (await service.http.get("/v1/workers")).json()["data"]
    assert [device["memory_bytes"] for device in worker["devices"]] == [600_000_000, None]
