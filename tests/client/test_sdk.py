from pathlib import Path
from typing import Any

import httpx
import pytest

from base.defaults import DEFAULT_URL
from client.errors import ApiError, InvalidInput, NotEnded, Unreachable
from client.sdk import Distillery
from tests.client.fake_service import FakeFiles, FakeService, attempt, job, page, prediction, problem

SPEC = {"dataset": "digits", "student": "convnet4", "method": "supervised"}


def test_distillery_takes_address_and_key_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DISTILLERY_URL", raising=False)
    assert Distillery().base_url == DEFAULT_URL
    monkeypatch.setenv("DISTILLERY_URL", "http://elsewhere:9/")
    monkeypatch.setenv("DISTILLERY_API_KEY", "secret")
    with Distillery() as distillery:
        assert distillery.base_url == "http://elsewhere:9"
        assert distillery.connection.http.headers["authorization"] == "Bearer secret"


def test_submit_repeated_after_a_break_makes_one_job():
    fake = FakeService({"POST /v1/jobs": [httpx.ReadError("cut"), job(status="queued")]})
    assert fake.client().submit(SPEC)["status"] == "queued"
    first, second = fake.requests
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"] != ""
    assert fake.bodies("POST /v1/jobs") == [SPEC, SPEC]


@pytest.mark.parametrize("broken", [httpx.ConnectError("refused"), problem(503, "away"), problem(429, "busy")])
def test_submit_is_repeated_with_the_same_key(broken: object):
    fake = FakeService({"POST /v1/jobs": [broken, broken, job(status="queued")]})
    assert fake.client().submit(SPEC)["status"] == "queued"
    assert len(fake.requests) == 3
    assert len({one.headers["idempotency-key"] for one in fake.requests}) == 1


def test_submit_twice_makes_two_jobs_unless_the_keys_are_equal():
    fake = FakeService({"POST /v1/jobs": job()})
    distillery = fake.client()
    distillery.submit(SPEC)
    distillery.submit(SPEC)
    distillery.submit(SPEC, idempotency_key="mine")
    keys = [one.headers["idempotency-key"] for one in fake.requests]
    assert len(set(keys)) == 3
    assert keys[2] == "mine"


def test_evaluate_model_repeated_after_a_break_makes_one_job():
    path = "POST /v1/models/big/evaluations"
    fake = FakeService({path: [httpx.ReadError("cut"), job(kind="evaluation", status="queued")]})
    given = {"mean": [0.5], "std": [0.25]}
    assert fake.client().evaluate_model("big", "digits", preprocessing=given)["kind"] == "evaluation"
    first, second = fake.requests
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"] != ""
    assert fake.bodies(path) == [{"dataset": "digits", "preprocessing": given}] * 2


def test_evaluations_of_a_model_are_fetched_in_pages():
    pages = [page([job(id="job_2")], "job_2"), page([job(id="job_1")])]
    fake = FakeService({"GET /v1/models/big/evaluations": pages})
    assert [one["id"] for one in fake.client().evaluations("big")] == ["job_2", "job_1"]


def test_jobs_are_fetched_in_pages():
    fake = FakeService({"GET /v1/jobs": [page([job(id="job_3"), job(id="job_2")], "job_2"), page([job(id="job_1")])]})
    assert [one["id"] for one in fake.client().jobs(status="failed", limit=2)] == ["job_3", "job_2", "job_1"]
    assert [dict(one.url.params) for one in fake.requests] == [
        {"status": "failed", "limit": "2"},
        {"status": "failed", "limit": "2", "after": "job_2"},
    ]


def test_jobs_fetches_only_the_pages_that_are_needed():
    fake = FakeService({"GET /v1/jobs": page([job(id="job_3")], "job_3")})
    assert next(fake.client().jobs())["id"] == "job_3"
    assert len(fake.requests) == 1


def test_jobs_raises_for_an_unknown_filter():
    with pytest.raises(TypeError, match="no filter state"):
        FakeService({}).client().jobs(state="failed")  # type: ignore[call-arg]


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume", "retry"])
def test_actions_on_a_job(verb: str):
    fake = FakeService({f"POST /v1/jobs/job_1/{verb}": job(status="queued")})
    assert getattr(fake.client(), verb)("job_1")["status"] == "queued"


