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

from deploy.service.served import Models

disable_created_metrics()  # type: ignore[no-untyped-call]  # drops an extra _created line per metric


class Metrics:
    """Metrics of one service, in a separate registry."""

    def __init__(self, models: Models) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("ddpm_requests", "Requests answered", ["path", "status"], registry=registry)
        self.seconds = Histogram("ddpm_request_seconds", "Seconds until the response", ["path"], registry=registry)
        sizes = [2**power for power in range(11)]
        self.batches = Histogram("ddpm_batch_images", "Images per batch", buckets=sizes, registry=registry)
        self.images = Counter("ddpm_images", "Images generated for responses", ["model"], registry=registry)
        self.waiting = Gauge("ddpm_waiting_images", "Images waiting in the queue", registry=registry)
        self.cached = Counter("ddpm_cached", "Responses to /images from the cache", registry=registry)
        self.keys = Counter("ddpm_key_failures", "Requests refused for their key", ["reason"], registry=registry)
        registry.register(_ModelCollector(models))

    def batch(self, size: int) -> None:
        """Record a batch of `size` images."""
        self.batches.observe(size)

    def text(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self._registry)


class _ModelCollector(Collector):
    """Reports the models served at the time of each scrape."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> list[Metric]:
        labels = ["model", "alias"]
        info = InfoMetricFamily("ddpm_model", "The models being served", labels=labels)
        failures = CounterMetricFamily("ddpm_model_update_failures", "Failed attempts to follow aliases", labels=labels)
        for each in self._models.served:
            of, model = [each.name, each.alias or ""], each.current
            facts = {"version": model.version, "weights": model.weights, "provider": model.provider}
            info.add_metric(of, {**facts, "device": model.device, "threads": str(model.threads.number)})
            if each.alias:  # others never change, and may have the same labels
                failures.add_metric(of, each.failures)
        return [info, failures]
