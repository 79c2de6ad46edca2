"""Figures that a process counts, and those of other processes."""

import os
from pathlib import Path

from prometheus_client.metrics_core import Metric

from base import figures
from base.figures import Exchange


def values(families: list[Metric], name: str, **labels: str) -> dict[str, float]:
    """The values of a sample by process."""
    return {
        sample.labels["process"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    }


def test_figures_are_counted_by_their_labels(tmp_path: Path):
    mine = Exchange(tmp_path, "api")

    def seen(name: str, **labels: str) -> float:
        return values(list(mine.collect()), name, **labels).get(mine.process, 0)

    route = {"method": "GET", "route": "/v1/tests/{id}", "status": "4xx"}
    figures.answered("GET", "/v1/tests/{id}", 404, 0.02)
    figures.answered("GET", "/v1/tests/{id}", 499, 7.0)
    assert seen("distillery_http_request_seconds_count", **route) == 2
    assert seen("distillery_http_request_seconds_bucket", **route, le="0.025") == 1
    before = seen("distillery_refusals_total", limit="of this test")
    figures.refused("of this test")
    assert seen("distillery_refusals_total", limit="of this test") == before + 1
    figures.delivered("of this test")
    assert seen("distillery_webhook_deliveries_total", outcome="of this test") >= 1


def test_job_succeeded_adds_the_seconds_and_the_cache_of_its_report(tmp_path: Path):
    mine = Exchange(tmp_path, "worker")

    def seen() -> list[float]:
        families = list(mine.collect())
        return [
            values(families, name, **labels).get(mine.process, 0)
            for name, labels in (
                ("distillery_job_seconds_total", {"phase": "training"}),
                ("distillery_job_seconds_total", {"phase": "data"}),
                ("distillery_teacher_cache_views_total", {"result": "hit"}),
                ("distillery_attempts_total", {"outcome": "succeeded"}),
            )
        ]

    before = seen()
    timings = {"data": 1.5, "training": {"student": 2.0, "alone": 3.0}}
    figures.job_succeeded({"timings": timings, "teacher_cache": {"hits": 70, "misses": 30}})
    figures.job_succeeded({"teacher_cache": None})  # an evaluation
    assert [now - then for now, then in zip(seen(), before, strict=True)] == [5, 1.5, 70, 2]


def test_exchange_adds_other_processes_and_forgets_those_that_ended(tmp_path: Path):
    figures.refused("shared")
    mine = Exchange(tmp_path / "metrics", "api")
    mine.write()
    mine.write()
    text = (tmp_path / "metrics" / f"{mine.process}.prom").read_text()
    for name in ("api.host-b.1", "worker.host-b.2"):
        (tmp_path / "metrics" / f"{name}.prom").write_text(text)
    (tmp_path / "metrics" / "api.host-c.3.prom").write_text("not {figures")
    os.utime(tmp_path / "metrics" / "worker.host-b.2.prom", (0, 0))
    families = list(mine.collect())
    found = values(families, "distillery_refusals_total", limit="shared")
    assert found.keys() == {mine.process, "api.host-b.1"} and len(set(found.values())) == 1
    names = [family.name for family in families]
    assert len(names) == len(set(names)), "Prometheus wants each family once"
    mine.remove()
    assert sorted(path.name for path in (tmp_path / "metrics").iterdir()) == ["api.host-b.1.prom", "api.host-c.3.prom"]


def test_exchange_that_cannot_write_is_no_fault(tmp_path: Path):
    (tmp_path / "metrics").touch()
    mine = Exchange(tmp_path / "metrics", "api")
    mine.write()
    mine.remove()
    assert list(mine.collect())


def test_template_drops_the_types_of_parameters():
    assert figures.template("/v1/jobs/{job_id}/artifacts/{name:path}") == "/v1/jobs/{job_id}/artifacts/{name}"
