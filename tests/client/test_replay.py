"""A log of exchanges answers as the model did, or says that it cannot."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image as Pillow

from mirada import errors
from mirada.client import FakeClient, ReplayClient
from mirada.types import Image, Logprob, Message, Output, Sampling, Text, ToolCall, Usage

HI = [Message("user", "hi")]
WHOLE = Output(
    Message("assistant", (Text("é"), ToolCall("f", '{"a": 1}', "c")), reasoning="hm"),
    (1, 2),
    (Logprob(1, -0.5, ((1, -0.5), (2, -1.0)), ("a", "b", "c")),),
    "tool_calls",
    Usage(3, 2, 1, 4, 5, 6, ((0.0, 0.5),)),
    {"total": 0.5},
    notes=("turned upright",),
    raw="é",
)


def record(path, *script, chat=HI, sampling=None, **options):
    with ReplayClient(path, FakeClient(script)) as client:
        return [client.submit(chat, sampling, **options).result(5) for _ in script]


def test_what_was_recorded_is_replayed_whole(tmp_path):
    log = tmp_path / "log.jsonl"
    record(log, WHOLE, sampling=Sampling(logprobs=1))
    handle = ReplayClient(log).submit(HI, Sampling(logprobs=1))
    output = handle.result()
    assert output == WHOLE and "".join(delta.text for delta in handle) == "é"


def test_a_log_that_is_closed_meanwhile_ends_the_request(tmp_path):
    """Its answer cannot be written down any more: that is said, and nobody waits for ever."""
    client = ReplayClient(tmp_path / "log.jsonl", FakeClient(["eins zwei"], latency=0.05))
    handle = client.submit(HI)
    client.close()
    error = handle.result(5).error
    assert isinstance(error, errors.RemoteError) and "cannot be written down" in error.problem


def test_recording_streams_and_asks_only_once(tmp_path):
    inner = FakeClient(["eins zwei"], latency=0.005)
    with ReplayClient(tmp_path / "log.jsonl", inner) as client:
        assert len(list(client.submit(HI))) > 2
        assert client.submit(HI).result().message.text == "eins zwei" and len(inner.requests) == 1
        for other in ({"thinking": "on"}, {"sampling": Sampling(seed=2)}, {"chat": [*HI, *HI]}):
            chat, sampling = other.pop("chat", HI), other.pop("sampling", None)
            assert isinstance(client.submit(chat, sampling, **other).result(5).error, errors.RequestFailed)
    assert len(inner.requests) == 4


def test_errors_are_replayed_and_asked_again_while_recording(tmp_path):
    log = tmp_path / "log.jsonl"
    record(log, errors.OutOfMemory("no room", "less"))
    error = ReplayClient(log).submit(HI).result().error
    assert isinstance(error, errors.OutOfMemory) and str(error) == "no room. less"
    assert record(log, "now")[0].message.text == "now"
    assert len(log.read_bytes().splitlines()) == 2


def test_chance_gets_each_answer_once(tmp_path):
    log, warm = tmp_path / "log.jsonl", Sampling(temperature=1.0)
    record(log, "a", "b", sampling=warm)
    client = ReplayClient(log)
    assert [client.submit(HI, warm).result().message.text for _ in range(2)] == ["a", "b"]
    error = client.submit(HI, warm).result().error
    assert isinstance(error, errors.NotRecorded) and "holds 2 answers" in str(error)


def test_what_is_missing_names_the_nearest(tmp_path):
    log = tmp_path / "log.jsonl"
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert "empty" in str(ReplayClient(empty).submit(HI).result().error)
    record(log, "a", chat=[Message("user", "What colour is the sign?")])
    record(log, "b", chat=[Message("user", "How many boats?")])
    error = ReplayClient(log).submit([Message("user", "What colour is the sign")], Sampling(top_k=3)).result().error
    assert isinstance(error, errors.NotRecorded)
    assert "'What colour is the sign?' there, 'What colour is the sign' here" in str(error)
    error = ReplayClient(log).submit([Message("user", "How many boats?")], Sampling(top_k=3)).result().error
    assert "sampling" in str(error)


def test_media_are_known_by_their_content(tmp_path):
    path, log = tmp_path / "a.png", tmp_path / "log.jsonl"
    Pillow.new("RGB", (4, 3), (9, 8, 7)).save(path)

    def chat(source):
        return [Message("user", (Image(source), Text("x")))]

    record(log, "red", chat=chat(str(path)))
    assert b"base64" not in log.read_bytes()
    moved = path.rename(tmp_path / "b.png")
    client = ReplayClient(log)
    for same in (str(moved), moved.read_bytes(), moved):
        assert client.submit(chat(same)).result().message.text == "red"
    for other in (np.zeros((3, 4, 3), np.uint8), "http://h/a.png"):
        assert isinstance(client.submit(chat(other)).result().error, errors.NotRecorded)
    assert isinstance(client.submit(chat("none.png")).result().error, errors.MediaNotFound)


def test_a_torn_line_is_left_out_and_mended(tmp_path):
    log = tmp_path / "log.jsonl"
    record(log, "a")
    whole = log.read_bytes()
    log.write_bytes(whole + whole[:50])
    assert ReplayClient(log).submit(HI).result().message.text == "a"
    record(log, "b", chat=[*HI, *HI])
    assert len([json.loads(line) for line in log.read_bytes().splitlines()]) == 2


def test_a_log_that_was_changed_or_is_none(tmp_path):
    log = tmp_path / "log.jsonl"
    record(log, "a")
    log.write_text(log.read_text().replace('"hi"', '"ho"'))
    with pytest.raises(errors.MessageError, match="does not fit its key"):
        ReplayClient(log)
    log.write_text("{}\n")
    with pytest.raises(errors.MessageError, match=r"log\.jsonl:1 is no exchange"):
        ReplayClient(log)
    with pytest.raises(errors.MessageError, match="cannot be read"):
        ReplayClient(tmp_path / "none.jsonl")


def test_a_cancelled_answer_is_not_written(tmp_path):
    log = tmp_path / "log.jsonl"
    with ReplayClient(log, FakeClient("ab" * 500, latency=0.01)) as client:
        handle = client.submit(HI)
        next(iter(handle))
        handle.cancel()
        assert handle.result(5).finish == "cancelled"
    assert log.read_bytes() == b""
