"""Requests that begin alike and come at once: one computes the beginning, and the others take it from there."""

from __future__ import annotations

import numpy as np
import pytest
from engine.test_step import ENDLESS, finish, line_up, sized, small, step

from mirada import Image, Message, Sampling, Text
from mirada.engine import scheduler as scheduling
from mirada.engine.prefix import BLOCK
from mirada.engine.sequence import Sequence

CACHED = {"prefix_cache_bytes": 1 << 24, "encoder_cache_bytes": 1 << 24}
SHORT = Sampling(max_tokens=4, **ENDLESS)


def questions(count: int, seed: int = 3) -> list[list[Message]]:
    """About one picture and a text that takes more tokens than are worth waiting for."""
    drawn = np.random.default_rng(seed).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    told = "There was a picture of a street by night, and rain on it. " * 6
    return [[Message("user", (Image(drawn), Text(f"{told} {n} times {n}?")))] for n in range(count)]


def taken(sequence: Sequence) -> int:
    """Tokens that others had computed."""
    assert sequence.cached is not None
    return sequence.cached


def test_many_questions_about_one_picture_compute_it_once(vlm):
    alone = [vlm.generate([chat], SHORT)[0].tokens for chat in questions(4)]
    engine = small(vlm, **CACHED, step_tokens=64)
    asked = [line_up(engine, chat, max_tokens=4) for chat in questions(4)]
    patches = sum(len(item.pixels) for item in asked[0].media)
    finish(engine)
    assert [one.output().tokens for one in asked] == alone
    stats = engine._engine.engine.stats()
    rest = [one.num_tokens - taken(one) for one in asked]
    assert taken(asked[0]) == 0 and all(0 < count <= 6 * BLOCK for count in rest[1:])
    assert (
        stats["encoded_patches"] == patches and stats["computed_tokens"] == sum(rest) - 4
    )  # the last token of each reply is not computed


def test_who_begins_otherwise_passes_those_that_wait(either):
    engine = small(either, **CACHED, step_tokens=64)
    same = sized(engine, 400)
    leader, follower = (line_up(engine, same + tail, max_tokens=2) for tail in "ab")
    other = line_up(engine, "hi", max_tokens=2)
    step(engine)
    assert leader.slot >= 0 and follower.slot < 0 and len(other.tokens) == 1
    later = line_up(engine, same + "c", max_tokens=2)
    finish(engine)
    assert all(one.output().error is None for one in (leader, follower, other, later))
    assert taken(follower) > 300 and taken(later) > 300


def test_it_waits_no_longer_than_for_what_both_begin_with(either):
    """The leader is long: its follower begins when what they share is there, not when all is."""
    engine = small(either, **CACHED, step_tokens=64)
    shared = sized(engine, 200)
    leader = line_up(engine, shared + "x" * 1500, max_tokens=1)
    follower = line_up(engine, shared + "y", max_tokens=1)
    while not follower.done:
        step(engine)
    assert taken(follower) >= 176 and not leader.tokens and leader.left > 500
    finish(engine)


@pytest.mark.parametrize("how", ["cancelled", "preempted"])
def test_if_the_leader_goes_another_leads(either, how):
    engine = small(either, **CACHED, step_tokens=64)
    same = sized(engine, 500)
    leader, *others = (line_up(engine, same + tail, max_tokens=2) for tail in "abc")
    step(engine, 2)
    assert leader.slot >= 0 and all(one.slot < 0 for one in others)
    if how == "cancelled":
        leader.cancel()
    else:
        engine._engine.engine.scheduler._preempt(leader)
    step(engine)
    assert [one.slot >= 0 for one in (leader, *others)].count(True) == 1
    finish(engine)
    assert all(one.output().error is None and taken(one) > 400 for one in others[how == "cancelled" :])


@pytest.mark.parametrize("apart", ["salt", "off", "short"])
def test_nobody_waits_for_what_it_cannot_have(either, apart):
    engine = small(either, **(CACHED | ({"prefix_cache_bytes": 0} if apart == "off" else {})), step_tokens=512)
    same = sized(engine, 60 if apart == "short" else 150)
    both = [line_up(engine, same + tail, max_tokens=2) for tail in "ab"]
    both[1].salt = "another" if apart == "salt" else ""
    step(engine)
    assert all(one.slot >= 0 for one in both)
    finish(engine)


def test_a_follower_that_is_cancelled_ends_at_once(either):
    engine = small(either, **CACHED, step_tokens=64)
    same = sized(engine, 500)
    leader, follower = (line_up(engine, same + tail, max_tokens=2) for tail in "ab")
    step(engine)
    follower.cancel()
    step(engine)
    assert follower.done and not leader.done and not engine._engine.engine.scheduler.waiting
    finish(engine)


def test_beginnings_that_cannot_be_compared_are_computed_by_each(either, monkeypatch, caplog):
    engine = small(either, **CACHED)
    same = sized(engine, 200)
    monkeypatch.setattr(engine._prefix, "leader", lambda *_: 1 / 0)
    both = [line_up(engine, same + tail, max_tokens=2) for tail in "ab"]
    step(engine)
    assert all(one.slot >= 0 for one in both) and "begins as another does" in caplog.text
    finish(engine)
    assert all(one.output().error is None for one in both) and scheduling._log.name in {r.name for r in caplog.records}


def test_a_step_looks_at_the_weights_once(either, monkeypatch):
    """Which they are is read from all tensors; a burst of requests would read them several times each."""
    engine = small(either, **CACHED, step_tokens=512)
    prefix, looks = engine._prefix, []
    assert prefix is not None
    read = prefix._read_weights
    monkeypatch.setattr(prefix, "_read_weights", lambda: looks.append(1) or read())
    asked = [line_up(engine, sized(engine, 100, letter), max_tokens=2) for letter in "abcd"]
    step(engine)
    assert len(looks) == 1 and all(one.slot >= 0 for one in asked)
    engine.forget()  # weights changed
    held = len(prefix)
    step(engine)
    assert len(looks) == 2 and held and not len(prefix)
    finish(engine)
