"""Prometheus metrics: requests, batches, the queue, models and reloads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one service, in their own registry."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        made = self.registry
        self.requests = Counter("twotower_requests", "Requests answered.", ("route", "method", "status"), registry=made)
        self.seconds = Histogram(
            "twotower_request_seconds",
            "Time from receiving the headers of a request to sending the last byte of its response.",
            ("route",),
            registry=made,
            buckets=_SECONDS,
        )
        self.batches = Histogram(
            "twotower_batch_size", "Requests searched together.", ("kind",), registry=made, buckets=_SIZES
        )
        self.search_seconds = Histogram(
            "twotower_search_seconds", "Search time of one batch.", ("kind",), registry=made, buckets=_SECONDS
        )
        self.waiting = Gauge("twotower_requests_waiting", "Requests in the queue.", registry=made)
        self.refused = Counter(
            "twotower_requests_refused", "Requests rejected because the queue was full.", registry=made
        )
        self.model = Gauge(
            "twotower_model_info", "1 for the model version in use.", ("model", "version"), registry=made
        )
        self.swaps = Counter(
            "twotower_model_reloads", "Attempts to load a changed model folder.", ("model", "outcome"),
            registry=made,
        )  # fmt: skip

    def swapped(self, model: str, old: str | None, new: str) -> None:
        """Record that a model version is now in use."""
        if old is not None and old != new:
            self.model.remove(model, old)
        self.model.labels(model, new).set(1)

    def text(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)
