"""Figures of one server in Prometheus' text form. Each application has a registry of its own."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mirada.engine.counts import is_moment
from mirada.types import Output

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
RATE_SECONDS = 10.0
"""Over which tokens per second are told."""


class Counting(Protocol):
    def stats(self) -> dict[str, int]: ...


class Metrics:
    """Counts requests and times; what the engines know of themselves is read when somebody asks."""

    def __init__(self, models: Mapping[str, Counting], clock: Callable[[], float] = time.monotonic) -> None:
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
        self.live_connections = Gauge("mirada_live_connections", "Live connections that are open.", registry=registry)
        self.live_bytes = Gauge("mirada_live_bytes", "Frames that live connections hold.", registry=registry)
        self.live_frames = Counter(
            "mirada_live_frames", "Frames that came: kept, left_out (too fast) or refused.", ["outcome"], registry=registry
        )
        self.live_questions = Counter(
            "mirada_live_questions", "Answers to live questions by status; 499: stopped, or the client had gone.", ["status"],
            registry=registry,
        )  # fmt: skip
        self._engines = _Engines(models, clock)
        registry.register(self._engines)

    def note(self, model: str, output: Output) -> None:
        """Count one answer that has ended, well or not."""
        self._engines.look()
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
    """Reads ``stats()`` of every model when it is scraped. Tokens per second are what was generated since a look at least
    ``RATE_SECONDS`` ago; one is taken with each answer that ends and each scrape, so a server that idles says 0."""

    def __init__(self, models: Mapping[str, Counting], clock: Callable[[], float]) -> None:
        self._models, self._clock = models, clock
        self._looks: deque[tuple[float, dict[str, int]]] = deque(maxlen=64)
        self.look()

    def look(self) -> None:
        """Remember how many tokens there are now, at most once a second."""
        now = self._clock()
        if not self._looks or now - self._looks[-1][0] >= 1:
            self._looks.append((now, {model: vlm.stats().get("generated_tokens", 0) for model, vlm in self._models.items()}))

    def collect(self) -> Iterator[Metric]:
        stats = {model: vlm.stats() for model, vlm in self._models.items()}
        found: dict[str, Any] = {}
        for model, counts in stats.items():
            for name, value in counts.items():
                if name not in found:
                    kind = GaugeMetricFamily if is_moment(name) else CounterMetricFamily
                    found[name] = kind(f"mirada_engine_{name}", "VLM.stats(): see docs/engine.md.", labels=["model"])
                found[name].add_metric([model], value)
        yield from found.values()
        yield self._rate({model: counts.get("generated_tokens", 0) for model, counts in stats.items()})
        self.look()

    def _rate(self, generated: Mapping[str, int]) -> Metric:
        now, looks = self._clock(), list(self._looks)
        then, before = next((one for one in reversed(looks) if now - one[0] >= RATE_SECONDS), looks[0])
        rate = GaugeMetricFamily(
            "mirada_engine_tokens_per_second", "Generated over the last ten seconds, or since the last look before.",
            labels=["model"],
        )  # fmt: skip
        for model, tokens in generated.items():
            rate.add_metric([model], (tokens - before[model]) / max(now - then, 1e-3))
        return rate
