"""OpenTelemetry, seen from a collector."""

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

from deploy.service import telemetry
from deploy.service.__main__ import traced
from deploy.service.app import create
from deploy.service.batching import Batcher
from deploy.service.state import Service
from deploy.service.telemetry import Telemetry
from tests.deploy.collector import collecting, plain
from tests.deploy.services import answers, get

pytestmark = pytest.mark.slow  # the services export a model

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@contextmanager
def sending(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Telemetry]:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    found = traced()
    assert found
    try:
        yield found
    finally:
        found.close()


def ask(service: Service, found: Telemetry, *requests: httpx.Request) -> list[httpx.Response]:
    app = create(replace(service, observe=found.observe))
    found.instrument(app)
    try:
        return answers(app, *requests)
    finally:
        FastAPIInstrumentor.uninstrument_app(app)


def test_off_unless_an_endpoint_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert traced() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert traced() is None
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "127.0.0.1:4318")
    with pytest.raises(ValueError, match=r"^OTEL_EXPORTER_OTLP_TRACES_ENDPOINT: must begin with http:// or https://"):
        traced()
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ValueError, match=r"^OTEL_EXPORTER_OTLP_PROTOCOL: must be http/protobuf \(got grpc\)$"):
        traced()


def test_spans_of_a_request(classes: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    sliced = replace(classes, batcher=Batcher(3, 128))  # of at most 3 images
    began = time.time_ns()
    with collecting() as collector:
        with sending(collector.url, monkeypatch) as found:
            asked = get("/images?n=7&seed=1&steps=2", traceparent=f"00-{TRACE}-{PARENT}-01")
            picture, *probes = ask(sliced, found, asked, get("/v2/health/ready"), get("/metrics"))
        assert picture.status_code == 200
        assert {probe.status_code for probe in probes} == {200}
        (root,) = (span for span in collector.spans if span.kind == 2)  # a server's
        queue, *runs = sorted(
            (span for span in collector.spans if span is not root), key=lambda span: span.start_time_unix_nano
        )
        assert (root.name, root.parent_span_id.hex()) == ("GET /images", PARENT)
        sent = plain(root.attributes)
        assert (sent["http.route"], sent["http.response.status_code"]) == ("/images", 200)
        assert sent["url.query"] == "REDACTED"
        assert [queue.name, *(run.name for run in runs)] == ["queue", "run", "run", "run"]
        for span in (queue, *runs):
            assert (span.trace_id.hex(), span.parent_span_id) == (TRACE, root.span_id)
            assert began < root.start_time_unix_nano <= span.start_time_unix_nano
            assert span.start_time_unix_nano <= span.end_time_unix_nano <= root.end_time_unix_nano
        assert queue.end_time_unix_nano <= runs[0].start_time_unix_nano
        sizes = [plain(run.attributes) for run in runs]
        assert [each["ddpm.images"] for each in sizes] == [3, 3, 1]
        expected = {"ddpm.model": "ddpm", "ddpm.version": "a" * 12, "ddpm.steps": 2}
        assert all(expected.items() <= each.items() for each in sizes)
        resource = plain(collector.traces[0].resource_spans[0].resource.attributes)
        assert resource["service.name"] == "ddpm"
        named = {
            metric.name
            for sent in collector.metrics
            for each in sent.resource_metrics
            for one in each.scope_metrics
            for metric in one.metrics
        }
        assert "http.server.request.duration" in named
        assert not [name for name in named if name.startswith("ddpm")]  # those are Prometheus's


def test_spans_of_a_stream(classes: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as collector, sending(collector.url, monkeypatch) as found:
        (answer,) = ask(classes, found, get("/images/stream?n=2&steps=4&every=2"))
        assert answer.text.index("event: progress") < answer.text.index("event: done")
        found.close()
        (root,) = (span for span in collector.spans if span.kind == 2)
        runs = [span for span in collector.spans if span.name == "run"]
        assert [plain(run.attributes)["ddpm.evaluations"] for run in runs] == [2, 2]
        assert {run.parent_span_id for run in runs} == {root.span_id}


def test_only_traces(classes: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    with collecting() as collector:
        with sending(collector.url, monkeypatch) as found:
            ask(classes, found, get("/images?n=1"))
        assert (len(collector.traces), len(collector.metrics)) == (1, 0)


def test_the_log_names_the_trace(classes: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str]()
    monkeypatch.setattr("deploy.service.logs.request", lambda *_: seen.append(Telemetry.trace_id()))
    with collecting() as collector, sending(collector.url, monkeypatch) as found:
        ask(replace(classes, log_requests=True), found, get("/v2", traceparent=f"00-{TRACE}-{PARENT}-01"))
    assert seen == [TRACE]
    assert Telemetry.trace_id() == ""


def test_a_collector_that_is_down_is_named_once(
    classes: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    with collecting(400) as collector:
        with sending(collector.url, monkeypatch) as found:
            for _ in range(3):
                (answer,) = ask(classes, found, get("/images?n=1"))
                assert answer.status_code == 200
            while len(collector.traces) < 9:
                time.sleep(0.01)
            collector.status = 200
            ask(classes, found, get("/v2"))
        lines = [record.getMessage() for record in caplog.records if "OpenTelemetry" in record.getMessage()]
        assert lines == [
            "the OpenTelemetry collector does not accept traces; they are dropped until it does",
            "the OpenTelemetry collector accepts traces again",
        ]
        assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]


def test_a_collector_that_never_answers_does_not_hold_up_the_end(
    classes: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "FLUSH_SECONDS", 0.2)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with sending(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch) as found:
            ask(classes, found, get("/images?n=1"))
            began = time.monotonic()
        assert time.monotonic() - began < 3
