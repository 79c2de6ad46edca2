"""Suggestions: only what was measured, and how it is ranked."""

from typing import Any

import pytest
from pydantic import TypeAdapter

from api.routes.suggestions import Budget, suggested
from base.wire import Suggestions
from store import registry
from store.speeds import Speed, key_of_files
from tests.api.conftest import Service, problem

pytestmark = pytest.mark.anyio

CPU = {"kind": "cpu", "name": "fast"}


def row(format: str = "safetensors", ms: float = 1.0, size: int = 100, **more: Any) -> dict[str, Any]:
    latency = [{"batch": 1, "p50_ms": ms, "p95_ms": 2 * ms}, {"batch": 32, "p50_ms": 20 * ms, "p95_ms": 40 * ms}]
    runtime = "torch 2.12" if format == "safetensors" else "onnxruntime 1.28"
    return {
        "format": format,
        "runtime": runtime,
        "bytes": size,
        "latency": latency,
        "threads": 1,
        "cpu": "fast",
        **more,
    }


def speed(architecture: str, parameters: int, *files: dict[str, Any], at: float = 1.0, **more: Any) -> Speed:
    figures = {
        "job": f"job_{architecture}_{at:g}", "architecture": architecture, "parameters": parameters, "num_classes": 10,
        "channels": 3, "image_size": [32, 32], "device": CPU, "files": list(files), **more,
    }  # fmt: skip
    return Speed(architecture, figures, at)


def benchmark(architecture: str, parameters: int, *files: dict[str, Any], **more: Any) -> Speed:
    return speed(architecture, parameters, *files, macs=7, **more)


def trained(architecture: str, accuracy: float, *files: dict[str, Any], dataset: str = "digits", **more: Any) -> Speed:
    return speed(architecture, 50, *files, accuracy=accuracy, dataset=dataset, **more)


def found(budget: dict[str, Any], benchmarks: list[Speed], files: list[Speed] = []) -> Suggestions:  # noqa: B006
    answer = suggested(Budget.model_validate(budget), benchmarks, files)
    return TypeAdapter(Suggestions).validate_python(answer)


def named(answer: Suggestions) -> list[tuple[str, str]]:
    return [(one["architecture"], one["format"]) for one in answer["data"]]


def test_suggested_are_those_that_fit_by_parameters_if_no_accuracy_is_known():
    measured = [benchmark("a", 10, row(ms=1)), benchmark("b", 20, row(ms=2)), benchmark("c", 30, row(ms=3))]
    answer = found({"budget_ms": 2}, measured)
    assert named(answer) == [("b", "safetensors"), ("a", "safetensors")]
    assert answer["ranked_by"] == "parameters" and "no job of this project has measured" in answer["why"]
    assert answer["measured"] == 3
    first = answer["data"][0]
    assert (first["p50_ms"], first["p95_ms"], first["macs"], first["device"]) == (2, 4, 7, CPU)
    assert first["accuracy"] is first["accuracy_job"] is None and first["measured_by"] == "job_b_1"
    assert found({"budget_ms": 0.5}, measured)["data"] == []


def test_suggested_are_ranked_by_accuracies_that_jobs_have_measured():
    """The best float accuracy counts for float files; int8 counts by its own file alone; without one it comes last."""
    measured = [benchmark("a", 10, row(), row("onnx_int8", size=30)), benchmark("b", 20, row())]
    files = [
        trained("a", 0.8, row("onnx_int8", size=30, accuracy=0.7), at=2),
        trained("a", 0.9, row("onnx", accuracy=0.85), at=3),
    ]
    answer = found({"budget_ms": 5}, measured, files)
    assert answer["ranked_by"] == "accuracy" and "measured on digits" in answer["why"]
    ranked = [(one["architecture"], one["format"], one["accuracy"], one["accuracy_of"]) for one in answer["data"]]
    assert ranked == [
        ("a", "safetensors", 0.9, "student"), ("a", "onnx", 0.85, "file"), ("a", "onnx_int8", 0.7, "file"),
        ("b", "safetensors", None, None),
    ]  # fmt: skip
    assert answer["data"][0]["accuracy_job"] == "job_a_3"


def test_suggested_accuracies_of_different_data_are_not_compared():
    measured = [benchmark("a", 10, row()), benchmark("b", 20, row())]
    files = [trained("a", 0.9, row("onnx"), dataset="one"), trained("b", 0.8, row("onnx"), dataset="two")]
    answer = found({"budget_ms": 5}, measured, files)
    assert answer["ranked_by"] == "parameters" and "names one of one, two" in answer["why"]
    assert all(one["accuracy"] is None for one in answer["data"])
    one = found({"budget_ms": 5, "dataset": "two"}, measured, files)
    assert one["ranked_by"] == "accuracy" and one["data"][0]["architecture"] == "b"


