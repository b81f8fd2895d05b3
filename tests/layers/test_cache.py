"""The slab cache against plain softmax attention, in any cutting into steps and any company."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mirada.layers import cache as module
from mirada.layers.cache import SlabCache


def plain(q, k, v, scale):
    """Causal attention of a whole sequence, one head at a time, in float64."""
    n, heads, width = q.shape
    group = heads // k.shape[1]
    out = torch.empty(n, heads, width, dtype=torch.float64)
    for head in range(heads):
        scores = (q[:, head].double() @ k[:, head // group].double().T) * scale
        scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf"))
        out[:, head] = scores.softmax(-1) @ v[:, head // group].double()
    return out


def step(lengths, past, slots):
    return SimpleNamespace(lengths=tuple(lengths), past=tuple(past), slots=tuple(slots))


def drawn(seed, n, heads, kv_heads, width):
    made = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, heads, width, generator=made),
        torch.randn(n, kv_heads, width, generator=made),
        torch.randn(n, kv_heads, width, generator=made),
    )


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 16), (6, 2, 64), (32, 8, 128), (3, 3, 72)])
@pytest.mark.parametrize("cuts", [[20], [12, 1, 1, 6], [1] * 20, [7, 13]])
def test_any_cutting_equals_plain_attention(heads, kv_heads, width, cuts):
    q, k, v = drawn(1, 20, heads, kv_heads, width)
    cache = SlabCache(1, kv_heads, width)
    cache.allocate(5)
    pieces, past = [], 0
    for n in cuts:
        new = slice(past, past + n)
        pieces.append(cache.attend(0, q[new], k[new], v[new], step([n], [past], [5]), width**-0.5))
        past += n
    assert torch.allclose(torch.cat(pieces).double(), plain(q, k, v, width**-0.5), atol=2e-6)


def test_company_changes_nothing():
    whole = {slot: drawn(slot, n, 4, 2, 16) for slot, n in ((0, 9), (1, 30), (2, 1))}
    together, alone = SlabCache(2, 2, 16), SlabCache(2, 2, 16)
    for slot in whole:
        together.allocate(slot)
        alone.allocate(slot)
    order = (2, 0, 1)
    lengths = [whole[s][0].shape[0] for s in order]
    packed = [torch.cat([whole[s][i] for s in order]) for i in range(3)]
    out = together.attend(1, *packed, step(lengths, [0, 0, 0], order), 0.25).split(lengths)
    for slot, got in zip(order, out, strict=True):
        n = got.shape[0]
        assert torch.equal(got, alone.attend(1, *whole[slot], step([n], [0], [slot]), 0.25))
    new = drawn(99, 3, 4, 2, 16)
    out = together.attend(1, *new, step([1, 1, 1], lengths, order), 0.25)
    for row, (slot, past) in enumerate(zip(order, lengths, strict=True)):
        one = [x[row : row + 1] for x in new]
        assert torch.equal(out[row : row + 1], alone.attend(1, *one, step([1], [past], [slot]), 0.25))


def test_layers_and_slots_are_apart():
    cache = SlabCache(2, 1, 8)
    for slot in (0, 1):
        cache.allocate(slot)
    q, k, v = drawn(3, 2, 1, 1, 8)
    first = cache.attend(0, q[:1], k[:1], v[:1], step([1], [0], [0]), 1.0)
    assert torch.allclose(first, v[:1])
    cache.attend(1, q[1:], k[1:], v[1:], step([1], [0], [0]), 1.0)
    cache.attend(0, q[1:], k[1:], v[1:], step([1], [0], [1]), 1.0)
    again = cache.attend(0, q[1:], k[1:], v[1:], step([1], [1], [0]), 1.0)
    assert torch.allclose(again.double(), plain(q, k, v, 1.0)[1:], atol=1e-6)


def test_growth_keeps_what_was_written_and_bytes_are_counted(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)
    q, k, v = drawn(2, 11, 4, 2, 16)
    cache = SlabCache(3, 2, 16)
    assert cache.bytes_per_token == 3 * 2 * 2 * 16 * 4
    cache.allocate(0)
    assert cache.bytes_held == 0
    out = []
    for past in range(11):
        one = slice(past, past + 1)
        out = [cache.attend(layer, q[one], k[one], v[one], step([1], [past], [0]), 0.25) for layer in range(3)]
        assert cache.bytes_held == -(-(past + 1) // 4) * 4 * cache.bytes_per_token == cache.bytes_for(past + 1)
    for got in out:
        assert torch.allclose(got.double(), plain(q, k, v, 0.25)[10:], atol=2e-6)
    cache.free(0)
    assert cache.bytes_held == 0


def test_slots_are_opened_once_and_closed_once():
    cache = SlabCache(1, 1, 8)
    cache.allocate(0)
    with pytest.raises(ValueError, match="slot 0"):
        cache.allocate(0)
    cache.free(0)
    with pytest.raises(KeyError):
        cache.free(0)
    cache.allocate(0)


def test_bfloat16_slab_holds_half_the_bytes():
    cache = SlabCache(1, 2, 16, torch.bfloat16)
    assert cache.bytes_per_token * 2 == SlabCache(1, 2, 16).bytes_per_token
    cache.allocate(0)
    q, k, v = (x.bfloat16() for x in drawn(4, 6, 4, 2, 16))
    out = cache.attend(0, q, k, v, step([6], [0], [0]), 0.25)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.double(), plain(q, k, v, 0.25), atol=0.03)
