"""Traces are an option: without the setting nothing of OpenTelemetry is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from api import tracing
from store.settings import Settings
from tests.api.conftest import serving

pytestmark = pytest.mark.anyio


def test_without_the_setting_nothing_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from api.app import create_app; from store.settings import Settings; "
        f"create_app(Settings(home={str(tmp_path)!r}), lambda: None); "
        "parts = tuple(f'opentelemetry.{part}' for part in ('sdk', 'exporter', 'proto')); "
        "print([name for name in sys.modules if name.startswith(parts)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_settings_name_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    with pytest.raises(ValueError, match=r"pip install 'distillery\[otel\]'"):
        Settings(otel=True)
    assert Settings().otel is False


async def test_requests_are_spans_with_their_route_and_no_query(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = pytest.importorskip(
        "opentelemetry.sdk.trace.export.in_memory_span_exporter",
        reason="OpenTelemetry is an optional extra: pip install .[otel]",
    ).InMemorySpanExporter()
    telemetry = tracing.telemetry
    monkeypatch.setattr(tracing, "telemetry", lambda otel: telemetry(otel, exporter))
    async with serving(settings.model_copy(update={"otel": True})) as service:
        for path in ("/v1/jobs/job_1/metrics?keys=secret", "/healthz"):
            await service.http.get(path, headers={"Authorization": "Bearer secret"})
    (span,) = exporter.get_finished_spans()
    assert span.name == "GET /v1/jobs/{job_id}/metrics"
    assert span.attributes["http.response.status_code"] == 404
    assert span.resource.attributes["service.name"] == "distillery"
    assert "secret" not in span.to_json()