@pytest.mark.parametrize(
    ("budget", "fitting"),
    [
        ({"budget_bytes": 50}, [("a", "onnx_int8")]),
        ({"budget_bytes": 50, "budget_ms": 0.4}, []),
        ({"budget_ms": 5, "runtime": "onnxruntime"}, [("a", "onnx_int8")]),
        ({"budget_ms": 5, "device": "cuda"}, [("b", "safetensors")]),
        ({"budget_ms": 5, "threads": 4}, [("b", "safetensors")]),
        ({"budget_ms": 5, "batch": 32}, []),
        ({"budget_ms": 20, "batch": 32, "device": "cpu"}, [("a", "safetensors"), ("a", "onnx_int8")]),
        ({"budget_ms": 5, "image_size": 64}, []),
        ({"budget_ms": 5, "channels": 1}, []),
        ({"budget_ms": 5, "classes": 100}, []),
    ],
)
def test_suggested_fit_every_part_of_the_budget(budget, fitting):
    gpu = row(device={"kind": "cuda", "name": "big"}) | {"threads": 4}
    measured = [benchmark("a", 20, row(), row("onnx_int8", ms=0.5, size=30)), benchmark("b", 10, gpu)]
    measured.append(benchmark("refused", 99, row("onnx", refused={"code": "export_mismatch", "message": "no"})))
    measured.append(benchmark("unmeasured", 99, {**row("onnx"), "latency": []}))
    answer = found(budget, measured)
    if "batch" in budget and fitting:
        assert set(named(answer)) == set(fitting)
    else:
        assert named(answer) == fitting


def test_suggested_a_later_measurement_takes_the_place_of_an_earlier_one():
    measured = [benchmark("a", 10, row(ms=9), at=1), benchmark("a", 10, row(ms=3), at=2)]
    answer = found({"budget_ms": 100}, measured)
    assert [(one["p50_ms"], one["measured_by"]) for one in answer["data"]] == [(3, "job_a_2")]


def test_suggested_names_what_was_not_measured_and_how_to_measure_it():
    answer = found({"budget_ms": 5, "batch": 8, "threads": 2}, [benchmark("convnet4", 10, row())])
    # The latency of eight images was not measured either.
    assert answer["data"] == [] and answer["measured"] == 0 and answer["not_measured_count"] > 50
    body = next(one for one in answer["not_measured"] if one["architecture"] == "convnet4")["body"]
    shape = {"num_classes": 10, "channels": 3, "image_size": 32}
    assert body == {"architecture": "convnet4", **shape, "batch_size": 8, "threads": 2}
    sizes = [one["parameters"] for one in answer["not_measured"] if one["parameters"] is not None]
    assert sizes == sorted(sizes)
    one = found({"budget_ms": 5}, [benchmark("convnet4", 10, row())])
    assert "convnet4" not in {one["architecture"] for one in one["not_measured"]}


def test_suggested_says_why_nothing_is_suggested():
    why = found({"budget_ms": 0.1}, [benchmark("a", 1, row(), row("onnx"))])["why"]
    assert why == "2 files measured at this shape, and none is within the budget"
    assert found({"budget_ms": 1, "classes": 3}, [benchmark("a", 1, row())])["why"].startswith("0 files measured")


async def test_suggestions_take_data_sets_by_their_registered_names(service: Service) -> None:
    answer = await service.http.get("/v1/suggestions", params={"budget_ms": 5, "dataset": "digit"})
    fault = problem(answer, 422, "invalid_request")["errors"][0]
    assert (fault["pointer"], fault["got"]) == ("?dataset", "digit") and "did you mean 'digits'" in fault["message"]
    blob = await service.upload(b"pictures")
    sent = await service.http.post("/v1/datasets", json={"name": "mine", "blob": blob, "image_size": 8})
    assert sent.status_code == 201, sent.text
    parent = await service.submit()
    figures = trained("convnet8", 0.9, row("onnx", accuracy=0.9), dataset=f"blob:{blob}").figures
    await service.db.write(
        registry.put_measurement, "default", "files", key_of_files(parent), {**figures, "job": parent}
    )
    for named_set in ({}, {"dataset": "mine"}, {"dataset": f"blob:{blob}"}):
        answer = await service.http.get("/v1/suggestions", params={"budget_ms": 5, **named_set})
        assert answer.json()["why"].endswith("have measured on mine") and answer.json()["ranked_by"] == "accuracy"
    other = (await service.http.get("/v1/suggestions", params={"budget_ms": 5, "dataset": "digits"})).json()
    assert "an accuracy on digits at this shape" in other["why"]


async def test_suggestions_read_what_the_project_has_measured(service: Service) -> None:
    problem(await service.http.get("/v1/suggestions"), 422, "invalid_request")
    await service.db.write(
        registry.put_measurement, "default", "benchmark", "1" * 64, benchmark("convnet4", 10, row()).figures
    )
    parent = await service.submit()
    figures = {**trained("convnet8", 0.9, row("onnx", accuracy=0.9)).figures, "job": parent}
    await service.db.write(registry.put_measurement, "default", "files", key_of_files(parent), figures)
    answer = await service.http.get("/v1/suggestions", params={"budget_ms": 5})
    assert answer.status_code == 200, answer.text
    view = TypeAdapter(Suggestions).validate_python(answer.json(), strict=False)
    assert named(view) == [("convnet8", "onnx"), ("convnet4", "safetensors")]
    sent = await service.http.post("/v1/benchmarks", json=view["not_measured"][0]["body"])
    assert sent.status_code == 201, sent.text
    await service.http.post(f"/v1/jobs/{parent}/cancel")
    await service.http.delete(f"/v1/jobs/{parent}")
    gone = (await service.http.get("/v1/suggestions", params={"budget_bytes": 500})).json()
    assert [one["architecture"] for one in gone["data"]] == ["convnet4"]
