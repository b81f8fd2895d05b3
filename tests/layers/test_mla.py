"""Latent attention against one head at a time in float64, in both forms, any cutting into steps and any company."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirada.layers import mla
from mirada.layers.batch import Batch
from mirada.layers.latent_cache import LatentCache
from mirada.layers.mla import MLA, LatentSizes, attend_latents
from mirada.layers.rope import Yarn, inverse_frequencies, pairs_to_halves, rotation

PLAIN = LatentSizes(dim=24, heads=3, q_rank=None, kv_rank=20, nope=10, rope=6, value=7)
LOW_RANK = LatentSizes(dim=24, heads=2, q_rank=9, kv_rank=8, nope=4, rope=4, value=8)


def made(sizes: LatentSizes, seed: int = 0) -> MLA:
    random = torch.Generator().manual_seed(seed)
    module = MLA(sizes, 0.3, 0)
    with torch.no_grad():
        for _, p in sorted(module.named_parameters()):
            noise = torch.randn(p.shape, generator=random)
            p.copy_(1 + 0.3 * noise if p.ndim == 1 else noise * 1.5 / p.shape[1] ** 0.5)
    return module


MODULES = {"plain": made(PLAIN), "low rank": made(LOW_RANK)}


def turn_of(sizes: LatentSizes, positions: torch.Tensor):
    return rotation(positions[:, None].float() * inverse_frequencies(sizes.rope, 100.0))


def batch(lengths, past=None, slots=None) -> Batch:
    past = past or [0] * len(lengths)
    where = torch.cat([torch.arange(p, p + n) for p, n in zip(past, lengths, strict=True)])
    return Batch(torch.zeros(len(where)), where.expand(3, -1), tuple(lengths), tuple(past), tuple(slots or range(len(lengths))))


def run(module: MLA, x: torch.Tensor, b: Batch, cache: LatentCache | None = None) -> torch.Tensor:
    return module(x, turn_of(module.sizes, b.positions[0]), b, cache)


def fresh(sizes: LatentSizes, slots=range(4)) -> LatentCache:
    cache = LatentCache(1, sizes.kv_rank, sizes.rope)
    for slot in slots:
        cache.allocate(slot)
    return cache


def spin(x: torch.Tensor, position: int) -> torch.Tensor:
    """Adjacent channels as complex numbers, turned."""
    pairs = torch.view_as_complex(x.reshape(-1, 2).contiguous())
    angles = position * 100.0 ** (-torch.arange(len(pairs)).double() * 2 / x.numel())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten()


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()


def plain(module: MLA, x: torch.Tensor) -> torch.Tensor:
    """One sequence, token by token and head by head, in float64."""
    s, w = module.sizes, {name: p.detach().double() for name, p in module.named_parameters()}
    x = x.double()
    if s.q_rank is None:
        q = x @ w["q.weight"].T
    else:
        q = rms(x @ w["q_a.weight"].T, w["q_norm.weight"]) @ w["q_b.weight"].T
    q = q.view(len(x), s.heads, s.nope + s.rope)
    down = x @ w["kv_a.weight"].T
    latent, shared = rms(down[:, : s.kv_rank], w["kv_norm.weight"]), down[:, s.kv_rank :]
    up = (latent @ w["kv_b.weight"].T).view(len(x), s.heads, s.nope + s.value)
    out = torch.zeros(len(x), s.heads, s.value, dtype=torch.float64)
    for i in range(len(x)):
        for h in range(s.heads):
            mine = torch.cat((q[i, h, : s.nope], spin(q[i, h, s.nope :], i)))
            keys = torch.stack([torch.cat((up[j, h, : s.nope], spin(shared[j], j))) for j in range(i + 1)])
            out[i, h] = (keys @ mine * 0.3).softmax(0) @ up[: i + 1, h, s.nope :]
    return out.flatten(1) @ w["out.weight"].T


def drawn(sizes: LatentSizes, n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, sizes.dim, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("name", MODULES)
def test_packed_sequences_equal_plain_attention(name: str) -> None:
    module = MODULES[name]
    lengths = [9, 1, 12, 9]
    x = drawn(module.sizes, sum(lengths), 1)
    wanted = torch.cat([plain(module, part) for part in x.split(lengths)])
    for cache in (None, fresh(module.sizes)):
        assert (run(module, x, batch(lengths), cache).double() - wanted).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", MODULES)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 10**6))
@settings(max_examples=20)
def test_absorbed_equals_expanded_in_any_cutting(name: str, cuts: list[int], seed: int) -> None:
    module = MODULES[name]
    x = drawn(module.sizes, sum(cuts), seed)
    turn = turn_of(module.sizes, torch.arange(len(x)))
    q, rows = module.queries(x, turn), module.rows(x, turn)
    cache, end, steps = fresh(module.sizes), 0, []
    for n in cuts:
        begin, end = end, end + n
        one, other = module.attend_absorbed(q[begin:end], rows[:end]), module.attend_expanded(q[begin:end], rows[:end])
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        steps.append(run(module, x[begin:end], batch([n], [begin]), cache))
    torch.testing.assert_close(torch.cat(steps), run(module, x, batch([end])), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_few_scores_at_a_time_change_nothing(monkeypatch) -> None:
    module = MODULES["plain"]
    x = drawn(module.sizes, 30, 5)
    turn = turn_of(module.sizes, torch.arange(30))
    q, rows = module.queries(x, turn), module.rows(x, turn)
    wanted = module.attend_absorbed(q[11:], rows)
    for most in (1, 200, 3 * 30 * 4):
        monkeypatch.setattr(mla, "SCORES", most)
        torch.testing.assert_close(module.attend_absorbed(q[11:], rows), wanted, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_company_changes_nothing() -> None:
    module = made(LatentSizes(dim=32, heads=2, q_rank=None, kv_rank=64, nope=16, rope=8, value=16))
    together, alone = fresh(module.sizes), fresh(module.sizes)
    past = [40, 0, 90, 3]
    for slot, n in enumerate(past):
        if n:
            x = drawn(module.sizes, n, slot)
            for cache in (together, alone):
                run(module, x, batch([n], [0], [slot]), cache)
    for lengths in ([1, 1, 1, 1], [1, 30, 2, 7], [25, 1, 1, 1]):
        x = drawn(module.sizes, sum(lengths), 9)
        got = run(module, x, batch(lengths, past), together).split(lengths)
        for slot, part in enumerate(x.split(lengths)):
            one = run(module, part, batch([len(part)], [past[slot]], [slot]), alone)
            torch.testing.assert_close(got[slot], one, atol=1e-5, rtol=1e-4)
        past = [p + n for p, n in zip(past, lengths, strict=True)]


def test_the_cheaper_form_is_chosen() -> None:
    real = MLA.__new__(MLA)
    torch.nn.Module.__init__(real)
    real.sizes = LatentSizes(2048, 16, None, 512, 128, 64, 128)
    assert real.absorbs(1, 2) and real.absorbs(1, 4096) and real.absorbs(100, 100_000)
    assert not real.absorbs(512, 512) and not real.absorbs(1, 1) and not real.absorbs(500, 100_000)


@torch.no_grad()
def test_decode_reads_the_cache_as_it_is(monkeypatch) -> None:
    module = MODULES["plain"]
    cache = fresh(module.sizes)
    run(module, drawn(module.sizes, 50, 0), batch([50]), cache)
    monkeypatch.setattr(module, "expand", None)  # not callable: keys of every head are never made
    run(module, drawn(module.sizes, 1, 1), batch([1], [50]), cache)


@torch.no_grad()
def test_cached_keys_lie_in_the_released_order() -> None:
    module = MODULES["plain"]
    x = drawn(module.sizes, 3, 2)
    rows = module.rows(x, turn_of(module.sizes, torch.arange(3)))
    raw = module.kv_a(x)[:, module.sizes.kv_rank :]
    for i in range(3):
        pairs = spin(raw[i].double(), i).view(-1, 2)
        wanted = torch.cat((pairs[:, 0], pairs[:, 1]))
        assert (rows[i, module.sizes.kv_rank :].double() - wanted).abs().max() < 1e-5


def test_pairs_to_halves() -> None:
    assert pairs_to_halves(torch.tensor([[0, 10, 1, 11, 2, 12]])).tolist() == [[0, 1, 2, 10, 11, 12]]


@pytest.mark.parametrize("name", MODULES)
def test_gradients_equal_those_of_plain_attention(name: str) -> None:
    module = MODULES[name]
    x = drawn(module.sizes, 10, 4).requires_grad_()
    weights = torch.randn(10, module.sizes.dim, generator=torch.Generator().manual_seed(1))
    module.zero_grad()
    (run(module, x, batch([4, 6])) * weights).sum().backward()
    for p in module.parameters():
        assert p.grad is not None and p.grad.abs().max() > 0
    assert x.grad is not None
    for i in (0, 3, 4, 9):
        nudge = torch.zeros_like(x)
        nudge[i, 5] = 1e-4
        with torch.no_grad():
            sides = [torch.cat([plain(module, p) for p in (x + sign * nudge).split((4, 6))]) for sign in (1, -1)]
        slope = ((sides[0] - sides[1]) * weights).sum() / 2e-4
        assert abs(slope - x.grad[i, 5]) < 2e-2 * max(1.0, abs(slope))


@torch.no_grad()
def test_bfloat16_is_close() -> None:
    module = made(PLAIN).bfloat16()
    x = drawn(PLAIN, 12, 3).bfloat16()
    cache = LatentCache(1, PLAIN.kv_rank, PLAIN.rope, torch.bfloat16)
    cache.allocate(0)
    whole = run(module, x, batch([12]))
    steps = torch.cat((run(module, x[:11], batch([11]), cache), run(module, x[11:], batch([1], [11]), cache)))
    wanted = plain(made(PLAIN), drawn(PLAIN, 12, 3))
    assert whole.dtype == steps.dtype == torch.bfloat16
    for got in (whole, steps):
        assert (got.double() - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_scores_are_masked_for_several_new_tokens() -> None:
    q, rows = torch.randn(3, 2, 5), torch.randn(7, 5)
    changed = rows.clone()
    changed[6] = 100.0
    before, after = attend_latents(q, rows, 4, 1.0), attend_latents(q, changed, 4, 1.0)
    assert torch.equal(before[:2], after[:2]) and not torch.allclose(before[2], after[2])


# ---- YaRN


def test_yarn_keeps_fast_channels_and_slows_the_others() -> None:
    yarn = Yarn(40.0, 4096, mscale_all_dim=1.0)
    plain_ones, slowed = inverse_frequencies(64, 10000.0), yarn.frequencies(64, 10000.0)
    turns = 4096 * plain_ones / (2 * math.pi)
    share = (slowed / plain_ones).tolist()
    for one, times in zip(share, turns.tolist(), strict=True):
        if times > 40:
            assert one == pytest.approx(1, rel=1e-6)
        if times < 0.7:
            assert one == pytest.approx(1 / 40, rel=1e-6)
    share = [round(one, 5) for one in share]
    assert share == sorted(share, reverse=True) and sum(0.0251 < one < 0.999 for one in share) > 5
    # DeepSeek-V3's own numbers: the ramp goes from channel 10 to 23.
    assert [round(one * 40, 3) for one in share[:11]] == [40.0] * 11 and share[11] < 1 and share[22] > 0.0251
    assert share[16] == pytest.approx(6 / 13 / 40 + 7 / 13, abs=1e-4) and share[23] == 0.025
    assert yarn.turn_scale == 1.0
    assert yarn.softmax_scale == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    only = Yarn(40.0, 4096)
    assert only.turn_scale == pytest.approx(0.1 * math.log(40) + 1) and only.softmax_scale == 1.0
    assert Yarn(1.0, 4096, mscale_all_dim=1.0).softmax_scale == 1.0
