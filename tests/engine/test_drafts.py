"""Which drafts are sent, by made times of steps and made replies: no clock decides here."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirada import VLM, Message, Sampling
from mirada.engine.drafts import GAIN, MOST_ROWS, RECENT, STALE, Drafts, Foresight, StepCost, share
from mirada.engine.sequence import Sequence
from mirada.layers.moe import Experts
from mirada.types import Prompt


def flat(rows: int) -> float:
    return 1.0


def steep(rows: int) -> float:
    return float(rows)


def int4_of_avx2(rows: int) -> float:
    """2.8 times as long for eight rows: what was measured."""
    return 1 + 1.8 * (rows - 1) / 7


# What a step costs.


def test_a_dense_model_is_tried_and_experts_are_not():
    dense, experts = StepCost(0.0), StepCost(1.0)
    assert (dense(8), experts(8)) == (1, 8)
    for cost in (dense, experts):
        cost.note(1, 0.02)
    assert dense(8) == pytest.approx(0.02) and experts(8) == pytest.approx(0.16)


def test_lines_between_and_beyond_what_was_seen():
    cost = StepCost()
    for _ in range(40):
        cost.note(2, 1.0)
        cost.note(4, 1.2)
        cost.note(8, 2.0)
    assert [round(cost(rows), 3) for rows in (1, 2, 3, 4, 6, 8, 14)] == [1.0, 1.0, 1.1, 1.2, 1.6, 2.0, 3.0]


def test_a_disturbed_step_is_believed_little_and_a_quick_one_at_once():
    cost = StepCost()
    cost.note(1, 1.0)
    cost.note(1, 9.0)
    assert cost(1) == pytest.approx(3.0)
    cost.note(1, 1.0)
    assert cost(1) == 1.0
    cost.note(8, 5.0)  # the first of its kind makes room
    assert cost(8) == pytest.approx(3.0)
    cost.note(8, 1.5)
    assert cost(8) == 1.5
    cost.note(2, 40.0)
    assert cost(2) == 1.5, "never longer than what more rows take"


def test_what_was_too_dear_is_forgotten_but_not_the_fewest_rows():
    cost = StepCost()
    cost.note(1, 1.0)
    cost.note(8, 5.0)
    for _ in range(STALE - 1):
        cost.note(1, 1.0)
    assert cost(8) > 2
    cost.note(1, 1.0)
    assert cost(8) == 1.0
    for _ in range(3 * STALE):
        cost.note(4, 2.0)
    assert cost(1) == 1.0 and cost(4) == pytest.approx(2.0, abs=0.01)


# How often a lookup is right.


def test_chances_follow_what_came():
    all_of_them = Foresight(100 * RECENT)
    one, other = Foresight(RECENT, all_of_them), Foresight(RECENT, all_of_them)
    for _ in range(200):
        one.note(True, True)
        one.note(False, False)
    assert one.chance(True) > 0.99 and one.chance(False) < 0.01
    assert other.chance(True) > 0.95 and other.chance(False) < 0.05, "a new request starts from what the others were"
    for _ in range(RECENT):
        one.note(True, False)
    assert one.chance(True) < 0.5, "and each forgets"


# Who sends how many.


def test_flat_and_steep():
    assert share([[0.9, 0.8, 0.7]], 1, 7, flat) == [3]
    assert share([[0.9, 0.8, 0.7]], 1, 2, flat) == [2]
    assert share([[0.9, 0.8, 0.7]], 1, 7, lambda more: 1.0 + more) == [0]
    assert share([[1.0] * 7], 1, 7, lambda more: int4_of_avx2(1 + more)) == [7]
    assert share([[0.4 * 0.8**i for i in range(7)]], 1, 7, lambda more: int4_of_avx2(1 + more)) == [2]
    assert share([[0.2 * 0.8**i for i in range(7)]], 1, 7, lambda more: int4_of_avx2(1 + more)) == [0]
    assert share([[], [0.04]], 2, 7, flat) == [0, 0], "too little to gain"
    assert share([[0.1, 0.1], [0.9, 0.8]], 2, 2, flat) == [0, 2]
    assert share([], 1, 7, flat) == []


CHANCES = st.lists(st.floats(0.0, 1.0), max_size=3).map(lambda some: sorted(some, reverse=True))


@settings(max_examples=150)
@given(
    chances=st.lists(CHANCES, min_size=1, max_size=3),
    most=st.integers(1, 6),
    times=st.lists(st.floats(0.0, 1.0), min_size=9, max_size=9),
)
def test_no_other_choice_gives_more_tokens_a_second(chances, most, times):
    seconds = [1 + sum(times[:more]) for more in range(10)]

    def speed(counts):
        gain = sum(sum(one[:count]) for one, count in zip(chances, counts, strict=True))
        return (len(chances) + gain) / seconds[sum(counts)]

    made = share(chances, len(chances), most, seconds.__getitem__)
    ways = [way for way in product(*(range(len(one) + 1) for one in chances)) if sum(way) <= most]
    plain, best = speed([0] * len(chances)), max(map(speed, ways))
    assert sum(made) <= most
    if best >= GAIN * plain * (1 + 1e-9):
        assert speed(made) == pytest.approx(best)
    elif best < GAIN * plain * (1 - 1e-9):
        assert not any(made)


# A whole reply, with a made clock.

DENSE = SimpleNamespace(modules=lambda: iter([torch.nn.Linear(1, 1)]))
SPARSE = SimpleNamespace(modules=lambda: iter([Experts(2, 4, 4)]))


def reply(drafts: Drafts, tokens: list[int], seconds, prompt: tuple[int, ...] = (1, 2), longest: int = 7):
    """Steps, seconds and rows beyond one each that a reply of ``tokens`` takes."""
    one = Sequence(Prompt(prompt), Sampling(max_tokens=len(tokens) + 9), None, limit=len(tokens) + 9)
    one.chooser = SimpleNamespace(plain=True)
    steps = spent = extra = 0
    while len(one.tokens) < len(tokens):
        one.computed = one.num_tokens - 1
        drafts.propose([one], longest, 1024)
        draft, one.draft = one.draft, []
        rest = tokens[len(one.tokens) :]
        right = next((i for i, (a, b) in enumerate(zip(draft, rest, strict=False)) if a != b), min(len(draft), len(rest)))
        drafts.note(1 + len(draft), seconds(1 + len(draft)))
        made = rest[: right + 1]
        drafts.learn(one, made)
        one.tokens += made
        steps, spent, extra = steps + 1, spent + seconds(1 + len(draft)), extra + len(draft)
    return steps, spent, extra


FRESH = list(range(100, 500))
COPIED = list(range(100, 150)) * 8
TEASING = [token for i in range(200) for token in (7, 8, 100 + i)]
"""Seven and eight come again and again, and always something else follows."""


def test_copies_take_fewer_steps_where_rows_are_cheap():
    steps, spent, _ = reply(Drafts(DENSE), COPIED, flat)
    assert steps < 150
    _, spent, _ = reply(Drafts(DENSE), COPIED, int4_of_avx2)
    assert spent < 0.6 * len(COPIED)


@pytest.mark.parametrize("tokens", [FRESH, COPIED, TEASING])
@pytest.mark.parametrize("seconds", [flat, steep, int4_of_avx2])
@pytest.mark.parametrize("model", [DENSE, SPARSE])
def test_it_is_never_much_slower_than_without(tokens, seconds, model):
    _, spent, extra = reply(Drafts(model), tokens, seconds)
    assert spent < 1.06 * len(tokens), "what is tried now and then is cheap"
    assert extra == 0 or tokens is not FRESH, "nothing was seen before"


def test_wrong_lookups_end_drafts_and_right_ones_bring_them_back():
    drafts = Drafts(DENSE)
    _, _, extra = reply(drafts, TEASING, int4_of_avx2)
    assert extra < 0.05 * len(TEASING)
    _, spent, extra = reply(drafts, TEASING[:60] + COPIED, int4_of_avx2)
    assert extra > 100 and spent < 0.7 * (60 + len(COPIED))


def test_experts_get_drafts_only_where_steps_say_so():
    drafts = Drafts(SPARSE)
    assert reply(drafts, COPIED, flat)[2] == 0
    for rows in (1, 2, 4, 1):  # several requests at once were seen to cost little more
        drafts.note(rows, 1 + 0.05 * (rows - 1))
    assert reply(drafts, COPIED, lambda rows: 1 + 0.05 * (rows - 1))[2] > 100


def test_beside_a_long_prompt_rows_are_cheap_also_for_experts():
    drafts = Drafts(SPARSE)
    one = Sequence(Prompt((1, 2, 3, 4, 5, 1, 2)), Sampling(), None, limit=50)
    long = Sequence(Prompt(tuple(range(900))), Sampling(), None, limit=50)
    one.chooser, one.computed = SimpleNamespace(plain=True), 6
    drafts.note(1, 1.0)
    drafts.propose([one], 7, 1024)
    assert not one.draft
    drafts.propose([one, long], 7, 1024)
    assert one.draft == [3, 4, 5, 1, 2, 3, 4]
    long.features = SimpleNamespace(waits=0)  # not in this step
    drafts.propose([one, long], 7, 1024)
    assert not one.draft


def test_steps_with_an_adapter_are_counted_apart():
    drafts = Drafts(DENSE)
    drafts.note(1, 1.0, True)
    drafts.note(8, 9.0, True)
    assert drafts.costs[True](8) > 4 and drafts.costs[False](8) == 1.0


# In an engine.

CHAT = [[Message("user", "again and again and again and again and again and")]]


@pytest.mark.parametrize("seconds", [flat, steep])
def test_an_engine_is_told_by_its_steps(engines, seconds, monkeypatch):
    """The same reply whatever steps take; drafts are sent where they are flat, and hardly where they are not."""
    vlm = engines["qwen2_vl"]
    sampling = Sampling(max_tokens=120, ignore_eos=True, max_repeats=None)
    expected = vlm.generate(CHAT, sampling)[0].tokens
    made = VLM.from_parts(vlm.parts.model, vlm.parts.renderer, vlm.parts.rule, engine={"speculate": 7})
    drafts = made._engine.engine.drafts
    note, noted = drafts.note, []
    monkeypatch.setattr(drafts, "note", lambda rows, _, adapted: (noted.append(rows), note(rows, seconds(rows), adapted)))
    with made:
        assert made.generate(CHAT, sampling)[0].tokens == expected
        stats = made.stats()
    assert 1 <= min(noted) and max(noted) <= MOST_ROWS
    if seconds is flat:
        assert stats["accepted_tokens"] > 20 and max(noted) == 8
    else:
        assert stats["proposed_tokens"] < 40, stats
