"""Traces by OpenTelemetry, if the setting `otel` is on: a span for each request, with its route and status.

The library reads where they go from its own variables, such as OTEL_EXPORTER_OTLP_ENDPOINT. Without the setting none
of it is imported here (FastAPI imports its API where that is installed).
"""

import os
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

EXCLUDED = "/healthz$,/readyz$,/metrics$"
"""Routes that are asked every few seconds."""


def install(app: FastAPI, exporter: "SpanExporter | None" = None) -> None:
    """Trace the requests of the application. `exporter`: in the place of the one over HTTP, for tests."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    from opentelemetry.sdk.environment_variables import OTEL_SERVICE_NAME
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

    os.environ.setdefault(OTEL_SERVICE_NAME, "distillery")
    provider = TracerProvider(resource=Resource.create())
    provider.add_span_processor(SimpleSpanProcessor(exporter) if exporter else BatchSpanProcessor(OTLPSpanExporter()))
    parts: list[Literal["receive", "send"]] = ["receive", "send"]
    FastAPIInstrumentor.instrument_app(
        app, tracer_provider=provider, excluded_urls=EXCLUDED, exclude_spans=parts, server_request_hook=_without_query
    )


def _without_query(span: "Span", scope: dict[str, Any]) -> None:
    """Leave the query out of the span: a client may have put its key there."""
    if span.is_recording():
        span.set_attribute("http.url", f"{scope['scheme']}://{scope['server'][0]}{scope['path']}")
