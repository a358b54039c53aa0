"""OpenTelemetry: a span for each request, with its time in the queue and each run of the model, and HTTP metrics.

Imported only if the environment names a collector. The standard variables configure it:
https://opentelemetry.io/docs/languages/sdk-configuration/
"""

import logging
import os
import threading
import time
from collections.abc import Sequence

from fastapi import FastAPI
from opentelemetry import context, trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from starlette.types import Scope

from deploy.service.work import Observe, Span

log = logging.getLogger("ddpm.service")
PREFIX = "OTEL_EXPORTER_OTLP"
FLUSH_SECONDS = 3.0
"""How long the end of the service waits until the last spans and metrics are sent."""
EXCLUDED = "/v2/health/(live|ready)$,/metrics$"
"""URLs without spans and metrics: they are asked every few seconds."""


class Collector:
    """Whether a collector accepts what it is sent; a change is logged once."""

    def __init__(self, kind: str) -> None:
        self._kind, self._failed = kind, False
        self.left = False
        """Nothing is logged any more."""

    def note(self, failed: bool) -> None:
        if self.left:
            return
        if failed and not self._failed:
            log.warning("the OpenTelemetry collector does not accept %s; they are dropped until it does", self._kind)
        elif self._failed and not failed:
            log.info("the OpenTelemetry collector accepts %s again", self._kind)
        self._failed = failed


class Spans(OTLPSpanExporter):
    """Sends spans by OTLP over HTTP."""

    def __init__(self, collector: Collector) -> None:
        super().__init__()
        self._collector = collector

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        self._collector.note(result is not SpanExportResult.SUCCESS)
        return result


class Readings(OTLPMetricExporter):
    """Sends metrics by OTLP over HTTP."""

    def __init__(self, collector: Collector) -> None:
        super().__init__()
        self._collector = collector

    def export(
        self, metrics_data: MetricsData, timeout_millis: float | None = 10_000, **kwargs: object
    ) -> MetricExportResult:
        result = super().export(metrics_data, timeout_millis, **kwargs)
        self._collector.note(result is not MetricExportResult.SUCCESS)
        return result


class Telemetry:
    """Providers of its own: MLflow uses the global ones."""

    def __init__(self) -> None:
        os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http")  # the names that are stable
        os.environ.setdefault("OTEL_SERVICE_NAME", "ddpm")
        resource = Resource.create()
        self._traces = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._collectors = traces, metrics = Collector("traces"), Collector("metrics")
        if _wanted("TRACES"):
            self._traces.add_span_processor(BatchSpanProcessor(Spans(traces)))
        readers = [PeriodicExportingMetricReader(Readings(metrics))] if _wanted("METRICS") else []
        self._metrics = MeterProvider(readers, resource, shutdown_on_exit=False)
        self._tracer = self._traces.get_tracer("ddpm.service")
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # Collector says it once

    def instrument(self, app: FastAPI) -> None:
        """Trace the requests of an application."""

        def hide_query(span: trace.Span, scope: Scope) -> None:
            if scope.get("query_string"):  # may have a secret by mistake
                span.set_attribute("url.query", "REDACTED")

        FastAPIInstrumentor.instrument_app(
            app,
            server_request_hook=hide_query,
            tracer_provider=self._traces,
            meter_provider=self._metrics,
            excluded_urls=EXCLUDED,
            exclude_spans=["receive", "send"],
        )

    def observe(self, model: str, version: str) -> Observe:
        """What to call for each slice of a request's work that was done, which begins to wait now."""
        parent, came = context.get_current(), time.time_ns()
        waited = False
        attributes = {"ddpm.model": model, "ddpm.version": version}

        def done(began: float, seconds: float, images: int, part: Span, joined: int) -> None:
            nonlocal waited
            start = time.time_ns() - round((time.perf_counter() - began) * 1e9)
            if not waited:
                self._tracer.start_span("queue", parent, start_time=came).end(max(start, came))
                waited = True
            sizes = {
                "ddpm.images": images,
                "ddpm.steps": part.steps,
                "ddpm.evaluations": part.last - part.first,
                "ddpm.batch_images": joined,
            }
            span = self._tracer.start_span("run", parent, attributes={**attributes, **sizes}, start_time=start)
            span.end(start + round(seconds * 1e9))

        return done

    @staticmethod
    def trace_id() -> str:
        """The id of the current trace; empty outside of one."""
        found = trace.get_current_span().get_span_context()
        return trace.format_trace_id(found.trace_id) if found.is_valid else ""

    def close(self) -> None:
        """Send what is left, within FLUSH_SECONDS."""
        ends = time.monotonic() + FLUSH_SECONDS
        closing = [
            threading.Thread(target=provider.shutdown, daemon=True) for provider in (self._traces, self._metrics)
        ]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join(max(0.0, ends - time.monotonic()))
        for collector in self._collectors:
            collector.left = True


def _wanted(kind: str) -> bool:
    """Whether the environment names a collector for traces or metrics."""
    endpoint = os.environ.get(f"{PREFIX}_{kind}_ENDPOINT") or os.environ.get(f"{PREFIX}_ENDPOINT")
    return bool(endpoint) and os.environ.get(f"OTEL_{kind}_EXPORTER", "otlp") == "otlp"
