"""Choosing tokens, against formulas written out plainly over Python lists."""

from __future__ import annotations

import math
import random

import pytest
import torch

from mirada.engine.sample import Choice, choose, draw, keep, logprobs, penalise

VOCABULARY = 37


def rows(seed, count=6, spread=3.0):
    return torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread


def softmax(values):
    top = max(values)
    powers = [math.exp(v - top) if v > -math.inf else 0.0 for v in values]
    return [p / sum(powers) for p in powers]


def kept_plainly(values, choice):
    """The set of tokens that stay: top-k, then the smallest set reaching p, then min-p."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    stay = order[: choice.top_k or len(values)]
    if choice.top_p is not None:
        mass, chosen = 0.0, []
        odds = softmax([values[i] for i in stay])
        for i, p in zip(stay, odds, strict=True):
            if mass >= choice.top_p and chosen:
                break
            chosen.append(i)
            mass += p
        stay = chosen
    odds = softmax(values)
    return {i for i in stay if odds[i] >= (choice.min_p or 0.0) * max(odds)}


SETTINGS = [
    Choice(1.0),
    Choice(0.7, top_k=5),
    Choice(1.3, top_p=0.6),
    Choice(1.0, min_p=0.1),
    Choice(0.9, top_k=9, top_p=0.8),
    Choice(2.0, top_k=20, top_p=0.95, min_p=0.02),
    Choice(1.0, top_k=1),
    Choice(1.0, top_k=1000, top_p=1e-9),
]


@pytest.mark.parametrize("seed", range(5))
def test_filters_keep_what_the_formulas_keep(seed):
    logits = rows(seed, len(SETTINGS))
    kept = keep(logits, SETTINGS)
    for row, choice in enumerate(SETTINGS):
        expected = kept_plainly(logits[row].tolist(), choice)
        assert set(torch.isfinite(kept[row]).nonzero()[:, 0].tolist()) == expected
        assert torch.equal(kept[row][sorted(expected)], logits[row][sorted(expected)])
    for row, choice in enumerate(SETTINGS):  # alone as in company
        assert torch.equal(keep(logits[row : row + 1], [choice])[0], kept[row])


def test_ties_at_the_edge_all_stay():
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    assert torch.isfinite(keep(logits, [Choice(1.0, top_k=2)])).tolist() == [[True, True, True, False]]


def test_top_p_of_one_and_min_p_of_zero_drop_nothing():
    logits = rows(3, 2, spread=30.0)
    assert torch.equal(keep(logits, [Choice(1.0, top_p=1.0), Choice(1.0, min_p=0.0)]), logits)


@pytest.mark.parametrize("uniform", [0.0, 0.1, 0.37, 0.5, 0.93, 0.9999])
def test_draw_inverts_the_cumulative_distribution(uniform):
    logits = rows(11, len(SETTINGS))
    choices = [Choice(c.temperature, c.top_k, c.top_p, c.min_p, uniform) for c in SETTINGS]
    for row, (choice, token) in enumerate(zip(choices, draw(logits, choices).tolist(), strict=True)):
        values = [v / choice.temperature for v in logits[row].tolist()]
        stay = kept_plainly(values, choice)
        odds = softmax([v if i in stay else -math.inf for i, v in enumerate(values)])
        total, expected = 0.0, None
        for i, p in enumerate(odds):
            total += p
            if p > 0 and (total > uniform or expected is None):
                expected = i
                if total > uniform:
                    break
        assert token == expected


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    source = random.Random(0)
    drawn = draw(logits.expand(8000, 4), [Choice(1.0, uniform=source.random()) for _ in range(8000)])
    observed = torch.bincount(drawn, minlength=4) / 8000
    assert torch.allclose(observed, logits[0].softmax(-1), atol=0.02)


def test_cold_is_greedy_and_greedy_is_the_largest():
    logits = rows(5)
    greedy = choose(logits, [Choice()] * 6)
    assert greedy == logits.argmax(-1).tolist()
    assert choose(logits, [Choice(1e-30, uniform=0.9)] * 6) == greedy
    assert choose(logits, [Choice(1.0, top_k=1, uniform=0.9)] * 6) == greedy


def test_rows_do_not_know_each_other():
    logits = rows(8)
    choices = [
        Choice(),
        Choice(1.0, uniform=0.3),
        Choice(),
        Choice(0.5, top_p=0.7, uniform=0.8),
        Choice(2.0, 4, uniform=0.6),
        Choice(),
    ]
    together = choose(logits, choices)
    assert together == [choose(logits[i : i + 1], [choices[i]])[0] for i in range(6)]


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((1, 5), float("-inf"))
    logits[0, 2] = 0.0
    for uniform in (0.0, 0.5, 1 - 2**-53):
        assert choose(logits, [Choice(1.0, uniform=uniform)]) == [2]


def test_repetition_penalty_pulls_seen_tokens_towards_unlikely():
    logits = torch.tensor([[2.0, -2.0, 3.0], [2.0, -2.0, 3.0]])
    seen = torch.tensor([[True, True, False], [False, False, True]])
    got = penalise(logits, seen, torch.tensor([2.0, 1.5]))
    assert got.tolist() == [[1.0, -4.0, 3.0], [2.0, -2.0, 2.0]]


def test_logprobs_are_of_the_models_own_distribution():
    logits = rows(9, 3)
    got = logprobs(logits, [4, 0, 36], [0, 2, 5])
    for row, (token, num_top) in enumerate(((4, 0), (0, 2), (36, 5))):
        odds = softmax(logits[row].tolist())
        order = sorted(range(VOCABULARY), key=lambda i: -odds[i])[:num_top]
        assert got[row].token == token
        assert got[row].logprob == pytest.approx(math.log(odds[token]), abs=1e-5)
        assert [i for i, _ in got[row].top] == order
        assert [p for _, p in got[row].top] == pytest.approx([math.log(odds[i]) for i in order], abs=1e-5)
    assert logprobs(logits, [1, 1, 1], [0, 0, 0])[1].top == ()
