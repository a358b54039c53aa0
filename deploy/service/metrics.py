"""What Prometheus can ask for at /metrics."""

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

disable_created_metrics()  # type: ignore[no-untyped-call]  # a line more for each, which nobody asks for


class Metrics:
    """Counters of one service, in a registry of its own."""

    def __init__(self, served: Served) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("ddpm_requests", "Requests answered", ["path", "status"], registry=registry)
        self.seconds = Histogram("ddpm_request_seconds", "Seconds to the answer", ["path"], registry=registry)
        sizes = [2**power for power in range(11)]
        self.batches = Histogram("ddpm_batch_images", "Images of each batch", buckets=sizes, registry=registry)
        self.images = Counter("ddpm_images", "Images made", registry=registry)
        self.waiting = Gauge("ddpm_waiting_images", "Images that wait for their batch", registry=registry)
        registry.register(_ModelCollector(served))

    def batch(self, size: int) -> None:
        """A batch of so many images has been made."""
        self.batches.observe(size)
        self.images.inc(size)

    def text(self) -> bytes:
        """All, in Prometheus' text format."""
        return generate_latest(self._registry)


class _ModelCollector(Collector):
    """Asks, each time, which model is served."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def collect(self) -> list[Metric]:
        model = self._served.current
        info = InfoMetricFamily("ddpm_model", "The model that is served")
        info.add_metric([], {"version": model.version, "weights": model.weights})
        failures = CounterMetricFamily("ddpm_model_update_failures", "Times that the alias could not be followed")
        failures.add_metric([], self._served.failures)
        return [info, failures]
