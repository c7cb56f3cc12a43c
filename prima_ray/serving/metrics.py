"""What an operator sees at `/metrics`. No label holds an attribute, a file name or anything else of a patient.

A registry an app: nothing is registered at import, and two apps in one process do not mix.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from prima_ray.serving.drift import DriftMonitor
from prima_ray.serving.engine import Answer, Served

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64)
_SHARES = tuple(step / 10 for step in range(1, 11))


class Metrics:
    """Counts and times of one app."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._version, self._monitor = "", DriftMonitor(None)
        self._registry = registry
        self._requests = Counter(
            "prima_requests", "Requests by route, method and status.", ("route", "method", "status"), registry=registry
        )
        self._refused = Counter(
            "prima_refused", "Requests that were refused, by reason.", ("reason",), registry=registry
        )
        self._seconds = Histogram(
            "prima_request_seconds", "Whole requests.", ("route",), buckets=_SECONDS, registry=registry
        )
        self._stages = Histogram(
            "prima_stage_seconds", "Parts of a diagnosis.", ("stage",), buckets=_SECONDS, registry=registry
        )
        self._batches = Histogram("prima_batch_size", "Exams that shared a batch.", buckets=_SIZES, registry=registry)
        self._under_way = Gauge("prima_requests_under_way", "Diagnoses that are waited for.", registry=registry)
        self._confidence = Histogram(
            "prima_confidence", "Probability of the prediction.", ("model",), buckets=_SHARES, registry=registry
        )
        self._predictions = Counter("prima_predictions", "Predictions.", ("model", "diagnosis"), registry=registry)
        self._abstentions = Counter("prima_abstentions", "Abstentions.", ("model", "reason"), registry=registry)
        self._missing = Counter(
            "prima_attributes_missing", "Attributes that the model reads and was not given.", ("attribute",),
            registry=registry,
        )  # fmt: skip
        self._drift = Gauge(
            "prima_drift", "Stability index of the last exams against training; above 0.25 much has changed", ("what",),
            registry=registry,
        )  # fmt: skip
        self._models = Gauge(
            "prima_model", "1 for the model that is served.", ("model", "version", "data_version"), registry=registry
        )
        self._ready = Gauge("prima_ready", "1 where the known exam is predicted as at training.", registry=registry)
        self._switches = Counter("prima_switches", "Switches to another model.", ("outcome",), registry=registry)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        for what, distance in self._monitor.distances().items():
            self._drift.labels(what).set(distance)
        return generate_latest(self._registry)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def stages(self, seconds: Mapping[str, float]) -> None:
        for stage, value in seconds.items():
            self._stages.labels(stage).observe(value)

    def under_way(self, change: int) -> None:
        self._under_way.inc(change)

    def answered(self, answer: Answer) -> None:
        fields, model = answer.fields, answer.card.version
        self._batches.observe(answer.batch_size)
        self.stages(answer.seconds)
        self._confidence.labels(model).observe(max(fields["probabilities"].values()))
        self._predictions.labels(model, fields["prediction"]).inc()
        for reason in fields["reasons"]:
            self._abstentions.labels(model, reason["cause"]).inc()
        for name in fields["attributes_missing"]:
            self._missing.labels(name).inc()
        self._monitor.add(answer.drift)

    def serves(self, served: Served) -> None:
        """Another model, or still the same one."""
        card = served.card
        if card.version == self._version:
            return
        self._version, self._monitor = card.version, DriftMonitor(served.reference)
        self._drift.clear()
        self._models.clear()
        self._models.labels(card.name, card.version, card.data_version or "").set(1)

    def ready(self, is_ready: bool) -> None:
        self._ready.set(is_ready)

    def switched(self, outcome: str) -> None:
        self._switches.labels(outcome).inc()
