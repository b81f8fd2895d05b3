"""The cache of latents: what it holds, what it costs, and how a family asks for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mirada.errors import UnknownName
from mirada.layers import cache as module
from mirada.layers.cache import SlabCache, make_cache
from mirada.layers.latent_cache import LatentCache


def step(lengths, past, slots):
    return SimpleNamespace(lengths=tuple(lengths), past=tuple(past), slots=tuple(slots))


def test_rows_come_back_with_all_before_them(monkeypatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 4)
    cache, random = LatentCache(2, 5, 2), torch.Generator().manual_seed(0)
    kept = {(layer, slot): torch.empty(0, 7) for layer in (0, 1) for slot in (3, 8)}
    for slot in (3, 8):
        cache.allocate(slot)
    past = {3: 0, 8: 0}
    for lengths in ((6, 1), (1, 1), (3, 9), (1, 1)):
        for layer in (0, 1):
            rows = torch.randn(sum(lengths), 7, generator=random)
            got = cache.extend(layer, rows, step(lengths, [past[3], past[8]], [3, 8]))
            for slot, part, new in zip((3, 8), got, rows.split(lengths), strict=True):
                kept[layer, slot] = torch.cat((kept[layer, slot], new))
                assert torch.equal(part, kept[layer, slot])
        past[3], past[8] = past[3] + lengths[0], past[8] + lengths[1]
    assert cache.bytes_held == cache.bytes_for(past[3]) + cache.bytes_for(past[8])
    cache.free(3)
    assert cache.bytes_held == cache.bytes_for(past[8])
    cache.free(8)
    assert cache.bytes_held == 0


def test_writing_again_from_an_earlier_place_overwrites() -> None:
    cache = LatentCache(1, 3, 1)
    cache.allocate(0)
    cache.extend(0, torch.ones(5, 4), step([5], [0], [0]))
    (rows,) = cache.extend(0, torch.full((1, 4), 7.0), step([1], [2], [0]))
    assert rows[:, 0].tolist() == [1, 1, 7]


def test_released_sizes_cost_what_they_should() -> None:
    cache = make_cache({"kind": "latent", "num_layers": 27, "latent_dim": 512, "rope_dim": 64}, torch.bfloat16, "cpu")
    assert isinstance(cache, LatentCache) and cache.bytes_per_token == 27 * 576 * 2
    assert cache.bytes_for(257) == 512 * cache.bytes_per_token
    plain = make_cache({"num_layers": 36, "num_kv_heads": 8, "head_dim": 128}, torch.float32, "cpu")
    assert isinstance(plain, SlabCache) and plain.bytes_per_token == 36 * 2 * 8 * 128 * 4


def test_slots_are_opened_once_and_unknown_kinds_are_named() -> None:
    cache = LatentCache(1, 3, 1)
    cache.allocate(0)
    with pytest.raises(ValueError, match="slot 0"):
        cache.allocate(0)
    with pytest.raises(UnknownName, match=r"cache 'latnt' is unknown.*'latent'"):
        make_cache({"kind": "latnt"}, torch.float32, "cpu")
