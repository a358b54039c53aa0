"""Prometheus metrics, served at /metrics."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from deploy.service.models import Served

disable_created_metrics()  # type: ignore[no-untyped-call]  # drops an extra _created line per metric


class Metrics:
    """Metrics of one service, in a separate registry."""

    def __init__(self, served: Served) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("ddpm_requests", "Requests answered", ["path", "status"], registry=registry)
        self.seconds = Histogram("ddpm_request_seconds", "Seconds until the response", ["path"], registry=registry)
        sizes = [2**power for power in range(11)]
        self.batches = Histogram("ddpm_batch_images", "Images per batch", buckets=sizes, registry=registry)
        self.images = Counter("ddpm_images", "Images generated", registry=registry)
        self.waiting = Gauge("ddpm_waiting_images", "Images waiting in the queue", registry=registry)
        self.keys = Counter("ddpm_key_failures", "Requests refused for their key", ["reason"], registry=registry)
        registry.register(_ModelCollector(served))

    def batch(self, size: int) -> None:
        """Record a batch of `size` images."""
        self.batches.observe(size)
        self.images.inc(size)

    def text(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self._registry)


class _ModelCollector(Collector):
    """Reports the model served at the time of each scrape."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def collect(self) -> list[Metric]:
        model = self._served.current
        info = InfoMetricFamily("ddpm_model", "The model being served")
        info.add_metric([], {"version": model.version, "weights": model.weights})
        failures = CounterMetricFamily("ddpm_model_update_failures", "Failed attempts to follow the alias")
        failures.add_metric([], self._served.failures)
        return [info, failures]
