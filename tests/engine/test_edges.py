"""Where bounds are as small as they may be, and where one request meets another at a bad moment."""

from __future__ import annotations

import os
import threading
from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from engine.test_step import ENDLESS, finish, line_up_tokens, small, step, tokens

from mirada import Image, Message, Sampling, Text
from mirada.engine.prefix import visual
from mirada.engine.prepare import _State
from mirada.engine.sequence import Sequence
from mirada.engine.thread import _Line
from mirada.errors import MessageError, OutOfMemory, RequestFailed, SettingsError
from mirada.types import Prompt, Span

HI = [Message("user", "hi")]
SHORT = Sampling(max_tokens=2)


def nested(depth: int) -> dict:
    """A tool whose parameters go so deep."""
    parameters: dict = {}
    for _ in range(depth):
        parameters = {"properties": parameters}
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


@pytest.mark.parametrize("vlm", ["Keye"], indirect=True)
def test_a_reply_that_is_computed_again_token_by_token(vlm):
    """Beside one that decodes a step has one token for it: each time its next one, not its last."""
    engine = small(vlm, step_tokens=2)
    made = [
        line_up_tokens(engine, tokens(4, seed), max_tokens=length, temperature=1.0, seed=seed)
        for seed, length in ((1, 30), (2, 12))
    ]
    alone = [vlm.generate([one.prompt], replace(one.sampling, **ENDLESS))[0].tokens for one in made]
    while len(made[1].tokens) < 8:
        step(engine)
    engine._engine.engine.scheduler._preempt(made[1])
    finish(engine)
    assert [sequence.output().tokens for sequence in made] == alone


def test_a_place_that_was_kept_is_not_lost_to_one_that_was_preempted():
    """It was announced while there was a place; then one that ran was put back in line."""
    waiting: deque = deque()
    scheduler = SimpleNamespace(waiting=waiting, enter=waiting.append)
    line = _Line(SimpleNamespace(scheduler=scheduler, idle=True, close=lambda error: None), 1)  # pyright: ignore
    sequence = Sequence(Prompt(()), SHORT, None)
    assert line.announce(sequence)
    waiting.append(Sequence(Prompt(()), SHORT, None, preemptions=1))
    line.submit(sequence, announced=True)
    assert sequence.error is None
    line.stop()
    line.join(5)


@pytest.mark.parametrize("vlm", ["Keye"], indirect=True)
def test_an_engine_whose_thread_cannot_begin_says_so_and_tries_again(vlm, monkeypatch):
    engine = small(vlm)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
        error = engine.submit(HI, SHORT).result(5).error
        assert isinstance(error, RequestFailed) and "cannot begin" in error.problem
    assert len(engine.submit(HI, SHORT).result(20).tokens) == 2
    engine.close()


@pytest.mark.parametrize("vlm", ["Keye"], indirect=True)
def test_a_line_of_one_place_serves_as_many_chats_as_are_given(vlm):
    engine = small(vlm, max_waiting=1, max_running=2)
    assert [output.finish for output in engine.generate([HI] * 6, Sampling(max_tokens=2, **ENDLESS))] == ["length"] * 6
    engine.close()


@pytest.mark.parametrize("vlm", ["Keye"], indirect=True)
@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"salt": None}, SettingsError, "salt is a NoneType"),
        ({"salt": "\ud800"}, SettingsError, "surrogate"),
        ({"tools": [nested(5000)]}, MessageError, "nested too deeply"),
    ],
    ids=["no text", "half a character", "deep"],
)
def test_what_no_request_can_have_is_named(vlm, given, kind, said):
    error = vlm.submit(HI, SHORT, **given).result(5).error
    assert isinstance(error, kind) and said in error.problem


class Counted(tuple):
    """Counts how often one of its items is read."""

    reads = 0

    def __getitem__(self, at):
        Counted.reads += 1
        return super().__getitem__(at)

    def __iter__(self):
        Counted.reads += len(self)
        return super().__iter__()


def test_keys_of_a_long_video_look_at_each_of_its_frames_a_few_times():
    """Not at all of them for every block: an hour of video has thousands of both."""
    frames = [Span("video", 8 + 40 * i, (1, 8, 16), 0, frame=i, hash=bytes(32)) for i in range(512)]
    sequence = SimpleNamespace(prompt=SimpleNamespace(spans=Counted(frames)), media=())
    ends = range(16, 8 + 40 * 512, 16)
    found = [visual(sequence, end - 16, end) for end in ends]  # pyright: ignore
    assert Counted.reads < 16 * len(ends)
    seen = [[f for f in frames if f.start < end and f.end > end - 16] for end in ends]
    assert [len(made) for made in found] == [65 * len(there) for there in seen]


@pytest.mark.parametrize("vlm", ["Keye"], indirect=True)
def test_media_that_no_thread_can_prepare_fail_their_request_alone(vlm, monkeypatch):
    engine = small(vlm)
    assert len(engine.submit(HI, SHORT).result(20).tokens) == 2
    seen = [Message("user", [Image(np.zeros((28, 28, 3), np.uint8)), Text("hi")])]
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
        error = engine.submit(seen, SHORT).result(5).error
        assert isinstance(error, RequestFailed) and "no thread can begin" in error.problem
    assert engine.stats()["waiting"] == engine.stats()["preparing"] == 0
    assert len(engine.submit(seen, SHORT).result(20).tokens) == 2
    engine.close()


def test_the_end_of_a_forked_process_waits_for_no_lock_of_its_parent(monkeypatch):
    """There a thread held it, and it is held for ever in the copy."""
    state = _State(SimpleNamespace(retract=lambda: None), 1)  # pyright: ignore
    state.watch()
    with state.changed:
        ending = threading.Thread(target=state.close)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            ending.start()
            ending.join(2)
        waits = ending.is_alive()
    ending.join(5)
    state.close()
    assert not waits


@pytest.mark.parametrize("vlm", ["Keye", "kimi_vl"], indirect=True)
def test_bytes_that_are_just_enough(vlm):
    """One request runs and is never preempted, those behind it wait, also one that would fit; a byte less is refused."""
    long, little = tokens(60), tokens(4)
    made = vlm._requests.make(long, Sampling(max_tokens=40, **ENDLESS), "auto")
    most = vlm._engine.engine.scheduler.budget.alone(made)
    engine = small(vlm, cache_bytes=most)
    line = [line_up_tokens(engine, one, max_tokens=count) for one, count in ((long, 40), (long, 40), (little, 2))]
    scheduler = engine._engine.engine.scheduler
    while not line[0].done:
        assert scheduler.running in ([], line[:1])
        step(engine)
    finish(engine)
    assert [len(sequence.tokens) for sequence in line] == [40, 40, 2] and not scheduler.preemptions
    less = small(vlm, cache_bytes=most - 1)
    refused = line_up_tokens(less, long, max_tokens=40)
    step(less)
    assert isinstance(refused.error, OutOfMemory) and (refused.error.needed, refused.error.available) == (most, most - 1)
