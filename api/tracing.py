"""Traces by OpenTelemetry, if the setting `otel` is on: a span for each request, with its route and status.

FastAPI makes the spans; the library reads where they go from its own variables, such as OTEL_EXPORTER_OTLP_ENDPOINT.
Without the setting no more of it is imported than FastAPI imports itself, and no request costs anything.
"""

import os
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from fastapi.telemetry import TelemetryConfig

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
"""Routes that are asked every few seconds."""
OFF: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "operation_spans": False}
"""Also of an application with traces: figures are Prometheus's, and FastAPI's logs have what clients have sent."""


def telemetry(otel: bool, exporter: "SpanExporter | None" = None) -> TelemetryConfig:
    """Return FastAPI's option. `exporter`: in the place of the one over HTTP, for tests."""
    if not otel:
        return OFF
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.environment_variables import OTEL_SERVICE_NAME
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

    class WithoutQuery(SpanProcessor):
        """Empties the query of each span: a client may have put its key there."""

        def on_start(self, span: Span, parent_context: Any = None) -> None:
            span.set_attribute("url.query", "")

    os.environ.setdefault(OTEL_SERVICE_NAME, "distillery")
    provider = TracerProvider(resource=Resource.create())
    provider.add_span_processor(WithoutQuery())
    provider.add_span_processor(SimpleSpanProcessor(exporter) if exporter else BatchSpanProcessor(OTLPSpanExporter()))
    return {**OFF, "tracing": True, "tracer_provider": provider, "auto_configure": False, "exclude": _is_probe}


def _is_probe(scope: MutableMapping[str, Any]) -> bool:
    return scope["path"] in PROBES
