"""One step after another, by hand: who is admitted, encoded, computed, preempted and ended, and when."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine.mixes import free, mix, patched

from mirada import VLM, Image, Message, Sampling, Text, Video
from mirada.engine import scheduler as scheduling
from mirada.engine.chunk import Choice
from mirada.engine.drafts import MOST_ROWS
from mirada.engine.sequence import Sequence
from mirada.errors import OutOfMemory, RequestFailed, SettingsError
from mirada.layers.paged import PAGE, Pages
from mirada.types import Prompt, Span

ENDLESS = {"ignore_eos": True, "max_repeats": None}
OFF = {"prefix_cache_bytes": 0, "encoder_cache_bytes": 0, "step_seconds": None}
"""No caches, and steps whose content no clock decides."""


def small(vlm: VLM, **settings) -> VLM:
    """An engine of its own around the model of ``vlm``."""
    return VLM.from_parts(vlm.parts.model, vlm.parts.renderer, vlm.parts.rule, engine={**OFF, **settings})


def line_up(vlm: VLM, chat, media=(), **sampling) -> Sequence:
    """A request in line of an engine whose thread has not begun, so that the test makes its steps."""
    text = [Message("user", chat)] if isinstance(chat, str) else chat
    sequence = vlm._requests.make(text, Sampling(**{**ENDLESS, **sampling}), "auto", media)
    vlm._engine.engine.scheduler.waiting.append(sequence)
    return sequence


def line_up_tokens(vlm: VLM, prompt: Prompt, **sampling) -> Sequence:
    sequence = vlm._requests.make(prompt, Sampling(**{**ENDLESS, **sampling}), "auto")
    vlm._engine.engine.scheduler.waiting.append(sequence)
    return sequence


def step(vlm: VLM, count: int = 1) -> None:
    with torch.inference_mode():
        for _ in range(count):
            vlm._engine.engine.step()


def sized(vlm: VLM, count: int, letter: str = "z") -> str:
    """A question whose prompt has ``count`` tokens."""
    bare = len(vlm._requests.make([Message("user", letter)], Sampling(), "auto").prompt.tokens)
    return letter * (count - bare + 1)


def finish(vlm: VLM, most: int = 3000) -> int:
    """Steps until nothing is left; the budget is kept after each."""
    engine = vlm._engine.engine
    for count in range(most):
        if engine.idle:
            assert engine.runner.cache.bytes_held == 0 and engine.runner.cache.num_open == 0
            return count
        step(vlm)
    raise AssertionError("the engine does not come to an end")


def pictures(count: int) -> list[Message]:
    drawn = np.random.default_rng(4).integers(0, 256, (count, 56, 84, 3), dtype=np.uint8)
    return [Message("user", [*(Image(one) for one in drawn), Text("What?")])]


def test_text_does_not_wait_behind_pictures(vlm):
    """Twelve pictures at one a step: a question that comes while they are encoded has its first token a step later."""
    engine = small(vlm, step_patches=24)
    seen = line_up(engine, pictures(12), max_tokens=2)
    step(engine, 3)
    assert len(seen.features.units) == 9
    text = line_up(engine, "hi", max_tokens=3)
    step(engine)
    assert len(text.tokens) == 1 and len(seen.features.units) == 8
    step(engine, 2)
    assert text.done and not seen.tokens
    finish(engine)
    assert engine._engine.engine.encoder.num_patches == 12 * 24
    assert seen.output().tokens == vlm.generate([pictures(12)], Sampling(max_tokens=2, **ENDLESS))[0].tokens


def test_a_prompt_that_ends_in_a_picture_waits_for_it(vlm):
    """Of its tokens only the last is left, yet it does not decode: that one is the picture."""
    pad, flat = vlm.parts.model.config.image_token_id, vlm.parts.renderer.format.flat_positions
    prompt = Prompt((5, 6, 7, 8, pad), (Span("image", 4, (1, 2, 2), 0, flat=flat),))
    _, media = patched(np.random.default_rng(1), prompt, [(1, 2, 2)], vlm.parts.rule.grid.frames)
    sampling = Sampling(max_tokens=3, **ENDLESS)
    alone = vlm.submit(prompt, sampling, media=media).result()
    assert alone.error is None
    engine = small(vlm, step_patches=24)
    first = line_up(engine, pictures(3), max_tokens=1)
    made = engine._requests.make(prompt, sampling, "auto", media)
    engine._engine.engine.scheduler.waiting.append(made)
    engine._engine.engine.encoder.turns.ahead = 24  # the turn is the older one's
    step(engine)
    assert made.left == 1 and not made.tokens and made.error is None
    finish(engine)
    assert made.output().tokens == alone.tokens and first.done


def test_features_are_kept_until_their_tokens_are_computed(vlm):
    """And the tokens of a picture that is encoded are computed while the next one is."""
    engine = small(vlm, step_patches=240, step_tokens=8)
    seen = line_up(engine, pictures(12), max_tokens=1)
    held = []
    while not seen.done:
        step(engine)
        if seen.features is not None:
            held.append(sum(len(features) for _, features in seen.features._held))
            assert all(first + len(x) > np.searchsorted(seen.features.rows, seen.computed) for first, x in seen.features._held)
    # A picture is 6 tokens; encoding runs ahead of the tokens by two steps and a picture at most.
    assert 0 < max(held) <= 2 * 8 + 6 and held[-1] < 6


def test_a_step_takes_no_more_than_it_may(either, monkeypatch):
    engine = small(either, step_tokens=20, max_running=8)
    runner, sizes, rows = engine._engine.engine.runner, [], []
    forward, pick = runner._forward, runner._pick
    monkeypatch.setattr(runner, "_forward", lambda batch, *rest: sizes.append(batch.lengths) or forward(batch, *rest))
    monkeypatch.setattr(runner, "_pick", lambda who, logits, how: rows.append(len(logits)) or pick(who, logits, how))
    made = [line_up(engine, f"number {i}", max_tokens=4) for i in range(10)]
    finish(engine)
    assert max(map(sum, sizes)) == 20 and max(map(len, sizes)) <= 8
    assert any(1 in lengths and max(lengths) > 1 for lengths in sizes), "prompts are computed beside tokens"
    assert sum(rows) == sum(len(sequence.tokens) for sequence in made) == 40, "logits of no other rows"
    first = [sequence.born + sequence.metrics["first_token"] for sequence in made]
    assert first == sorted(first), "first come, first served"


@pytest.mark.parametrize("vlm", ["Keye", "kimi_vl"], indirect=True)
def test_fewer_tokens_a_step_than_requests(vlm):
    engine = small(vlm, step_tokens=2)
    made = [line_up(engine, f"number {i}", max_tokens=3) for i in range(3)]
    expected = [vlm.generate([[Message("user", f"number {i}")]], Sampling(max_tokens=3, **ENDLESS))[0].tokens for i in range(3)]
    finish(engine)
    assert [sequence.output().tokens for sequence in made] == expected


def tokens(count: int, seed: int = 0) -> Prompt:
    return Prompt(tuple(np.random.default_rng(seed).integers(0, 250, count).tolist()))


def steps_until(vlm: VLM, ready, most: int = 3000) -> int:
    for count in range(1, most):
        step(vlm)
        if ready():
            return count
    raise AssertionError("it never comes to that")


def no_model(vlm: VLM, monkeypatch) -> None:
    """Steps choose what to compute, and compute nothing; the context is long."""
    engine = vlm._engine.engine

    def compute(chunks):
        return [(chunk, Choice((7,) * chunk.rows, (None,) * chunk.rows)) for chunk in chunks]

    monkeypatch.setattr(engine, "_compute", compute)
    monkeypatch.setattr(vlm._requests, "parts", replace(vlm.parts, context=131_072))


@pytest.mark.parametrize("vlm", ["Keye"], indirect=True)
def test_a_short_prompt_does_not_wait_behind_a_long_one(vlm, monkeypatch):
    """Prompts that come while 100 000 tokens of another are computed: what fits into half a step has its first token with the
    next, longer ones in twice the steps they need alone."""
    engine = small(vlm, step_tokens=512)
    no_model(engine, monkeypatch)
    long = line_up_tokens(engine, tokens(100_000), max_tokens=1)
    step(engine, 20)
    assert long.computed == 20 * 512
    for count, most in ((200, 1), (300, 1), (512, 2), (5000, 20)):
        short = line_up_tokens(engine, tokens(count, count), max_tokens=1)
        before = long.computed
        taken = steps_until(engine, lambda short=short: short.done)
        assert taken <= most and short.error is None, count
        assert long.computed - before >= (taken - 1) * 512 // 2
    assert not long.tokens


@pytest.mark.parametrize("vlm", ["Keye"], indirect=True)
@pytest.mark.parametrize("count", [40, 500, 2000])
def test_a_long_prompt_does_not_starve_behind_short_ones(vlm, monkeypatch, count):
    """Ever new short prompts, more than all steps could compute: the long one takes twice the steps it would take alone."""
    engine = small(vlm, step_tokens=512, max_running=8)
    no_model(engine, monkeypatch)
    scheduler = engine._engine.engine.scheduler
    long, seed, steps = line_up_tokens(engine, tokens(20_000), max_tokens=1), 0, 0
    while not long.done and steps < 200:
        while len(scheduler.waiting) < 8:
            line_up_tokens(engine, tokens(count, seed := seed + 1), max_tokens=1)
        step(engine)
        steps += 1
    assert long.done and long.error is None and 20_000 // 512 < steps <= 2 * -(-20_000 // 512) + 2
    assert engine._engine.engine.num_computed >= 0.95 * steps * min(512, 7 * count), "no step is left half empty for that"


@pytest.mark.parametrize("vlm", ["Keye"], indirect=True)
def test_requests_of_one_length_are_served_in_order(vlm, monkeypatch):
    engine = small(vlm, step_tokens=100)
    no_model(engine, monkeypatch)
    made = [line_up_tokens(engine, tokens(250, seed), max_tokens=1) for seed in range(5)]
    ended: dict[int, int] = {}
    for count in range(1, 14):
        step(engine)
        ended |= {index: count for index, one in enumerate(made) if one.done and index not in ended}
    assert ended == {0: 3, 1: 5, 2: 8, 3: 10, 4: 13}


def test_a_small_picture_does_not_wait_behind_a_video(vlm):
    """Twenty pictures of one request at one a step; another request's picture comes late and is encoded within two steps; the
    replies are those of each alone, and the first has lost one step in all."""
    engine = small(vlm, step_patches=24)
    many = line_up(engine, pictures(20), max_tokens=1)
    step(engine, 3)
    one = line_up(engine, pictures(1), max_tokens=1)
    assert steps_until(engine, lambda: one.done) <= 2 and many.features.units
    assert 3 + 2 + steps_until(engine, lambda: many.done) <= 3 + 20
    alone = vlm.generate([pictures(20), pictures(1)], Sampling(max_tokens=1, **ENDLESS))
    assert [many.output().tokens, one.output().tokens] == [output.tokens for output in alone]


def test_small_pictures_do_not_starve_a_video(vlm):
    engine = small(vlm, step_patches=24, max_running=6)
    many, steps = line_up(engine, pictures(8), max_tokens=1), 0
    while not many.done and steps < 100:
        for _ in range(4 - len(engine._engine.engine.scheduler.waiting)):
            line_up(engine, pictures(1), max_tokens=1)
        step(engine)
        steps += 1
    assert many.done and steps <= 2 * 8 + 2


def test_who_has_begun_with_a_video_goes_on_with_it(vlm):
    """Two requests about the same frames, the second one shorter: they are encoded once."""
    model, rule = vlm.parts.model, vlm.parts.rule.grid
    if model.config.video_token_id is None or len(model.segments(((8, 4, 6),))) < 8 // rule.frames:
        pytest.skip("no videos, or they are encoded whole")
    frames = np.random.default_rng(4).integers(0, 256, (8, 56, 84, 3), dtype=np.uint8)
    chat = [Message("user", [Video(list(frames), fps=1.0), Text("What?")])]
    engine = small(vlm, step_patches=24, encoder_cache_bytes=1 << 20)
    first = line_up(engine, [*chat, Message("user", "Look. " * 40)], max_tokens=1)
    step(engine, 2)
    begun = engine._engine.engine.encoder.num_patches
    assert first.features.gathered and first.features.units
    second = line_up(engine, chat, max_tokens=1)
    assert len(second.prompt.tokens) < first.left
    (item,) = first.media
    finish(engine)
    assert begun < engine._engine.engine.encoder.num_patches == len(item.pixels)
    assert first.error is None and second.error is None


@contextmanager
def watched(vlm: VLM):
    """While open, after every forward the cache holds no more than it may."""
    runner = vlm._engine.engine.runner
    forward, most = runner._forward, vlm._engine.engine.settings.cache_bytes

    def checked(*args):
        made = forward(*args)
        assert runner.cache.bytes_held <= most
        return made

    runner._forward = checked
    try:
        yield
    finally:
        del runner._forward


@pytest.mark.parametrize("prefix", [0, 1 << 24])
def test_the_youngest_gives_way_and_is_recomputed(vlm, monkeypatch, prefix):
    """Three that fill a block each and outgrow it, with room for four: greedy and seeded replies are what they are alone,
    and the oldest never waits."""
    monkeypatch.setattr(scheduling, "ROOM_TO_GROW", 1)
    block = vlm._engine.engine.runner.cache.bytes_for(1)
    engine = small(vlm, cache_bytes=4 * block, prefix_cache_bytes=prefix)
    hot = {"temperature": 1.3, "seed": 5, "top_p": 0.9}
    asked = [(sized(vlm, 247, "a"), {}), (sized(vlm, 245, "b"), hot), (sized(vlm, 243, "c"), {})]
    whole = {
        name: vlm.generate([[Message("user", name)]], Sampling(max_tokens=20, **ENDLESS, **more))[0] for name, more in asked
    }
    made = [line_up(engine, name, max_tokens=20, **more) for name, more in asked]
    with watched(engine):
        finish(engine)
    for (name, _), sequence in zip(asked, made, strict=True):
        assert sequence.error is None and sequence.output().tokens == whole[name].tokens
    assert made[0].preemptions == 0 < made[2].preemptions
    assert engine.stats()["preemptions"] == sum(sequence.preemptions for sequence in made)
    assert made[2].metrics["queue"] > made[0].metrics["queue"]


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_pages_give_the_same_replies(vlm, kv):
    """``layout="paged"`` where slabs are the rule: alone, together, with a prefix that is shared, and preempted."""
    chats = ["one two three", pictures(2), "one two three", sized(vlm, 90, "b")]
    plain = small(vlm, kv=kv)
    made = [line_up(plain, chat, max_tokens=12) for chat in chats]
    finish(plain)
    most = 7 * plain._engine.engine.runner.cache.bytes_per_token * PAGE
    paged = small(vlm, layout="paged", cache_bytes=most, kv=kv, prefix_cache_bytes=1 << 20, speculate=2)
    assert isinstance(paged._engine.engine.runner.cache, Pages)
    with watched(paged):
        for _ in range(2):
            again = [line_up(paged, chat, max_tokens=12) for chat in chats]
            finish(paged)
            assert [s.output().tokens for s in again] == [s.output().tokens for s in made]
    assert paged.stats()["prefix_cache_hits"] > 0


@pytest.mark.parametrize("vlm", ["Keye"], indirect=True)
def test_pages_need_a_number_of_bytes(vlm):
    with pytest.raises(SettingsError, match="cache_bytes"):
        small(vlm, layout="paged")
    with pytest.raises(SettingsError, match="layout is 'rows'"):
        small(vlm, layout="rows")


def test_media_are_encoded_again_after_preemption(vlm):
    (prompt, media), (other, none) = next(
        pair for seed in range(50) for pair in [mix(vlm, seed, 2)] if pair[0][1] and not pair[1][1]
    )
    sampling = Sampling(max_tokens=4, **ENDLESS)
    alone = [vlm.submit(p, sampling, media=m).result().tokens for p, m in ((other, none), (prompt, media))]
    engine = small(vlm)
    made = []
    for p, m in ((other, none), (prompt, media)):
        made.append(engine._requests.make(p, sampling, "auto", m))
        engine._engine.engine.scheduler.waiting.append(made[-1])
    step(engine, 2)
    patches = engine._engine.engine.encoder.num_patches
    engine._engine.engine.scheduler._preempt(made[1])
    assert made[1].slot == -1 and made[1].computed == 0 and len(made[1].tokens) == 2
    finish(engine)
    assert [sequence.output().tokens for sequence in made] == alone
    assert engine._engine.engine.encoder.num_patches == 2 * patches


def test_what_could_never_run_is_refused_at_once(either):
    cache = either._engine.engine.runner.cache
    engine = small(either, cache_bytes=2 * cache.bytes_for(1))
    running = line_up(engine, "hi", max_tokens=100)
    step(engine)
    large, good = line_up(engine, "hi", max_tokens=1000), line_up(engine, "ho", max_tokens=2)
    step(engine)
    assert isinstance(large.error, OutOfMemory) and large.error.available == 2 * cache.bytes_for(1)
    assert large.error.needed == cache.peak_bytes(len(large.prompt.tokens) + 1000) > cache.bytes_for(1000)
    for word in ("1000 new", "cache_bytes", "max_tokens"):
        assert word in str(large.error)
    finish(engine)
    assert len(running.tokens) == 100 and len(good.tokens) == 2


def test_memory_that_goes_away_ends_the_last_request_with_a_typed_error(either, monkeypatch):
    engine = small(either)
    made = line_up(engine, sized(either, 250), max_tokens=400)
    step(engine, 2)
    monkeypatch.setattr("mirada.engine.memory.available", lambda device: 0)
    finish(engine)
    assert isinstance(made.error, OutOfMemory) and "middle" in str(made.error) and made.error.unit == "bytes"
    assert len(made.tokens) == 7


def test_cancel_takes_effect_within_a_step(either):
    engine = small(either, max_running=2, step_patches=24)
    made = [line_up(engine, "one", max_tokens=50), line_up(engine, pictures(5)), line_up(engine, "three")]
    step(engine, 2)
    for sequence in made:
        sequence.cancelled = True
    count = len(made[0].tokens)
    step(engine)
    assert all(sequence.done and sequence.finish == "cancelled" for sequence in made)
    assert len(made[0].tokens) == count and finish(engine) == 0


def test_a_failure_ends_those_whose_own_it_is(vlm, monkeypatch):
    """A forward and an encoder that fail for one of three."""
    engine = small(vlm)
    runner, encoder = engine._engine.engine.runner, engine._engine.engine.encoder
    made = [
        line_up(engine, "one", max_tokens=5),
        line_up(engine, "two", max_tokens=5),
        line_up(engine, pictures(2), max_tokens=5),
    ]
    run, encode = runner.run, encoder.run

    def broken(chunks):
        if any(chunk.sequence is made[1] and chunk.sequence.tokens for chunk in chunks):
            raise ZeroDivisionError("a defect")
        return run(chunks)

    def blind(units, seconds):
        raise ZeroDivisionError("no eyes")

    monkeypatch.setattr(runner, "run", broken)
    step(engine, 1)
    monkeypatch.setattr(encoder, "run", blind)
    other = line_up(engine, pictures(1), max_tokens=5)
    finish(engine)
    assert [sequence.finish for sequence in made] == ["length", "error", "length"]
    assert isinstance(made[1].error, RequestFailed) and "a defect" in str(made[1].error)
    assert isinstance(other.error, RequestFailed) and "no eyes" in str(other.error)
    monkeypatch.setattr(encoder, "run", encode)
    again = line_up(engine, pictures(1), max_tokens=5)
    finish(engine)
    assert again.error is None and len(again.tokens) == 5


def test_a_defect_of_the_engine_itself_ends_what_it_was_at(either, monkeypatch):
    engine = small(either, max_running=1)
    scheduler = engine._engine.engine.scheduler
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "plan", lambda *_: 1 // 0)
        outputs = [engine.submit([Message("user", text)], Sampling(max_tokens=2)).result(30) for text in ("a", "b")]
    assert all(isinstance(output.error, RequestFailed) for output in outputs)
    assert engine.submit([Message("user", "c")], Sampling(max_tokens=2)).result(30).error is None
    engine.close()


class Oracle:
    """Proposes what the reply will be, or something else."""

    def __init__(self, sequence, answers, guess):
        self.answer, self.guess, self.done = answers[sequence.prompt.tokens], guess, len(sequence.tokens)

    def propose(self, count):
        draft = list(self.answer[self.done : self.done + count])
        return {"right": draft, "half": [*draft[:1], 1, 1][:count], "wrong": [1] * count}[self.guess]


@pytest.mark.parametrize("guess", ["right", "half", "wrong"])
def test_speculation_changes_no_reply(vlm, monkeypatch, guess):
    """Drafts that are right, right at first, or wrong: the same greedy replies, in fewer steps where they are right."""
    chats = ["one two three", pictures(1)]
    as_chat = [[Message("user", chat)] if isinstance(chat, str) else chat for chat in chats]
    expected = [output.tokens for output in vlm.generate(as_chat, Sampling(max_tokens=24, **ENDLESS))]
    drawn = vlm.generate([[Message("user", "a")]], Sampling(max_tokens=6, temperature=1.2, seed=2, **ENDLESS))[0].tokens
    engine = small(vlm, speculate=4)
    made = [line_up(engine, chat, max_tokens=24) for chat in chats]
    warm = line_up(engine, "a", max_tokens=6, temperature=1.2, seed=2)
    answers = {sequence.prompt.tokens: tokens for sequence, tokens in zip(made, expected, strict=True)}
    drafts = engine._engine.engine.drafts
    monkeypatch.setattr(drafts, "costs", free())
    monkeypatch.setattr(drafts, "lookup", lambda sequence: Oracle(sequence, answers, guess))
    steps = finish(engine)
    assert [sequence.output().tokens for sequence in made] == expected and warm.output().tokens == drawn
    stats = engine.stats()
    assert stats["proposed_tokens"] > 0 and stats["generated_tokens"] == 24 + 24 + 6
    if guess == "wrong":
        assert stats["accepted_tokens"] <= 2 and steps >= 22
    else:
        assert stats["accepted_tokens"] >= (25 if guess == "right" else 16) and steps < 20


def test_many_running_sequences_get_no_drafts(either, monkeypatch):
    engine = small(either, speculate=4)
    asked = []

    class Silent:
        def propose(self, count):
            asked.append(count)
            return []

    monkeypatch.setattr(engine._engine.engine.drafts, "lookup", lambda sequence: Silent())
    for i in range(MOST_ROWS):
        line_up(engine, f"number {i}", max_tokens=3)
    finish(engine)
    assert not asked
    line_up(engine, "alone", max_tokens=4)
    finish(engine)
    assert asked == [2, 1], "never more than the reply may still take"


def test_stats_count(either):
    engine = small(either)
    made = line_up(engine, pictures(2), max_tokens=3)
    step(engine)
    stats = engine.stats()
    assert stats["running"] == 1 and stats["kv_bytes"] > 0 and stats["encoded_patches"] == 48
    finish(engine)
    stats = engine.stats()
    assert (stats["running"], stats["waiting"], stats["kv_bytes"]) == (0, 0, 0)
    assert stats["generated_tokens"] == 3 and stats["computed_tokens"] == len(made.prompt.tokens) + 2
    assert stats["steps"] == 3
    assert {"queue", "prepare", "render", "encode", "prefill", "decode", "first_token", "total"} <= set(made.output().metrics)
