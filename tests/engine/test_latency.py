"""Text beside pictures and long prompts, in seconds of a clock that only moves when something is computed."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from engine.mixes import mix
from engine.test_adapters import adapted, ask, close, folders  # noqa: F401
from engine.test_stateful import traffic  # noqa: F401
from engine.test_step import ENDLESS, finish, line_up, line_up_tokens, pictures, small, step, tokens
from hypothesis import Phase

from mirada import VLM, Image, Message, Sampling, Text
from mirada.engine import vision
from mirada.engine.chunk import Choice
from mirada.engine.features import Encoder
from mirada.engine.pace import FIRST_PRICES, FIRST_TOKENS, LEAST_PATCHES, PROBE, Estimate, Pace
from mirada.engine.settings import EngineSettings
from mirada.errors import RequestFailed, SettingsError
from mirada.models import slices as cutting
from mirada.models.slices import Work, whole

SLICE = 1e-3
"""Seconds of a patch in a layer."""
FIXED, TOKEN = 0.05, 0.01
"""Seconds of a step, and more for each of its tokens."""
WORST = FIXED + TOKEN + 0.25 * 1.25
"""Of a step that decodes one token, with what ``step_seconds`` adds; estimates are off by no more than a quarter of it."""
BIG = 100
"""Patches of ``big``: a slice of it takes 0.1 s."""


@dataclass
class Clock:
    now: float = 0.0
    slices: list[float] = field(default_factory=list)
    """Seconds of each slice."""

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def timed(monkeypatch):
    """Makes an engine whose clock moves by what it computes; ``step_seconds`` is 0.25. A layer takes ``SLICE`` a patch, half of
    it for its products, and everything else as much for as many multiplications."""

    def make(vlm: VLM, seconds: float | None = 0.25, **more) -> tuple[VLM, Clock]:
        made, clock = small(vlm, **{"step_seconds": seconds, **more}), Clock()
        engine = made._engine.engine
        engine.pace.clock = clock
        one = engine.runner.model.visual.layers[0].work((BIG,))
        for kind in ("products", "pairs"):  # a slow core is half as quick as this one
            monkeypatch.setitem(FIRST_PRICES, kind, 1e9 * SLICE * BIG / getattr(one, kind))
        original, run = vision.run, engine.runner.run

        def slow(model, group, *rest):
            layer = model.visual.layers[0].work(model.segments([piece.grid for piece in group]))
            seconds = SLICE * sum(len(piece.pixels) for piece in group)
            slices = original(model, group, *rest)
            work = next(slices)
            while True:
                yield work
                clock.slices.append(seconds * (work.products / layer.products + work.pairs / layer.pairs) / 2)
                clock.now += clock.slices[-1]
                try:
                    work = next(slices)
                except StopIteration as end:
                    return end.value

        def compute(chunks):
            clock.now += FIXED + TOKEN * sum(chunk.count for chunk in chunks)
            return run(chunks)

        monkeypatch.setattr(vision, "run", slow)
        monkeypatch.setattr(engine.runner, "run", compute)
        return made, clock

    return make


def big(count: int = 1, seed: int = 4) -> list[Message]:
    drawn = np.random.default_rng(seed).integers(0, 256, (count, 140, 140, 3), dtype=np.uint8)
    return [Message("user", [*(Image(one) for one in drawn), Text("What?")])]


def gaps(vlm: VLM, clock: Clock, watched, until, most: int = 3000) -> list[float]:
    """Seconds between the tokens of ``watched`` while steps are made, to ``until``."""
    made, last, count = [], clock.now, len(watched.tokens)
    for _ in range(most):
        if until():
            return made
        step(vlm)
        if len(watched.tokens) > count:
            made.append(clock.now - last)
            last, count = clock.now, len(watched.tokens)
    raise AssertionError("it never comes to that")


def alone(vlm: VLM, chat, **sampling) -> tuple[int, ...]:
    chat = [Message("user", chat)] if isinstance(chat, str) else chat
    return vlm.generate([chat], Sampling(**{**ENDLESS, **sampling}))[0].tokens


@pytest.mark.parametrize("vlm", ["KeyeVL1_5"], indirect=True)
def test_an_engine_that_ends_lets_go_of_its_pass(vlm, timed, monkeypatch):
    engine, _ = timed(vlm, 1e-9)
    made = begun(engine, monkeypatch)
    gone = weakref.ref(engine._engine.engine.encoder.flight)
    engine._engine.engine.close(RequestFailed("the engine was closed", "open the model again"))
    assert gone() is None and all(isinstance(one.error, RequestFailed) for one in made)


def fine(monkeypatch, rows: int = 5) -> None:
    """Slices may be much shorter than is worth while."""
    monkeypatch.setattr(cutting, "LEAST_ROWS", rows)
    monkeypatch.setattr(cutting, "LEAST_QUERIES", rows)


def run_in_slices(slices, between=lambda: None):
    """What it makes in the end, and the work of each of its slices."""
    works = [next(slices)]
    while True:
        try:
            works.append(next(slices))
        except StopIteration as end:
            return end.value, works
        between()


PARTS = {"whole layers": 0.01, "a third of one": 3.0, "as little as may be": 1e9}


@pytest.mark.parametrize("part", PARTS)
def test_a_pass_in_slices_is_the_pass(vlm, part, monkeypatch):
    """With other passes between its slices. Whole layers bit by bit; with parts of layers to the last bits, as torch may sum
    fewer rows of small matrices in another order. Whatever is computed, it is computed once."""
    fine(monkeypatch)
    model, rule = vlm.parts.model, vlm.parts.rule.grid
    sequence = vlm._requests.make(pictures(3), Sampling(), "auto")
    line = list(vision.pieces(model, sequence.media, 24))
    lengths = model.segments([piece.grid for piece in line])
    layer = model.visual.layers[0].work(lengths)
    with torch.inference_mode():
        given = (line, rule, torch.device("cpu"), torch.float32)
        expected, single = run_in_slices(vision.run(model, *given))

        def room(work: Work) -> float:
            return PARTS[part] * max(work.products / layer.products, work.pairs / layer.pairs) / 1.01

        made, works = run_in_slices(vision.run(model, *given, room), lambda: whole(vision.run(model, line[:1], *given[1:])))
        assert torch.equal(whole(model.visual.slices(*seen(model, line, rule))), model.visual(*seen(model, line, rule)))
    fixed = 3 if model.config.model_type == "qwen2_vl" else 4  # pixels, patches, (positions,) projector
    assert len(single) == fixed + len(model.visual.layers)
    for kind in ("products", "pairs"):
        assert sum(getattr(work, kind) for work in works) == sum(getattr(work, kind) for work in single)
    if part == "whole layers":
        assert torch.equal(made, expected)
        return
    assert (made - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert len(works) > (2 if PARTS[part] > 3 else 1) * len(single) + len(model.visual.layers)
    for work in works:
        rows = 0 if work.rows is None else work.rows[1] - work.rows[0]
        assert room(work) <= 1 or rows <= 10 * 4, "at most a slice, or few rows, or few queries"


def seen(model, line, rule):
    batch = vision._batch(line, rule, torch.device("cpu"), torch.float32)
    return batch.pixels, batch.grids, model.segments(batch.grids)


def test_tokens_come_while_a_picture_is_encoded(vlm, timed, monkeypatch):
    """A slice or two a step and not four at once; the replies are those of each alone."""
    fine(monkeypatch)
    chat = big()
    expected = alone(vlm, "hello", max_tokens=30), alone(vlm, chat, max_tokens=3)
    for seconds in (0.25, None):
        engine, clock = timed(vlm, seconds)
        text = line_up(engine, "hello", max_tokens=30)
        step(engine, 3)
        seen = line_up(engine, chat, max_tokens=3)
        waited = gaps(engine, clock, text, lambda seen=seen: seen.features is not None and not seen.features.units)
        finish(engine)
        assert (text.output().tokens, seen.output().tokens) == expected
        if seconds is None:
            assert max(waited) >= FIXED + 0.4
        else:
            assert max(waited) <= WORST and len(waited) > 1


def test_text_does_not_wait_for_a_layer(vlm, timed, monkeypatch):
    """A layer of the picture takes 12 times what pictures may add to a step. No slice is longer than that, text comes on,
    and the reply is the same."""
    chat = big()
    expected = alone(vlm, "hello", max_tokens=200), alone(vlm, chat, max_tokens=3)
    fine(monkeypatch, 1)
    seconds = 0.02
    monkeypatch.setitem(globals(), "SLICE", 12 * seconds / BIG)
    engine, clock = timed(vlm, seconds)
    monkeypatch.setattr(engine._engine.engine.pace.step, "note", lambda seconds: None)  # what decoding takes is no excuse
    text = line_up(engine, "hello", max_tokens=200)
    step(engine, 3)
    seen = line_up(engine, chat, max_tokens=3)
    waited = gaps(engine, clock, text, lambda: seen.features is not None and not seen.features.units)
    layers = len(vlm.parts.model.visual.layers)
    assert max(clock.slices) <= seconds * 1.1 and len(clock.slices) >= 6 * layers
    assert max(waited) <= FIXED + 2 * TOKEN + seconds * 1.25 and len(waited) > 6 * layers, "a prompt has a token a step"
    assert sum(clock.slices) >= 0.9 * SLICE * BIG * layers, "all of it was computed"
    finish(engine)
    assert (text.output().tokens, seen.output().tokens) == expected


@pytest.mark.parametrize("vlm", ["qwen2_vl"], indirect=True)
def test_what_took_longer_than_it_may_rests(vlm, timed, monkeypatch):
    """A slice of 0.15 s, of too few rows to be cut, where 0.06 s are allowed (as long as decoding takes): encoding has half of
    the time, not nearly all."""
    monkeypatch.setitem(globals(), "SLICE", 4e-3)
    engine, clock = timed(vlm, 0.01)
    text = line_up(engine, "hello", max_tokens=200)
    step(engine, 5)
    assert engine._engine.engine.pace.allowed == pytest.approx(FIXED + TOKEN)
    seen = [line_up(engine, big(), max_tokens=1) for _ in range(4)]
    step(engine)
    began, count = clock.now, len(text.tokens)
    waited = gaps(engine, clock, text, lambda: engine._engine.engine.encoder.num_patches == 4 * BIG)
    decoding = (len(text.tokens) - count) * (FIXED + TOKEN)
    assert 0.4 <= decoding / (clock.now - began) <= 0.65
    assert min(waited) <= FIXED + TOKEN + 1e-9, "some steps only decode"
    finish(engine)
    assert all(one.error is None for one in seen)


@pytest.mark.parametrize("vlm", ["Keye", "qwen2_vl"], indirect=True)
def test_alone_a_picture_has_all_the_time_but_lets_others_in(vlm, timed):
    engine, clock = timed(vlm, 0.25)
    seen = line_up(engine, big(), max_tokens=1)
    step(engine)
    at = clock.now
    step(engine)
    assert 0.1 <= clock.now - at <= 0.25 + 1e-9, "a step ends, for somebody may come"
    text = line_up(engine, "hello", max_tokens=1)
    came = clock.now
    while not text.tokens:
        step(engine)
    assert clock.now - came <= 0.25 + FIXED + TOKEN * len(text.prompt.tokens)
    finish(engine)
    assert seen.output().tokens == alone(vlm, big(), max_tokens=1)


def no_model(vlm: VLM, clock: Clock, monkeypatch) -> list[tuple[int, int]]:
    """Forwards take their time and compute nothing; returns (tokens of those that decode, tokens of prompts) of each."""
    made: list[tuple[int, int]] = []

    def run(chunks):
        decoding = sum(chunk.count for chunk in chunks if chunk.sequence.tokens)
        made.append((decoding, sum(chunk.count for chunk in chunks) - decoding))
        clock.now += FIXED + TOKEN * sum(made[-1])
        return [Choice((7,) * chunk.rows, (None,) * chunk.rows) for chunk in chunks]

    monkeypatch.setattr(vlm._engine.engine.runner, "run", run)
    return made


@pytest.mark.parametrize("vlm", ["Keye"], indirect=True)
def test_a_long_prompt_beside_one_that_decodes(vlm, timed, monkeypatch):
    """It gets what fits into 0.25 s, one step in a while is left to decoding alone, and all there is once nobody decodes."""
    engine, clock = timed(vlm)
    made = no_model(engine, clock, monkeypatch)
    text = line_up_tokens(engine, tokens(10), max_tokens=80)
    step(engine, 5)
    long = line_up_tokens(engine, tokens(3900, 1), max_tokens=1)
    waited = gaps(engine, clock, text, lambda: text.done)
    assert max(waited[8:]) <= FIXED + TOKEN + 0.25 * 1.3 and max(waited) <= FIXED + TOKEN * (1 + FIRST_TOKENS)
    beside = [count for decoding, count in made[5:] if decoding]
    assert sum(count == 0 for count in beside) <= 1 + len(beside) // PROBE
    assert 20 <= np.median(beside) <= 26, "0.25 s of them"
    left = long.left
    step(engine)
    assert made[-1] == (0, min(1024, left)), "nobody is kept waiting"
    finish(engine)


@pytest.mark.parametrize("vlm", ["Keye"], indirect=True)
def test_a_question_does_not_wait_for_a_whole_step_of_a_long_prompt(vlm, timed, monkeypatch):
    engine, clock = timed(vlm)
    made = no_model(engine, clock, monkeypatch)
    long = line_up_tokens(engine, tokens(4000), max_tokens=1)
    step(engine)
    assert made[-1] == (0, 1024)
    text = line_up_tokens(engine, tokens(30, 1), max_tokens=1)
    before = clock.now
    step(engine)
    assert len(text.tokens) == 1 and clock.now - before <= FIXED + 0.3 + 0.25, "its own tokens, and 0.25 s of the others"
    step(engine, 2)
    assert text.done and long.computed > 1024
    finish(engine)


@pytest.mark.parametrize("vlm", ["Keye"], indirect=True)
def test_a_prompt_and_a_picture_share_what_there_is(vlm, timed, monkeypatch):
    engine, clock = timed(vlm)
    text = line_up(engine, "hello", max_tokens=400)
    step(engine, 5)
    seen = line_up(engine, big(4), max_tokens=1)
    long = line_up_tokens(engine, tokens(3000, 1), max_tokens=1)
    encoder, waited, prompts = engine._engine.engine.encoder, [], []
    one = engine.parts.model.visual.layers[0].work((BIG,))
    engine._engine.engine.pace.computed_slice(one, SLICE * BIG)  # known, so a pass is of two pictures
    while encoder.num_patches < 4 * BIG:
        before, at = clock.now, long.computed
        step(engine)
        waited.append(clock.now - before)
        prompts.append(long.computed - at)
    assert max(waited) <= WORST + 2 * BIG * SLICE and sum(prompts) >= 5 * len(waited), "both go on"
    assert len(text.tokens) >= 5 + len(waited)
    long.cancelled = text.cancelled = True
    finish(engine)
    assert seen.output().tokens == alone(vlm, big(4), max_tokens=1)


def other() -> list[Message]:
    """A question about another picture of as many patches."""
    drawn = np.random.default_rng(5).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    return [Message("user", [Image(drawn), Text("Which?")])]


def begun(engine: VLM, monkeypatch) -> list:
    """Two requests with a picture each, one pass for both, which has stopped in the middle of its first layer."""
    monkeypatch.setitem(globals(), "SLICE", 1e-2)
    made = [line_up(engine, pictures(1), max_tokens=3), line_up(engine, other(), max_tokens=3)]
    text = line_up(engine, "hello", max_tokens=90)
    for _ in range(80):
        step(engine)
        flight = engine._engine.engine.encoder.flight
        if flight is not None and flight.next.pairs and not flight.next.products:
            break
    assert len(engine._engine.engine.encoder.flight.wanted) == 2
    return [*made, text]


@pytest.mark.parametrize("vlm", ["Keye", "qwen2_vl"], indirect=True)
@pytest.mark.parametrize("end", ["cancel", "preempt", "fail", "all"])
def test_one_of_a_pass_leaves_before_its_end(vlm, timed, end, monkeypatch):
    """The other has its features all the same; whoever was preempted is encoded again; what nobody waits for is let go."""
    engine, _ = timed(vlm, 1e-9)
    first, second, text = begun(engine, monkeypatch)
    scheduler, encoder = engine._engine.engine.scheduler, engine._engine.engine.encoder
    gone = weakref.ref(encoder.flight)
    if end == "preempt":
        scheduler._preempt(first)
    elif end == "fail":
        first.fail(RequestFailed("gone", "try again"))
    else:
        first.cancelled = True
        second.cancelled = text.cancelled = end == "all"
    step(engine)
    if end == "all":
        assert encoder.flight is None and gone() is None
    elif end != "preempt":  # else it may be back already
        assert encoder.flight is None or [one[0] for one in encoder.flight.wanted] == [second]
    finish(engine)
    assert encoder.flight is None and text.error is None
    if end == "preempt":
        assert first.output().tokens == alone(vlm, pictures(1), max_tokens=3)
    if end != "all":
        assert second.output().tokens == alone(vlm, other(), max_tokens=3)
        assert encoder.num_patches == (3 if end == "preempt" else 2) * 24


@pytest.mark.parametrize("vlm", ["KeyeVL1_5", "kimi_vl"], indirect=True)
def test_a_pass_that_fails_in_the_middle_fails_those_whose_own_it_is(vlm, timed, monkeypatch):
    engine, _ = timed(vlm, 1e-9)
    first, second, text = begun(engine, monkeypatch)
    bad = first.media[0].pixels
    run = vision.run

    def broken(model, group, *rest):
        made = run(model, group, *rest)
        yield next(made)
        if any(np.shares_memory(piece.pixels, bad) for piece in group):
            raise ZeroDivisionError("no eyes")
        return (yield from made)

    def blind():
        raise ZeroDivisionError("no eyes")
        yield

    engine._engine.engine.encoder.flight.slices = blind()
    monkeypatch.setattr(vision, "run", broken)
    finish(engine)
    assert isinstance(first.error, RequestFailed) and "no eyes" in str(first.error)
    assert text.error is None and second.error is None
    assert second.output().tokens == alone(vlm, other(), max_tokens=3)


@pytest.mark.parametrize("kind", ["qwen2_vl", "KeyeVL1_5"])
def test_adapters_hold_during_every_slice(kind, adapted, monkeypatch):  # noqa: F811
    """A picture by an adapter of the tower, another without, while text is decoded between the slices of their passes."""
    vlm = adapted[kind]
    asked, engine = [one for one in mix(vlm, 3, 6) if one[1]][:2], vlm._engine.engine
    vlm.forget()
    _, plain = ask(vlm, asked, [None, None])
    vlm.forget()
    tokens_before, expected = ask(vlm, asked, ["c", None])
    assert not close(expected[0], plain[0]) and close(expected[1], plain[1])
    vlm.forget()
    fine(monkeypatch)
    monkeypatch.setattr(engine.pace, "seconds", 1e-9)
    monkeypatch.setattr(engine.pace, "step", Estimate())
    monkeypatch.setattr(engine.pace.step, "note", lambda seconds: None)
    advanced = []
    advance = engine.encoder._advance
    monkeypatch.setattr(engine.encoder, "_advance", lambda *given: advanced.append(1) or advance(*given))
    text = vlm.submit([Message("user", "hello")], Sampling(max_tokens=60, **ENDLESS))
    tokens_now, now = ask(vlm, asked, ["c", None])
    assert tokens_now == tokens_before and all(map(close, expected, now)) and text.result().error is None
    assert len(advanced) >= 20


@pytest.mark.parametrize("kind", ["Keye", "qwen2_vl"])
def test_random_traffic_in_slices(kind, traffic, monkeypatch):  # noqa: F811
    """What is said in ``test_stateful``, with a pass that takes many steps and prompts that get little of each."""
    taken_up: list[bool] = []
    advance = Encoder._advance

    def noted(self, flight, seconds):
        taken_up.append(flight.begun)
        return advance(self, flight, seconds)

    monkeypatch.setattr("mirada.engine.settings.CPU_SECONDS", 1e-9)
    monkeypatch.setattr(Encoder, "_advance", noted)
    traffic(kind, "slab", "auto", max_examples=1, stateful_step_count=8, phases=[Phase.generate])
    assert any(taken_up), "no pass took more than a step"


def test_an_estimate_moves_and_does_not_leap():
    made = Estimate()
    made.note(1.0)
    assert made.seconds == 1.0
    made.note(1000.0)
    assert made.seconds == pytest.approx(1.3)
    for _ in range(60):
        made.note(0.1)
    assert made.seconds == pytest.approx(0.1, rel=0.01)


def test_what_is_allowed():
    pace = Pace(0.25)
    assert pace.patches(Work(products=10**6)) == 2500 and pace.prompt_tokens([500, 600], False) == 500
    assert pace.prompt_tokens([500], False) is None and pace.prompt_tokens([30, 600], False) == FIRST_TOKENS
    assert pace.prompt_tokens([500], True) == 0, "decoding alone is to be seen first"
    pace.computed(0, 0.1)
    assert pace.prompt_tokens([500], True) == FIRST_TOKENS and pace.prompt_tokens([5], True) == FIRST_TOKENS
    pace.computed(100, 1.1)
    assert pace.token.seconds == pytest.approx(0.01) and pace.prompt_tokens([500], True) == 25
    pace.encoded(0.1)
    assert pace.prompt_tokens([500], True) == 15, "what encoding has taken of this step is gone"
    pace.encoded(5.0)
    assert pace.prompt_tokens([500], True) == 12, "but never more than half"
    pace.begin()
    pace.encoding(True, False)
    pace.encoded(0.195)
    assert pace.prompt_tokens([500], True) == 5, "nor half of what was not divided: it waited for these pictures"
    pace.encoded(5.0)
    assert pace.prompt_tokens([500], True) == 1
    pace.begin()
    pace.step.seconds = 1.0
    assert pace.prompt_tokens([500], True) == 100, "as long as decoding takes"
    assert pace.patches(Work(products=10**7)) == 1000
    pace.computed_slice(Work(products=10**9), 100.0)
    assert pace.patches(Work(products=10**7)) == LEAST_PATCHES


def test_what_a_slice_costs():
    """Each kind of work has its price; a slice of two says of both that they were so much dearer."""
    pace = Pace(0.25)
    thousand = {"products": Work(products=10**9), "pairs": Work(pairs=10**9), "numbers": Work(numbers=10**9)}
    assert {kind: pace.cost(work) for kind, work in thousand.items()} == pytest.approx(FIRST_PRICES), "a slow core"
    assert pace.room(Work(products=10**9, pairs=15 * 10**8)) == pytest.approx(1.0)
    pace.computed_slice(thousand["products"], 0.02)
    pace.computed_slice(thousand["pairs"], 0.04)
    assert pace.cost(Work(products=2 * 10**9, pairs=10**9)) == pytest.approx(0.08)
    pace.computed_slice(Work(products=2 * 10**9, pairs=10**9), 0.08 * 1.5)
    assert pace.cost(thousand["products"]) == pytest.approx(0.02 * 1.15)
    assert pace.cost(thousand["pairs"]) == pytest.approx(0.04 * 1.15) and pace.cost(thousand["numbers"]) == 20.0
    pace.step.seconds = 1.0
    assert pace.room(Work(products=10**9)) == pytest.approx(0.023), "as long as decoding takes"


def test_encoding_pays_back_what_it_took():
    pace = Pace(0.25)
    assert pace.encoding(False, False) == 0.25
    pace.encoded(0.25)
    assert pace.encoding(True, False) == 0.0, "it has just had a step"
    assert pace.encoding(True, False) == 0.25 and pace.encoding(True, True) == 0.125
    pace.encoded(1.125)
    assert [pace.encoding(True, False) for _ in range(5)] == [-0.75, -0.5, -0.25, 0.0, 0.25]
    pace.encoded(9.0)
    assert pace.encoding(False, False) == 0.25, "nobody waits"
    assert (
        Pace(None).encoding(True, True)
        is None
        is Pace(None).patches(Work(products=1))
        is Pace(None).prompt_tokens([9, 9], True)
    )


def test_settings():
    assert EngineSettings().seconds("cpu") == 0.25 and EngineSettings().seconds("cuda") is None
    assert EngineSettings(step_seconds=2).seconds("cuda") == 2 and EngineSettings(step_seconds=None).seconds("cpu") is None
    for wrong in (0, -1, True, "fast", float("nan"), float("inf")):
        with pytest.raises(SettingsError, match="step_seconds"):
            EngineSettings(step_seconds=wrong)
