"""The load on a server still runs, and notices what it is there to notice: a small false server is wrong in every way."""

from __future__ import annotations

import asyncio
import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module("serve_load")
    for name in set(sys.modules) - before:
        if not name.startswith("mirada") and str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            sys.modules.pop(name)


def test_a_short_load_on_a_real_server(tmp_path):
    command = [sys.executable, str(FOLDER / "serve_load.py"), "--smoke", "--csv", str(tmp_path / "load.csv")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAULT" not in done.stdout and " answers are those computed alone" in done.stdout
    with (tmp_path / "load.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["ended"]) > 0 and int(rows[-1]["pending"]) == 0 and float(rows[-1]["rss_mb"]) > 50


def stream(*tokens: int, finish: str | None = "length", end: bool = True) -> bytes:
    """The body of an answer of these tokens, each with its number as text."""
    events = [
        {"choices": [{"delta": {"content": str(token)}, "token_ids": [token], "finish_reason": None}]} for token in tokens
    ]
    events.append({"choices": [{"delta": {}, "finish_reason": finish}], "usage": {"completion_tokens": len(tokens)}})
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + (
        b"data: [DONE]\n\n" if end else b""
    )


def reply(body: bytes, status: int = 200, kind: str = "text/event-stream", more: str = "", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n{more}\r\n".encode() + body


def attack(load, *answers: bytes, seconds: float = 0.2, kinds: dict[str, int] | None = None):
    """What one client notes of a server that gives ``answers``, the last one again and again."""
    right = load.Answer(status=200, text="12", tokens=[1, 2], finish="length", complete=True)
    options = load.parse(["--clients", "1", "--patience", "1"])
    given = iter(answers)

    async def serve(reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = next(
                    int(line.partition(b":")[2]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
                )
                await reader.readexactly(size)
                writer.write(next(given, answers[-1]))
                await writer.drain()
                if b"cut short" in answers[-1]:
                    writer.close()
                    return
        except (asyncio.IncompleteReadError, OSError):
            writer.close()

    async def main():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            crowd = load.Crowd(
                server.sockets[0].getsockname(), [load.Case("text", {})], {}, options, [right], kinds or {"text": 1}
            )
            await crowd.run(seconds)
            return crowd.tally

    load.STREAMED = 1.0
    return asyncio.run(main())


def test_right_answers_are_counted_and_timed(load):
    tally = attack(load, reply(stream(1, 2)))
    assert tally.num_equal == sum(tally.ended.values()) > 0 and not tally.faults and not tally.differing
    assert tally.num_tokens == 2 * tally.num_equal and len(tally.gaps) == len(tally.first["text"]) == tally.num_equal


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply(b'{"error": {"message": "oops"}}', 500, "application/json"), "status 500"),
        (reply(stream(1, 2, end=False)), "without its last event"),
        (reply(stream(1, 2, finish=None)), "no end"),
        (reply(b'data: {"error": {"message": "cut short"}}\n\n'), "cut short"),
        (reply(stream(1, 2), length=9999) + b"cut short", "in the middle of a body"),
        (b"cut short\r\n", "no HTTP"),
        (b"HTTP/1.1 200 X\r\n", "no answer within"),
    ],
    ids=["status", "unfinished", "no finish", "error", "broken off", "no http", "silent"],
)  # fmt: skip
def test_lost_and_broken_answers_are_faults(load, answer, words):
    tally = attack(load, answer)
    assert any(words in fault for fault in tally.faults), tally.faults
    assert not tally.num_equal


def test_a_crossed_answer_is_none_of_those_that_are_right(load):
    tally = attack(load, reply(stream(1, 2)), reply(stream(1, 3)))
    assert tally.num_equal == 1 and {index for index, _ in tally.differing} == {0} and not tally.faults


@pytest.mark.parametrize(("gap", "fault"), [(1e-4, False), (0.5, True)])
def test_only_a_tie_excuses_another_token(load, monkeypatch, gap, fault):
    tally = load.Tally(differing=[(0, load.Answer(tokens=[1, 3], text="13"))])
    right = load.Answer(tokens=[1, 2], text="12")

    async def gap_of(address, body, at):
        assert at == 1 and body["top_logprobs"] == 2
        return gap

    monkeypatch.setattr(load, "_gap", gap_of)
    reference = load.Served("x", subprocess.Popen(["true"]), ("127.0.0.1", 1), Path("x"))
    reference.process.wait()
    ties = load.judge(tally, reference, [load.Case("text", {})], [right], {})
    assert (len(ties), len(tally.faults)) == ((0, 1) if fault else (1, 0))


def test_busy_is_no_fault_where_it_says_when_to_come_back(load):
    busy = reply(b'{"error": {"message": "busy"}}', 429, "application/json", "Retry-After: 1\r\n")
    load.asyncio.sleep, slept = _no_sleep(load.asyncio.sleep)
    try:
        tally = attack(load, busy, busy, reply(stream(1, 2)))
    finally:
        load.asyncio.sleep = slept
    assert tally.ended["429"] == 2 and tally.num_equal and not tally.faults


def _no_sleep(real):
    async def none(seconds):
        await real(0)

    return none, real


def test_wrong_bodies_must_be_refused_as_they_should(load):
    tally = attack(load, reply(stream(1, 2)), kinds={"bad": 1})
    assert sum(count for fault, count in tally.faults.items() if fault.startswith("bad: 200 {} instead of 4")) > 0
    assert sum(tally.faults.values()) >= tally.ended["bad"] > 0


def test_growth_and_its_slope(load):
    recorder = load.Recorder(None, load.Tally())
    recorder.rows = [{"seconds": float(i), "rss_mb": 100.0 + i, "children_mb": 0.0} for i in range(100)]
    memory = recorder.memory
    assert (memory.start, memory.end) == (124.5, 194.5) and memory.slope == pytest.approx(60) and memory.faults