def test_retry_from_checkpoint_or_from_scratch():
    fake = FakeService({"POST /v1/jobs/job_1/retry": job(status="queued")})
    fake.client().retry("job_1")
    fake.client().retry("job_1", from_scratch=True)
    assert fake.bodies("POST /v1/jobs/job_1/retry") == [{"from": "checkpoint"}, {"from": "scratch"}]


def test_attempts():
    fake = FakeService({"GET /v1/jobs/job_1/attempts": page([attempt(1, how="lost"), attempt(2)])})
    assert [one["how"] for one in fake.client().attempts("job_1")] == ["lost", None]


def test_wait_returns_a_job_that_has_ended():
    fake = FakeService({"GET /v1/jobs/job_1": [job(status="running"), job(status="failed")]})
    assert fake.client().wait("job_1", poll_s=0)["status"] == "failed"


def test_wait_tolerates_an_outage():
    away = [httpx.ConnectError("refused")] * 3 + [problem(503, "unavailable")] * 3 + [httpx.Response(502)] * 3
    fake = FakeService({"GET /v1/jobs/job_1": [job(status="running"), *away, job(status="succeeded")]})
    assert fake.client().wait("job_1", poll_s=0)["status"] == "succeeded"


def test_wait_raises_after_a_long_outage_and_for_an_unknown_job():
    with pytest.raises(Unreachable):
        FakeService({"GET /v1/jobs/job_1": httpx.ConnectError("refused")}).client().wait(
            "job_1", max_outage_s=0, poll_s=0
        )
    with pytest.raises(ApiError, match="not found"):
        FakeService().client().wait("job_1", poll_s=0)


def test_wait_raises_after_its_time_limit():
    fake = FakeService({"GET /v1/jobs/job_1": job(status="paused")})
    with pytest.raises(NotEnded, match="still paused"):
        fake.client().wait("job_1", timeout_s=0, poll_s=0)


def test_metrics():
    fake = FakeService({"GET /v1/jobs/job_1/metrics": {"series": {"student": {"train/loss": [[0, 2.5], [9, None]]}}}})
    curves = fake.client().metrics("job_1", ["train/loss", "train/lr"], max_points=10)
    assert curves == {"student": {"train/loss": [(0, 2.5), (9, None)]}}
    assert dict(fake.requests[0].url.params) == {"keys": "train/loss,train/lr", "max_points": "10"}


def test_events_of_several_pages():
    one, two = {"seq": 1}, {"seq": 2}
    fake = FakeService({"GET /v1/jobs/job_1/events": [page([one], "1"), page([two])]})
    assert fake.client().events("job_1") == [one, two]
    assert [request.url.params["after"] for request in fake.requests] == ["0", "1"]


def test_logs():
    fake = FakeService({"GET /v1/jobs/job_1/logs": httpx.Response(200, text="line\n")})
    assert fake.client().logs("job_1", tail=5, attempt=2) == "line\n"


@pytest.mark.parametrize(
    ("made", "status", "expected"),
    [
        ([], "running", "it is running, only succeeded jobs have files"),
        (["report.json"], "succeeded", "its files are report.json"),
    ],
)
def test_download_of_a_file_that_the_job_does_not_have(made: list[str], status: str, expected: str):
    artifacts = [{"name": name} for name in made]
    fake = FakeService({"GET /v1/jobs/job_1/artifacts": page(artifacts), "GET /v1/jobs/job_1": job(status=status)})
    with pytest.raises(InvalidInput, match=expected):
        fake.client().download("job_1")


def test_register_model_uploads_the_file(tmp_path: Path):
    checkpoint = tmp_path / "t.pth"
    checkpoint.write_bytes(b"weights")
    files = FakeFiles()
    fake = files.service()
    fake.routes["POST /v1/models"] = {"name": "t"}
    fake.client().register_model("t", checkpoint, "resnet56", preprocessing={"mean": [0.5], "std": [0.2]})
    assert fake.bodies("POST /v1/models") == [
        {
            "name": "t",
            "blob": files.upload()["blob"],
            "architecture": "resnet56",
            "preprocessing": {"mean": [0.5], "std": [0.2]},
        }
    ]


