"""Where bounds are as small as they may be, and where one request meets another at a bad moment."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import pytest
from engine.test_step import ENDLESS, finish, line_up_tokens, small, step, tokens

from mirada import Message, Sampling
from mirada.engine.sequence import Sequence
from mirada.engine.thread import _Line
from mirada.errors import RequestFailed
from mirada.types import Prompt

HI = [Message("user", "hi")]
SHORT = Sampling(max_tokens=2)


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
