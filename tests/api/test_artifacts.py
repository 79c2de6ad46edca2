"""A job's files: listed, downloaded whole or in ranges, or not sent again."""

import hashlib
import os
from datetime import datetime
from email.utils import parsedate_to_datetime

import pytest

from api.schemas import Page
from base.wire import ArtifactView
from tests.api.conftest import Service, problem

pytestmark = pytest.mark.anyio


async def test_artifacts_listing_has_digests(service: Service) -> None:
    job_id = await service.submit()
    made = await service.succeed(job_id)
    body = (await service.http.get(f"/v1/jobs/{job_id}/artifacts")).json()
    assert {file["name"]: file["sha256"] for file in body["data"]} == made
    assert Page[ArtifactView].model_validate(body, strict=True)


async def test_artifact_download_has_its_digest(service: Service) -> None:
    job_id = await service.submit()
    made = await service.succeed(job_id)
    for path in ("checkpoint", "artifacts/student.safetensors"):
        answer = await service.http.get(f"/v1/jobs/{job_id}/{path}")
        assert answer.status_code == 200
        assert hashlib.sha256(answer.content).hexdigest() == made["student.safetensors"]
        assert answer.headers["etag"] == f'"{made["student.safetensors"]}"'
        assert answer.headers["x-checksum-sha256"] == made["student.safetensors"]
        assert answer.headers["repr-digest"].startswith("sha-256=:")
        assert answer.headers["content-disposition"] == 'attachment; filename="student.safetensors"'
        assert answer.headers["accept-ranges"] == "bytes"


async def test_artifact_download_resumes_with_range(service: Service) -> None:
    job_id = await service.submit()
    await service.succeed(job_id)
    path = f"/v1/jobs/{job_id}/checkpoint"
    whole = await service.http.get(path)
    headers = {"Range": "bytes=4-", "If-Range": whole.headers["etag"]}
    rest = await service.http.get(path, headers=headers)
    assert rest.status_code == 206
    assert rest.content == whole.content[4:]
    assert rest.headers["content-range"] == f"bytes 4-{len(whole.content) - 1}/{len(whole.content)}"
    other = await service.http.get(path, headers={**headers, "If-Range": '"other bytes"'})
    assert (other.status_code, other.content) == (200, whole.content)


async def test_artifact_that_is_a_page_opens_in_place_and_may_do_nothing(service: Service) -> None:
    """It has no origin: a script in it, which the policy stops, too, could not reach the key of the service's page."""
    job_id = await service.submit()
    await service.succeed(job_id, {"report.html": b"<script>alert(1)</script>"})
    answer = await service.http.get(f"/v1/jobs/{job_id}/artifacts/report.html")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-disposition"] == 'inline; filename="report.html"'
    (policy,) = answer.headers.get_list("content-security-policy")
    assert policy.startswith("sandbox ") and "allow-same-origin" not in policy and "script" not in policy
    assert "default-src 'none'" in policy


@pytest.mark.parametrize("range_header", ["bytes=99999-", "bytes=5-2", "bytes=-0", "bytes=0-1, 99999-"])
async def test_artifact_download_refuses_a_range_outside_the_file(service: Service, range_header: str) -> None:
    job_id = await service.submit()
    await service.succeed(job_id)
    answer = await service.http.get(f"/v1/jobs/{job_id}/checkpoint", headers={"Range": range_header})
    problem(answer, 416, "range_unsatisfiable")
    assert answer.headers["content-range"].startswith("bytes */")


async def test_artifact_download_answers_304_if_the_client_has_the_bytes(service: Service) -> None:
    job_id = await service.submit()
    made = await service.succeed(job_id)
    headers = {"If-None-Match": f'"other", "{made["student.safetensors"]}"'}
    answer = await service.http.get(f"/v1/jobs/{job_id}/checkpoint", headers=headers)
    assert (answer.status_code, answer.content) == (304, b"")


async def test_artifact_head_has_size_and_digest(service: Service) -> None:
    job_id = await service.submit()
    made = await service.succeed(job_id)
    answer = await service.http.head(f"/v1/jobs/{job_id}/artifacts/student.safetensors")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["etag"] == f'"{made["student.safetensors"]}"'
    assert int(answer.headers["content-length"]) > 0


async def test_checkpoint_of_a_job_that_has_not_succeeded_is_not_ready(service: Service) -> None:
    job_id = await service.submit()
    body = problem(await service.http.get(f"/v1/jobs/{job_id}/checkpoint"), 409, "not_ready")
    assert body["job_status"] == "queued"
    assert (await service.http.get(f"/v1/jobs/{job_id}/artifacts")).json()["data"] == []


async def test_artifact_that_does_not_exist_is_answered_with_those_that_do(service: Service) -> None:
    job_id = await service.submit()
    await service.succeed(job_id)
    body = problem(await service.http.get(f"/v1/jobs/{job_id}/artifacts/student.onnx"), 404, "not_found")
    assert body["allowed"] == ["report.json", "student.safetensors"]
    problem(await service.http.get("/v1/jobs/job_0/checkpoint"), 404, "not_found")
    problem(await service.http.get("/v1/jobs/job_0/artifacts"), 404, "not_found")


@pytest.mark.parametrize("range_header", ["lines=1-2", "bytes=a-b", "bytes", "bytes=1", "bytes=" + "9" * 5000 + "-"])
async def test_artifact_download_ignores_a_range_that_is_none(service: Service, range_header: str) -> None:
    job_id = await service.submit()
    await service.succeed(job_id)
    path = f"/v1/jobs/{job_id}/checkpoint"
    answer = await service.http.get(path, headers={"Range": range_header})
    assert (answer.status_code, answer.content) == (200, (await service.http.get(path)).content)


async def test_artifact_download_was_modified_when_it_was_made(service: Service) -> None:
    """Not when it was last downloaded, which is the time of the file."""
    job_id = await service.submit()
    made = await service.succeed(job_id)
    finished = (await service.http.get(f"/v1/jobs/{job_id}")).json()["finished_at"]
    os.utime(service.files.path(made["student.safetensors"]), (0, 0))
    for _ in range(2):
        answer = await service.http.get(f"/v1/jobs/{job_id}/checkpoint")
        modified = parsedate_to_datetime(answer.headers["last-modified"])
        assert modified == datetime.fromisoformat(finished).replace(microsecond=0)