def test_register_dataset_by_digest():
    fake = FakeService({"POST /v1/datasets": {"name": "d"}})
    blob = "sha256:" + "0" * 64
    fake.client().register_dataset("d", f"blob:{blob}", image_size=32)
    assert fake.bodies("POST /v1/datasets") == [{"name": "d", "blob": blob, "image_size": 32}]


def test_register_dataset_with_options():
    fake = FakeService({"POST /v1/datasets": {"name": "d"}})
    blob = "sha256:" + "0" * 64
    fake.client().register_dataset("d", f"blob:{blob}", options={"resize": "pad", "channels": 3})
    assert fake.bodies("POST /v1/datasets") == [{"name": "d", "blob": blob, "resize": "pad", "channels": 3}]


BLOB = "sha256:" + "0" * 64
REFUSED = {"code": "unusable", "message": "3.png is cut short", "hint": "replace it", "errors": [{"pointer": "/blob"}]}


def entry(state: str, done: int | None = None, **changes: Any) -> dict[str, Any]:
    progress = None if done is None else {"done": done, "total": 10}
    return {"id": "ds_1", "name": "d", "blob": BLOB, "state": state, "progress": progress, "error": None, **changes}


@pytest.fixture
def inspecting(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    """A service whose data set is inspected while the client asks three times; the second answer is lost."""
    monkeypatch.setattr("client.sdk.INSPECTION_POLL_S", 0)
    polled = [entry("inspecting", 3), *[httpx.ReadError("lost")] * 3, entry("inspecting", 9), entry("ready")]
    routes = {"POST /v1/datasets": httpx.Response(202, json=entry("inspecting")), "GET /v1/datasets/ds_1": polled}
    return FakeService({**routes, "DELETE /v1/datasets/ds_1": httpx.Response(204)})


def test_register_dataset_waits_for_the_inspection_and_reports_it(inspecting: FakeService):
    seen: list[tuple[int, int]] = []
    dataset = inspecting.client().register_dataset("d", BLOB, on_inspection=lambda *of: seen.append(of))
    assert (dataset["state"], seen) == ("ready", [(3, 10), (3, 10), (9, 10)])
    assert not inspecting.requests_to("DELETE /v1/datasets/ds_1")


def test_register_dataset_without_wait_returns_at_once(inspecting: FakeService):
    client = inspecting.client()
    dataset = client.register_dataset("d", BLOB, wait=False)
    assert dataset["state"] == "inspecting" and not inspecting.requests_to("GET /v1/datasets/ds_1")
    assert client.wait_for_dataset(dataset)["state"] == "ready"


def test_register_model_raises_the_refusal_of_its_inspection(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("client.sdk.INSPECTION_POLL_S", 0)
    fake = FakeService({"POST /v1/models": httpx.Response(202, json=entry("inspecting"))})
    fake.routes["GET /v1/models/ds_1"] = entry("refused", error=REFUSED)
    with pytest.raises(ApiError) as raised:
        fake.client().register_model("d", BLOB)
    error = raised.value
    assert (error.code, error.detail, error.status) == ("unusable", "3.png is cut short", 422)
    assert (error.faults, error.extra["hint"]) == ([{"pointer": "/blob"}], "replace it")


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_register_dataset_that_is_interrupted_while_it_waits_is_cancelled(inspecting: FakeService):
    with pytest.raises(KeyboardInterrupt):
        inspecting.client().register_dataset("d", BLOB, on_inspection=interrupted)
    assert len(inspecting.requests_to("DELETE /v1/datasets/ds_1")) == 1


@pytest.mark.parametrize(
    ("found", "deleted"),
    [
        (entry("inspecting"), 1),
        (entry("ready"), 0),
        (entry("inspecting", blob="sha256:" + "1" * 64), 0),
        (problem(404, "not_found"), 0),
    ],
    ids=["its own", "an older one", "another file", "none yet"],
)
def test_register_dataset_that_is_interrupted_before_the_answer_deletes_only_its_own_row(
    inspecting: FakeService, found: Any, deleted: int
):
    inspecting.routes |= {"POST /v1/datasets": interrupted, "GET /v1/datasets/d": found}
    with pytest.raises(KeyboardInterrupt):
        inspecting.client().register_dataset("d", BLOB)
    assert len(inspecting.requests_to("DELETE /v1/datasets/ds_1")) == deleted


def test_catalogue_and_registry_methods():
    fake = FakeService(
        {
            "GET /v1/methods": page([{"name": "kd"}]),
            "GET /v1/methods/kd": {"name": "kd"},
            "GET /v1/architectures": page([{"name": "resnet20"}]),
            "GET /v1/models": page([{"name": "m"}]),
            "GET /v1/models/m": {"name": "m"},
            "GET /v1/datasets": page([{"name": "d"}]),
            "GET /v1/datasets/d": {"name": "d"},
            "GET /v1/workers": page([]),
            "GET /readyz": {"status": "ready"},
            "POST /v1/jobs/validate": {"valid": True},
            "DELETE /v1/jobs/job_1": httpx.Response(204),
            "DELETE /v1/models/m": httpx.Response(204),
            "DELETE /v1/datasets/d": problem(404, "not_found"),
        }
    )
    distillery = fake.client()
    assert distillery.methods() == [distillery.method("kd")]
    assert distillery.architectures(classes=100)[0]["name"] == "resnet20"
    assert list(distillery.models()) == [distillery.model("m")]
    assert list(distillery.datasets()) == [distillery.dataset("d")]
    assert distillery.workers() == []
    assert distillery.ready()
    assert distillery.validate(SPEC)["valid"]
    distillery.delete("job_1")
    distillery.delete_model("m")
    with pytest.raises(Exception, match="not found"):
        distillery.delete_dataset("d")


def test_webhook_methods():
    hook, delivery = {"id": "wh_1"}, {"id": "msg_1"}
    fake = FakeService(
        {
            "GET /v1/webhooks": page([hook]),
            "POST /v1/webhooks": {**hook, "secret": "whsec_"},
            "GET /v1/webhooks/wh_1": hook,
            "PATCH /v1/webhooks/wh_1": hook,
            "DELETE /v1/webhooks/wh_1": httpx.Response(204),
            "POST /v1/webhooks/wh_1/test": delivery,
            "POST /v1/webhooks/wh_1/rotate": {**hook, "secret": "whsec_"},
            "GET /v1/webhooks/wh_1/deliveries": page([delivery]),
            "POST /v1/webhooks/wh_1/deliveries/msg_1/replay": delivery,
        }
    )
    distillery = fake.client()
    assert list(distillery.webhooks()) == [distillery.webhook("wh_1")]
    assert distillery.add_webhook("https://example.org/", ["job.failed"])["secret"] == "whsec_"
    distillery.change_webhook("wh_1", enabled=False, events=["job.alert"])
    assert fake.bodies("POST /v1/webhooks") == [{"url": "https://example.org/", "events": ["job.failed"]}]
    assert fake.bodies("PATCH /v1/webhooks/wh_1") == [{"events": ["job.alert"], "enabled": False}]
    assert distillery.rotate_webhook("wh_1")["secret"] == "whsec_"
    assert [distillery.test_webhook("wh_1")] == list(distillery.deliveries("wh_1", status="failed"))
    assert fake.requests_to("GET /v1/webhooks/wh_1/deliveries")[0].url.params["status"] == "failed"
    assert distillery.replay_delivery("wh_1", "msg_1") == delivery
    distillery.delete_webhook("wh_1")


def test_ready_is_false_if_the_server_takes_no_jobs():
    assert not FakeService({"GET /readyz": problem(503, "unavailable")}).client().ready()


def test_ready_raises_for_another_server():
    with pytest.raises(ApiError, match="not found"):
        FakeService({"GET /readyz": problem(404, "not_found")}).client().ready()


def test_predict_sends_the_file_and_waits_for_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("client.sdk.PREDICTION_POLL_S", 0)
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"picture")
    waits = prediction(state="waiting", answer=None, message="it is next")
    fake = FakeService({"POST /v1/jobs/job_1/predict": waits, "GET /v1/predictions/pred_1": [waits, prediction()]})
    assert fake.client().predict("job_1", path)["state"] == "answered"
    assert [one.method for one in fake.requests] == ["POST", "GET", "GET"]
    assert fake.requests[0].content == b"picture"
    fake = FakeService({"POST /v1/jobs/job_1/predict": waits})
    assert fake.client().predict("job_1", b"bytes", timeout_s=0)["message"] == "it is next"
    assert fake.requests[0].content == b"bytes"
    with pytest.raises(InvalidInput, match="nowhere"):
        fake.client().predict("job_1", "nowhere.png")
