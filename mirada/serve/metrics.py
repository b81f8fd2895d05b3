"""Figures of one server in Prometheus' text form. Each application has a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mirada.types import Output

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_NOW = ("running", "waiting", "preparing", "workers")
"""Of ``VLM.stats()``: what goes up and down, beside everything in bytes; the rest only counts up."""


class Counting(Protocol):
    def stats(self) -> dict[str, int]: ...


class Metrics:
    """Counts requests and times; what the engines know of themselves is read when somebody asks."""

    def __init__(self, models: Mapping[str, Counting]) -> None:
        self.registry = registry = CollectorRegistry(auto_describe=False)
        self.requests = Counter("mirada_requests", "Replies by route and status.", ["path", "status"], registry=registry)
        self.under_way = Gauge("mirada_requests_under_way", "Requests that were let in.", registry=registry)
        self.tokens = Counter("mirada_tokens", "Tokens of prompts and answers.", ["model", "kind"], registry=registry)
        self.finished = Counter("mirada_answers", "Answers by how they ended.", ["model", "finish"], registry=registry)
        self.first_token = Histogram(
            "mirada_time_to_first_token_seconds", "From request to first token.", ["model"], buckets=_LONG, registry=registry
        )
        self.inter_token = Histogram(
            "mirada_inter_token_seconds", "Between pieces of a streamed answer.", ["model"], buckets=_SHORT, registry=registry
        )
        self.per_token = Histogram(
            "mirada_time_per_output_token_seconds", "Mean of an answer after its first token.", ["model"], buckets=_SHORT,
            registry=registry,
        )  # fmt: skip
        self.whole = Histogram(
            "mirada_answer_seconds", "From request to last token.", ["model"], buckets=_LONG, registry=registry
        )
        self.stage = Histogram(
            "mirada_stage_seconds", "Seconds of a request by stage.", ["model", "stage"], buckets=_LONG, registry=registry
        )
        registry.register(_Engines(models))

    def note(self, model: str, output: Output) -> None:
        """Count one answer that has ended, well or not."""
        self.finished.labels(model, output.finish).inc()
        usage, times = output.usage, output.metrics
        reasoning = usage.reasoning_tokens
        for kind, count in (
            ("prompt", usage.prompt_tokens), ("image", usage.image_tokens), ("video", usage.video_tokens),
            ("completion", usage.completion_tokens), ("reasoning", reasoning),
        ):  # fmt: skip
            self.tokens.labels(model, kind).inc(count)
        for name, seconds in times.items():
            if name not in ("first_token", "total"):
                self.stage.labels(model, name).observe(seconds)
        if (first := times.get("first_token")) is not None:
            self.first_token.labels(model).observe(first)
            if usage.completion_tokens > 1:
                self.per_token.labels(model).observe((times["total"] - first) / (usage.completion_tokens - 1))
        self.whole.labels(model).observe(times.get("total", 0.0))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engines:
    """Reads ``stats()`` of every model when it is scraped."""

    def __init__(self, models: Mapping[str, Counting]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        found: dict[str, Any] = {}
        for model, vlm in self._models.items():
            for name, value in vlm.stats().items():
                if name not in found:
                    now = name in _NOW or name.endswith("_bytes")
                    kind = GaugeMetricFamily if now else CounterMetricFamily
                    found[name] = kind(f"mirada_engine_{name}", "VLM.stats(): see docs/engine.md.", labels=["model"])
                found[name].add_metric([model], value)
        yield from found.values()
