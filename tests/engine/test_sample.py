"""Choosing tokens, against formulas written out plainly over Python lists."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirada.engine import guide as guides
from mirada.engine.board import Board
from mirada.engine.draw import BINS, FINE, Choice, draw, nucleus_by_bins, nucleus_by_sort
from mirada.engine.sample import Chooser, Tally, edit, logprobs, pick
from mirada.errors import RequestFailed
from mirada.types import Sampling

VOCABULARIES = (37, 128, 1000, 5000)


def rows(seed, count=6, spread=3.0, vocabulary=37):
    return torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def softmax(values):
    top = max(values)
    powers = [math.exp(v - top) if v > -math.inf else 0.0 for v in values]
    total = sum(powers)
    return [p / total for p in powers]


def kept_plainly(values, choice):
    """The set of tokens that stay: top-k, then the smallest set reaching p, then min-p; ties with the last kept stay."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    last = values[order[min(choice.top_k or len(values), len(values)) - 1]]
    stay = [i for i in order if values[i] >= last]
    if choice.top_p is not None and choice.top_p < 1:
        mass, chosen = 0.0, []
        odds = softmax([values[i] for i in stay])
        for i, p in zip(stay, odds, strict=True):
            if mass >= choice.top_p and chosen:
                break
            chosen.append(i)
            mass += p
        stay = [i for i in stay if values[i] >= values[chosen[-1]]]
    odds = softmax(values)
    least = (choice.min_p or 0.0) * max(odds)
    return {i for i in stay if odds[i] >= least}


def drawn_plainly(values, choice):
    values = [v / choice.temperature for v in values]
    stay = kept_plainly(values, choice)
    odds = softmax([v if i in stay else -math.inf for i, v in enumerate(values)])
    total, expected = 0.0, None
    for i, p in enumerate(odds):
        total += p
        if p > 0:
            expected = i
            if total > choice.uniform:
                break
    return expected


SETTINGS = [
    Choice(1.0),
    Choice(0.7, top_k=5),
    Choice(1.3, top_p=0.6),
    Choice(1.0, min_p=0.1),
    Choice(0.9, top_k=9, top_p=0.8),
    Choice(2.0, top_k=20, top_p=0.95, min_p=0.02),
    Choice(1.0, top_k=1),
    Choice(1.0, top_k=1000, top_p=1e-9),
    Choice(1.0, top_p=0.999),
    Choice(0.8, top_p=1.0, min_p=0.0),
]


def drawn(logits, choices, only=None):
    """One token per row; ``only``: from these rows of the logits."""
    return draw(Board(logits), range(len(choices)) if only is None else only, choices).tolist()


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("uniform", [0.0, 0.1, 0.37, 0.5, 0.93, 0.9999])
def test_draw_inverts_the_cumulative_distribution(uniform, vocabulary):
    logits = rows(11, len(SETTINGS), vocabulary=vocabulary)
    choices = [replace(choice, uniform=uniform) for choice in SETTINGS]
    expected = [drawn_plainly(logits[row].double().tolist(), choice) for row, choice in enumerate(choices)]
    assert drawn(logits, choices) == expected


@pytest.mark.parametrize("seed", range(2))
def test_all_that_stays_and_nothing_else_is_drawn(seed):
    logits = rows(seed, len(SETTINGS), spread=1.5)
    found = [set() for _ in SETTINGS]
    for step in range(200):
        for row, token in enumerate(drawn(logits, [replace(choice, uniform=(step + 0.5) / 200) for choice in SETTINGS])):
            found[row].add(token)
    for row, choice in enumerate(SETTINGS):
        values = [v / choice.temperature for v in logits[row].double().tolist()]
        stay = kept_plainly(values, choice)
        odds = softmax([v if i in stay else -math.inf for i, v in enumerate(values)])
        assert found[row] <= stay
        assert {i for i, p in enumerate(odds) if p > 1 / 100} <= found[row]


