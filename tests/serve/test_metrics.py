"""What ``/metrics`` says of a real server, held against the answers that it gave; and docs/serve.md, against what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import data_uri, image, png, user

from mirada import Message
from mirada.serve.metrics import RATE_SECONDS, Metrics
from mirada.types import Output, Usage

DOCS = Path(__file__).parents[2] / "docs" / "serve.md"
CALLS = 3


def figures(server) -> dict[tuple[str, frozenset], float]:
    """(name, labels) -> value."""
    families = text_string_to_metric_families(server.get("/metrics").text)
    return {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}


@pytest.fixture(scope="module")
def told(server, client):
    """``told(name, label=...)``: how much that figure rose by ``CALLS`` answers, of which the last was streamed; and their
    usages."""
    before = figures(server)
    # Of a size and colour of its own: others ask this server too.
    picture = user("What is it? say:Red, and quite large.", image(data_uri(png((94, 58), (13, 201, 77)))))
    usages = [client.chat.completions.create(model="echo", messages=picture).usage for _ in range(CALLS - 1)]
    stream = client.chat.completions.create(model="echo", messages=picture, stream=True, stream_options={"include_usage": True})
    usages.append(list(stream)[-1].usage)
    after = figures(server)

    def rise(name: str, **labels: str) -> float:
        key = (f"mirada_{name}", frozenset(labels.items()))
        assert key in after, (key, sorted(name for name, _ in after))
        return after[key] - before.get(key, 0)

    rise.usages = usages
    return rise


def test_tokens_and_answers_are_those_of_the_usages(told):
    sums = {
        "prompt": sum(one.prompt_tokens for one in told.usages),
        "completion": sum(one.completion_tokens for one in told.usages),
        "image": sum(one.model_dump()["prompt_tokens_details"]["image_tokens"] for one in told.usages),
        "video": 0, "reasoning": 0,
    }  # fmt: skip
    assert sums["image"] > 0
    assert {kind: told("tokens_total", model="echo", kind=kind) for kind in sums} == sums
    assert told("answers_total", model="echo", finish="stop") == CALLS
    assert told("requests_total", path="/v1/chat/completions", status="200") == CALLS
    assert told("engine_generated_tokens_total", model="echo") >= sums["completion"] - CALLS  # the end is no text


@pytest.mark.parametrize("name", ["time_to_first_token_seconds", "time_per_output_token_seconds", "answer_seconds"])
def test_times_of_every_answer_are_in_their_histogram(told, name):
    assert told(f"{name}_count", model="echo") == CALLS
    assert 0 < told(f"{name}_sum", model="echo") < 120
    assert told(f"{name}_bucket", model="echo", le="+Inf") == CALLS


def test_pieces_of_the_stream_are_in_theirs(told):
    pieces = told("inter_token_seconds_count", model="echo")
    assert 2 <= pieces <= told.usages[-1].completion_tokens
    assert told("inter_token_seconds_sum", model="echo") > 0


def test_a_first_token_takes_no_longer_than_its_answer(told):
    first, whole = (told(f"{name}_seconds_sum", model="echo") for name in ("time_to_first_token", "answer"))
    assert first <= whole


def test_stages_are_told_apart(told):
    for stage in ("queue", "render", "prefill", "decode"):
        assert told("stage_seconds_count", model="echo", stage=stage) == CALLS, stage
    for stage in ("prepare", "encode"):  # of the same picture once
        assert told("stage_seconds_count", model="echo", stage=stage) == 1, stage


def test_caches_say_what_they_found_and_hold(told, server):
    assert told("engine_pixel_cache_hits_total", model="echo") >= CALLS - 1
    assert told("engine_prefix_cache_hits_total", model="echo") >= CALLS - 1
    for name in ("pixel_cache", "encoder_cache", "prefix_cache"):
        assert server.stats("echo")[f"{name}_bytes"] > 0


def test_nothing_is_under_way_afterwards(told, server):
    now = figures(server)
    for name in ("running", "waiting", "preparing"):
        assert now[f"mirada_engine_{name}", frozenset({("model", "echo")})] == 0
    assert now["mirada_requests_under_way", frozenset()] == 0
    assert now["mirada_engine_tokens_per_second", frozenset({("model", "echo")})] >= 0


def test_the_documentation_names_every_figure_and_no_other(told, server):
    text = DOCS.read_text().partition("\n## Metrics\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"^\| `(mirada_[a-z_]+)`", text, re.MULTILINE))
    families = list(text_string_to_metric_families(server.get("/metrics").text))
    given = {f"{one.name}_total" if one.type == "counter" else one.name for one in families}
    given = {name for name in given if not name.endswith("_created")}
    assert named <= given
    engine = {name for name in given if name.startswith("mirada_engine_")}  # of these docs/engine.md has the rest
    assert given - engine <= named and len(named & engine) > 20


# ---- tokens per second, without a server


class Engine:
    generated = 0

    def stats(self) -> dict[str, int]:
        return {"generated_tokens": self.generated}


def rate(metrics: Metrics) -> float:
    found = re.search(r'^mirada_engine_tokens_per_second\{model="m"\} (\S+)$', metrics.text().decode(), re.MULTILINE)
    assert found
    return float(found[1])


def test_tokens_per_second_are_those_of_the_last_ten_seconds():
    engine, now = Engine(), [100.0]
    metrics = Metrics({"m": engine}, clock=lambda: now[0])
    for _ in range(30):  # somebody looks every second
        now[0] += 1
        engine.generated += 50
        seen = rate(metrics)
    assert seen == pytest.approx(50)
    for _ in range(round(RATE_SECONDS / 2)):
        now[0] += 1
        seen = rate(metrics)
    assert seen == pytest.approx(25)
    for _ in range(round(RATE_SECONDS / 2)):
        now[0] += 1
        seen = rate(metrics)
    assert seen == 0


def test_a_server_that_idled_for_long_says_none_though_nobody_looked():
    engine, now = Engine(), [100.0]
    metrics = Metrics({"m": engine}, clock=lambda: now[0])
    now[0] += 5
    engine.generated = 1000
    metrics.note("m", Output(Message("assistant", "x"), (), None, "stop", Usage(), {"total": 1.0}))
    now[0] += 3600
    assert rate(metrics) == 0