def test_ties_at_the_edge_all_stay_however_many_they_are():
    few = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    assert {drawn(few, [Choice(1.0, top_k=2, uniform=u / 100)])[0] for u in range(100)} == {0, 1, 2}
    many = torch.zeros(1, 9000)
    assert drawn(many, [Choice(1.0, top_k=2, uniform=0.75)]) == [6750]
    assert drawn(many, [Choice(1.0, top_p=0.01, uniform=0.75)]) == [6750]


def test_a_nucleus_wider_than_what_is_looked_at_first():
    logits = rows(2, 1, spread=0.1, vocabulary=40_000)
    for uniform in (0.02, 0.5, 0.98):
        choice = Choice(1.0, top_p=0.9, uniform=uniform)
        assert drawn(logits, [choice]) == [drawn_plainly(logits[0].double().tolist(), choice)]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([1, 7, 300, 5000]),
    spread=st.sampled_from([0.0, 1e-3, 0.5, 3.0, 40.0, 1e4]),
    steps=st.sampled_from([None, 2, 16]),
    shut=st.sampled_from([0.0, 0.5, 0.99]),
    shares=st.lists(st.one_of(st.sampled_from([0.0, 1e-9, 0.5, 0.999999]), st.floats(0, 0.99999)), min_size=1, max_size=3),
)
def test_a_nucleus_cut_by_bins_is_that_of_a_full_sort(seed, size, spread, steps, shut, shares):
    """Flat and steep, with ties (rounded to ``steps`` to the unit) and with impossible tokens."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(shares), size, generator=random) * spread
    if steps:
        logits = (logits * steps).round() / steps
    logits[:, 1:].masked_fill_(torch.rand(len(shares), size - 1, generator=random) < shut, float("-inf"))
    scaled = logits - logits.amax(-1, keepdim=True)
    assert torch.equal(nucleus_by_bins(scaled, shares), nucleus_by_sort(scaled, shares))


def test_all_of_a_nucleus_may_lie_below_the_bins():
    scaled = torch.cat((torch.zeros(1), torch.arange(5000) * -1e-3 - 2 * BINS / FINE))[None]
    for share in (0.5, 1 - 1e-30):
        assert torch.equal(nucleus_by_bins(scaled, [share]), nucleus_by_sort(scaled, [share]))


def test_a_large_nucleus_sorts_no_vocabulary(monkeypatch):
    """And is read once: what bounds the time of a flat distribution."""
    sizes, sort, topk = [], torch.Tensor.sort, torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "sort", lambda x, *a, **o: sizes.append(x.shape[-1]) or sort(x, *a, **o))
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, *a, **o: sizes.append(a[0]) or topk(x, *a, **o))
    drawn(rows(2, 1, spread=0.5, vocabulary=40_000), [Choice(1.0, top_p=0.9, uniform=0.5)])
    assert max(sizes) < 1000, sizes


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    source = random.Random(0)
    tokens = draw(Board(logits.expand(3000, 4)), range(3000), [Choice(1.0, uniform=source.random()) for _ in range(3000)])
    observed = torch.bincount(tokens, minlength=4) / 3000
    assert torch.allclose(observed, logits[0].softmax(-1), atol=0.03)


def test_cold_is_greedy_and_greedy_is_the_largest():
    for vocabulary in VOCABULARIES:
        logits = rows(5, vocabulary=vocabulary)
        greedy = logits.argmax(-1).tolist()
        assert pick(logits, [None] * 6).tokens == greedy
        assert pick(logits, [Chooser(Sampling()) for _ in range(6)]).tokens == greedy
        assert drawn(logits, [Choice(1e-30, uniform=0.9)] * 6) == greedy
        assert drawn(logits, [Choice(1.0, top_k=1, uniform=0.9)] * 6) == greedy


def test_of_equal_logits_the_lowest_token_is_taken():
    logits = torch.zeros(1, 3000)
    logits[0, [700, 701, 2999]] = 1.0
    assert pick(logits, [None]).tokens == [700]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_board_finds_the_top(vocabulary):
    logits = rows(1, 4, vocabulary=vocabulary)
    board = Board(logits)
    for count in (1, 2, 7, 30):
        values, ids = board.top(torch.tensor([3, 1]), count)
        expected = logits[[3, 1]].topk(count, -1)
        assert torch.equal(values, expected.values) and torch.equal(ids, expected.indices)


def test_impossible_tokens_are_never_drawn():
    for vocabulary, only in ((5, 2), (3000, 2999), (3000, 130)):
        logits = torch.full((1, vocabulary), float("-inf"))
        logits[0, only] = 0.0
        for uniform in (0.0, 0.5, 1 - 2**-53):
            for choice in SETTINGS:
                assert drawn(logits, [replace(choice, uniform=uniform)]) == [only]


WAYS = [
    Sampling(),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.7, top_k=40, top_p=0.9, seed=2, presence_penalty=0.5, frequency_penalty=0.3),
    Sampling(repetition_penalty=1.3, logprobs=3),
    Sampling(temperature=1.2, top_p=0.95, seed=3, logprobs=0),
    Sampling(logit_bias={5: 4.0, 9: -100.0}, frequency_penalty=1.0),
    Sampling(temperature=1.0, min_p=0.05, seed=4),
    Sampling(temperature=1.0, top_k=3, seed=5, logit_bias={1: 2.0}),
]


@pytest.mark.parametrize("vocabulary", [37, 2000])
def test_alone_as_in_any_company(vocabulary):
    """Tokens and reports of each row over many steps, whatever the others are: all, some of them, in another order, none."""
    steps = [rows(seed, len(WAYS), vocabulary=vocabulary) for seed in range(12)]
    prompt = [1, 2, 3, 4, 4]

    def run(which):
        choosers = [Chooser(WAYS[i], prompt) for i in which]
        told = [[] for _ in which]
        for logits in steps:
            picked = pick(logits[list(which)], choosers)
            for chooser, token, report, row in zip(choosers, picked.tokens, picked.reports, told, strict=True):
                chooser.note(token)
                row.append((token, report))
        return dict(zip(which, told, strict=True))

    together = run(range(len(WAYS)))
    for some in ([7, 2, 5], [6, 4, 0, 1], *([i] for i in range(len(WAYS)))):
        for i, told in run(some).items():
            assert [token for token, _ in told] == [token for token, _ in together[i]], i
            assert [report for _, report in told] == [report for _, report in together[i]], i


def test_a_step_done_again_gives_the_same():
    logits = rows(4, 3)
    choosers = [Chooser(Sampling(temperature=1.0, seed=i)) for i in range(3)]
    first = pick(logits, choosers).tokens
    assert pick(logits, choosers).tokens == first
    for chooser, token in zip(choosers, first, strict=True):
        chooser.note(token)
    again = [pick(logits, choosers).tokens for _ in range(2)]
    assert again[0] == again[1]
    fresh = [Chooser(Sampling(temperature=1.0, seed=i)) for i in range(3)]
    for chooser, token in zip(fresh, pick(logits, fresh).tokens, strict=True):
        chooser.note(token)
    assert pick(logits, fresh).tokens == again[0]


def test_every_token_has_its_own_draw():
    chooser, source = Chooser(Sampling(temperature=1.0, seed=7)), random.Random(7)
    for seed in range(6):
        logits = rows(seed, 1)
        expected = drawn_plainly(logits[0].double().tolist(), Choice(1.0, uniform=source.random()))
        assert pick(logits, [chooser]).tokens == [expected]
        chooser.note(expected)


def edited_plainly(values, s, prompt, answer):
    """Penalties and bias from their definitions, from all tokens anew."""
    out = list(values)
    for token in range(len(out)):
        if token in prompt or token in answer:
            out[token] = out[token] / s.repetition_penalty if out[token] > 0 else out[token] * s.repetition_penalty
        count = answer.count(token)
        out[token] += (s.logit_bias or {}).get(token, 0.0) - s.presence_penalty * (count > 0) - s.frequency_penalty * count
    return out


TOKENS = st.lists(st.integers(0, 36), max_size=40)


@settings(max_examples=100)
@given(
    requests=st.lists(
        st.tuples(
            TOKENS,
            TOKENS,
            st.builds(
                Sampling,
                repetition_penalty=st.sampled_from((1.0, 1.3, 0.7)),
                presence_penalty=st.sampled_from((0.0, 1.5, -0.5)),
                frequency_penalty=st.sampled_from((0.0, 0.25, -1.0)),
                logit_bias=st.none() | st.dictionaries(st.integers(0, 36), st.floats(-100, 100, width=32), max_size=4),
            ),
        ),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 99),
)
def test_penalties_and_bias_are_their_definitions(requests, seed):
    logits = rows(seed, len(requests) + 1)
    before = logits.clone()
    tallies = []
    for prompt, answer, s in requests:
        tally = Tally(s, prompt)
        for token in answer:
            tally.note(token)
        tallies.append(tally)
    edit(logits, list(range(len(requests))), tallies)
    for row, (prompt, answer, s) in enumerate(requests):
        assert logits[row].tolist() == pytest.approx(edited_plainly(before[row].tolist(), s, prompt, answer), abs=2e-5)
    assert torch.equal(logits[-1], before[-1])


def test_the_tally_grows_with_the_answer():
    tally = Tally(Sampling(frequency_penalty=1.0), ())
    for token in range(500):
        tally.note(token % 200)
    ids, factors, shifts = tally.edits()
    assert sorted(ids.tolist()) == list(range(200))
    assert set(factors.tolist()) == {1.0}
    assert shifts.tolist() == [-3.0 if token < 100 else -2.0 for token in ids.tolist()]


def test_logits_of_the_model_are_left_as_they_are():
    logits = rows(0, len(WAYS))
    before = logits.clone()
    choosers = [Chooser(s, [1, 2]) for s in WAYS]
    choosers[0].guide = Digits()
    pick(logits, choosers)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_logprobs_are_of_the_models_own_distribution(vocabulary):
    logits = rows(9, 5, vocabulary=vocabulary)
    asked = [(4, 4, 0), (1, 0, 2), (3, 36, 5)]
    got = logprobs(Board(logits), *([entry[i] for entry in asked] for i in range(3)))
    for report, (row, token, num_top) in zip(got, asked, strict=True):
        odds = softmax(logits[row].tolist())
        order = sorted(range(vocabulary), key=lambda i: -odds[i])[:num_top]
        assert report.token == token
        assert report.logprob == pytest.approx(math.log(odds[token]), abs=1e-5)
        assert [i for i, _ in report.top] == order
        assert [p for _, p in report.top] == pytest.approx([math.log(odds[i]) for i in order], abs=1e-5)


def test_one_row_that_is_not_finite_fails_alone():
    logits = rows(6, 4)
    logits[1, 3] = float("nan")
    logits[2, 0] = float("inf")
    picked = pick(logits, [Chooser(Sampling(logprobs=1)) for _ in range(4)])
    assert set(picked.errors) == {1, 2}
    assert all(isinstance(error, RequestFailed) for error in picked.errors.values())
    assert picked.tokens[0] == int(logits[0].argmax()) and picked.tokens[3] == int(logits[3].argmax())
    assert [report is not None for report in picked.reports] == [True, False, False, True]


class Digits:
    """Tokens 10 to 19, three of them."""

    allowed = range(10, 20)

    def __init__(self, length=3):
        self.left = length

    def mask(self, out):
        guides.allow(out, self.allowed)

    def accept(self, token):
        assert token in self.allowed
        self.left -= 1

    @property
    def finished(self):
        return self.left == 0

    def forced(self):
        return ()


def test_bits_lie_where_the_layout_says():
    out = np.zeros(3, np.int32)
    guides.allow(out, [0, 31, 32, 63, 64, 64])
    assert out.view(np.uint32).tolist() == [(1 << 31) | 1, (1 << 31) | 1, 1]
    logits = torch.zeros(1, 70)
    guides.shut(logits, out[None])
    assert torch.isfinite(logits[0]).nonzero()[:, 0].tolist() == [0, 31, 32, 63, 64]


class Raises(Digits):
    def mask(self, out):
        raise KeyError("lost")


class Nothing(Digits):
    allowed = ()


class Beyond(Digits):
    """Allows only bits past the vocabulary."""

    def mask(self, out):
        out.view("uint32")[-1] = 1 << 31


class Rejects(Digits):
    def accept(self, token):
        raise ValueError(f"not {token}")


class Spells(Digits):
    """Says what comes next."""

    def __init__(self):
        super().__init__(4)

    def forced(self):
        return (11, 12, 13) if self.left == 4 else ()

    def mask(self, out):
        assert self.left == 1
        super().mask(out)


@pytest.mark.parametrize("vocabulary", [37, 2000])
def test_a_guide_allows_what_it_says_and_touches_no_other_row(vocabulary):
    logits = rows(3, 4, vocabulary=vocabulary)
    hot = Sampling(temperature=1.5, seed=1)
    choosers = [None, Chooser(Sampling(), (), Digits()), Chooser(hot, (), Digits()), Chooser(hot)]
    tokens = pick(logits, choosers).tokens
    assert tokens[0] == int(logits[0].argmax())
    assert tokens[1] == 10 + int(logits[1, 10:20].argmax())
    shut = [v if 10 <= i < 20 else -math.inf for i, v in enumerate(logits[2].double().tolist())]
    assert tokens[2] == drawn_plainly(shut, Choice(1.5, uniform=random.Random(1).random()))
    assert tokens[3] == drawn_plainly(logits[3].double().tolist(), Choice(1.5, uniform=random.Random(1).random()))
    chooser = Chooser(Sampling(), (), Digits(2))
    for token in (11, 12):
        assert not chooser.finished
        chooser.note(token)
    assert chooser.finished


def test_bad_guides_fail_alone():
    logits = rows(3, 5)
    good = Chooser(Sampling(), (), Digits())
    choosers = [
        None,
        Chooser(Sampling(), (), Raises()),
        good,
        Chooser(Sampling(), (), Nothing()),
        Chooser(Sampling(), (), Beyond()),
    ]
    picked = pick(logits, choosers)
    assert set(picked.errors) == {1, 3, 4}
    assert "lost" in str(picked.errors[1]) and "no token" in str(picked.errors[3]) and "no token" in str(picked.errors[4])
    assert picked.tokens[2] == 10 + int(logits[2, 10:20].argmax())
    with pytest.raises(RequestFailed, match="not 11"):
        Chooser(Sampling(), (), Rejects()).note(11)


def test_a_guide_may_say_what_comes_next():
    chooser = Chooser(Sampling(), (), Spells())
    said = []
    for seed in range(4):
        said += pick(rows(seed, 1), [chooser]).tokens
        chooser.note(said[-1])
    assert said[:3] == [11, 12, 13] and said[3] in Digits.allowed and chooser.finished


def test_work_is_done_only_for_rows_that_need_it():
    """Bytes that are allocated beyond what a batch of greedy rows takes, from the sizes of all tensors made on the way."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            outs = made if isinstance(made, tuple) else (made,)
            self.large += sum(isinstance(t, torch.Tensor) and not func.is_view and t.numel() >= 50_000 for t in outs)
            return made

    def large(*ways):
        logits = rows(0, 8, vocabulary=50_000)
        with Sizes() as sizes:
            sizes.large = 0
            pick(logits, [Chooser(s, [1, 2]) for s in ways] + [None] * (8 - len(ways)))
        return sizes.large

    assert large() == large(Sampling(temperature=1.0, top_k=20, top_p=0.8)) == 0
    narrow = large(Sampling(presence_penalty=1.0))
    assert narrow == 2  # the row that is edited, picked out once and written to in place
    assert large(*[Sampling(logprobs=5)] * 8) == 1 + 8 * 2  # one scratch row, used twice by each
