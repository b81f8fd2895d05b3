"""Slabs and pages, floats and int8: one result for any mix of chunks and decodes, and every byte accounted for."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirada.errors import OutOfMemory, SettingsError, UnknownName
from mirada.layers import cache as module
from mirada.layers import mla as mla_module
from mirada.layers import paged as paged_module
from mirada.layers import past as past_module
from mirada.layers.cache import Cache, SlabCache, make_cache
from mirada.layers.kv_int8 import Quantised, quantise
from mirada.layers.latent_cache import LatentCache
from mirada.layers.mla import MLA, LatentSizes
from mirada.layers.paged import PagedCache, PagedLatentCache, Pages
from mirada.layers.past import attend_one, attend_pieces, merge, written_piece
from mirada.layers.rope import mrope_angles, rotation

HEADS, KV_HEADS, WIDTH, LAYERS = 6, 2, 16, 2
GQA = {"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "head_dim": WIDTH}
LATENT = {"kind": "latent", "num_layers": LAYERS, "latent_dim": 12, "rope_dim": 4}
SIZES = LatentSizes(dim=24, heads=3, q_rank=None, kv_rank=12, nope=8, rope=4, value=6)
FEW = settings(max_examples=25)


def step(lengths, past, slots):
    return SimpleNamespace(lengths=tuple(lengths), past=tuple(past), slots=tuple(slots))


@st.composite
def schedules(draw):
    """Steps of {slot: new tokens}: chunks and single tokens of up to three sequences in any company."""
    one = st.dictionaries(st.integers(0, 2), st.sampled_from([1, 1, 1, 2, 5, 9]), min_size=1)
    return draw(st.lists(one, min_size=1, max_size=7))


def play(cache, schedule, work):
    """``work(layer, total new tokens, batch)`` for every layer of every step; all that it gave."""
    past = dict.fromkeys(range(3), 0)
    for slot in past:
        cache.allocate(slot)
    made = []
    for lengths in schedule:
        batch = step(lengths.values(), [past[slot] for slot in lengths], lengths)
        made += [work(cache, layer, batch) for layer in range(LAYERS)]
        for slot, n in lengths.items():
            past[slot] += n
    return made, past


def gqa(seed):
    random = torch.Generator().manual_seed(seed)

    def work(cache, layer, batch):
        total = sum(batch.lengths)
        q, k, v = (torch.randn(total, heads, WIDTH, generator=random) for heads in (HEADS, KV_HEADS, KV_HEADS))
        return cache.attend(layer, q, k, v, batch, WIDTH**-0.5)

    return work


def mla(seed):
    random = torch.Generator().manual_seed(seed)
    layers = []
    for index in range(LAYERS):
        layers.append(MLA(SIZES, 0.3, index))
        for parameter in layers[-1].parameters():
            parameter.data = torch.randn(parameter.shape, generator=random) / parameter.shape[-1] ** 0.5

    @torch.no_grad()
    def work(cache, layer, batch):
        total = sum(batch.lengths)
        places = torch.cat([torch.arange(p, p + n) for p, n in zip(batch.past, batch.lengths, strict=True)])
        turn = rotation(mrope_angles(places.expand(3, -1), (2, 0, 0), 4, 1e4))
        return layers[layer](torch.randn(total, SIZES.dim, generator=random), turn, batch, cache)

    return work


@FEW
@given(schedule=schedules(), kv=st.sampled_from(["auto", "int8"]), seed=st.integers(0, 99))
@pytest.mark.parametrize(("spec", "make"), [(GQA, gqa), (LATENT, mla)])
def test_pages_equal_slabs(spec, make, schedule, kv, seed):
    slabs = make_cache(spec, torch.float32, "cpu", kv=kv)
    small = spec | {"page": 4}  # so that sequences of a few tokens cross many
    pages = make_cache(small, torch.float32, "cpu", layout="paged", kv=kv, budget=64 * 4 * slabs.bytes_per_token)
    (ours, past), (theirs, _) = play(pages, schedule, make(seed)), play(slabs, schedule, make(seed))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert pages.bytes_held == sum(map(pages.bytes_for, past.values()))
    for slot in past:
        pages.free(slot)
    assert pages.bytes_held == 0 and sorted(pages._free) == list(range(pages.num_pages))


@FEW
@given(schedule=schedules(), seed=st.integers(0, 99))
@pytest.mark.parametrize(("spec", "make"), [(GQA, gqa), (LATENT, mla)])
def test_small_tiles_change_nothing(spec, make, schedule, seed):
    """Of a past read in tiles of a few tokens, as int8 and as floats."""
    for kv in ("auto", "int8"):
        whole, _ = play(make_cache(spec, torch.float32, "cpu", kv=kv), schedule, make(seed))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(past_module, "TILE", 3 * KV_HEADS * WIDTH)
            patch.setattr(mla_module, "TILE", 3 * 12)
            cut, _ = play(make_cache(spec, torch.float32, "cpu", kv=kv), schedule, make(seed))
        for a, b in zip(whole, cut, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


@FEW
@given(schedule=schedules(), seed=st.integers(0, 99))
@pytest.mark.parametrize(("spec", "make"), [(GQA, gqa), (LATENT, mla)])
def test_int8_is_near_and_costs_a_quarter(spec, make, schedule, seed):
    exact, small = (make_cache(spec, torch.float32, "cpu", kv=kv) for kv in ("auto", "int8"))
    (near, past), (far, _) = play(small, schedule, make(seed)), play(exact, schedule, make(seed))
    for a, b in zip(near, far, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()
    assert any(not torch.equal(a, b) for a, b in zip(near, far, strict=True))
    assert small.bytes_held == sum(map(small.bytes_for, past.values()))


def test_bytes_of_a_token_as_int8():
    for spec, share in (
        ({"num_layers": 36, "num_kv_heads": 8, "head_dim": 128}, 132 / 512),
        ({"num_layers": 12, "num_kv_heads": 2, "head_dim": 64}, 68 / 256),
        ({"kind": "latent", "num_layers": 27, "latent_dim": 512, "rope_dim": 64}, (576 + 8) / (576 * 4)),
    ):
        exact, small = (make_cache(spec, torch.float32, "cpu", kv=kv) for kv in ("auto", "int8"))
        assert small.bytes_per_token == exact.bytes_per_token * share


def test_int8_rows_have_scales_of_their_own():
    """A large row, head or part does not cost its neighbours their precision, and zeros stay zeros."""
    x = (
        torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-4, 1.0, 1e4, 0.0, 1.0])[:, None, None]
    )
    x[..., 12:] *= 100
    values, scales = quantise(x, (12, 4))
    back = Quantised(values, scales, (12, 4)).to(torch.float32)
    assert values.dtype == torch.int8 and scales.shape == (5, 2, 2)
    for part in (slice(0, 12), slice(12, 16)):
        error, most = (back - x)[..., part].abs().amax(-1), x[..., part].abs().amax(-1)
        assert (error <= most / 127 / 2 * 1.001).all()
    assert (back[3] == 0).all()


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("n", [2, 7])
def test_no_mask_and_no_whole_copy_of_a_long_past(kv, n):
    """A few tokens after 3000: the largest tensor made is far below n x S scores of all heads, and a float copy."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for made in out if isinstance(out, tuple) else (out,):
                if isinstance(made, torch.Tensor) and not func.is_view:
                    self.most = max(self.most, made.numel())
            return out

    total, past = 3000 + n, 3000
    k, v = (torch.randn(KV_HEADS, total, WIDTH) for _ in range(2))
    sides = (k, v) if kv == "auto" else [Quantised(*quantise(x, (WIDTH,)), (WIDTH,)) for x in (k, v)]
    q = torch.randn(n, HEADS, WIDTH)
    with pytest.MonkeyPatch.context() as patch, Largest() as seen:
        patch.setattr(past_module, "TILE", 64 * KV_HEADS * WIDTH)
        out = attend_one(q, *sides, 0.25)
    assert seen.most < past
    assert torch.allclose(out, attend_one(q, k, v, 0.25, "eager"), atol=1e-5 if kv == "auto" else 0.02)


@pytest.mark.parametrize("fused", [True, False])
def test_pieces_merge_to_the_whole(fused):
    random = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(h, 40, 8, generator=random, dtype=torch.float64) for h in (4, 4, 4))
    k = k * 8  # sharp: pieces of very different weight
    whole = written_piece(q, k, v, None, 1.0)
    out = written_piece(q, k[:, :3], v[:, :3], None, 1.0)
    for start, stop in ((3, 20), (20, 40)):
        out = merge(out, written_piece(q, k[:, start:stop], v[:, start:stop], None, 1.0))
    assert torch.allclose(out[0], whole[0]) and torch.allclose(out[1], whole[1])
    kind = "sdpa" if fused else "eager"
    rows = q.transpose(0, 1)[:5].float()
    got = attend_pieces(rows, lambda a, b: (k[:, a:b].float(), v[:, a:b].float()), 35, 6, 0.1, kind)
    assert torch.allclose(got, attend_one(rows, k.float(), v.float(), 0.1, "eager"), atol=1e-5)


# Bytes.


def caches(kv, budget_tokens):
    for spec in (GQA, LATENT):
        for layout in ("slab", "paged"):
            size = make_cache(spec, torch.float32, "cpu", kv=kv).bytes_per_token
            yield make_cache(spec, torch.float32, "cpu", layout=layout, kv=kv, budget=budget_tokens * size)


@settings(max_examples=15)
@given(
    wishes=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 900)), min_size=5, max_size=10),
    kv=st.sampled_from(["auto", "int8"]),
)
def test_growth_is_exact_and_the_budget_is_never_passed(wishes, kv):
    for cache in caches(kv, 1500):
        tokens: dict[int, int] = {}
        for slot, wish in wishes:
            if slot not in tokens:
                cache.allocate(slot)
                tokens[slot] = 0
            before, growth = cache.bytes_held, cache.growth_bytes(slot, wish)
            beside = 0 if isinstance(cache, Pages) or not growth else cache.capacity(tokens[slot]) * cache.bytes_per_row
            beside = beside if tokens[slot] else 0
            assert beside <= cache.passing_bytes(wish) or not growth
            if before + growth + beside > cache.budget:
                with pytest.raises(OutOfMemory, match="cache_bytes"):
                    cache.grow(slot, wish)
                assert cache.bytes_held == before and cache.growth_bytes(slot, wish) == growth
                cache.free(slot)
                del tokens[slot]
            else:
                cache.grow(slot, wish)
                assert cache.bytes_held == before + growth <= cache.budget
                tokens[slot] = max(tokens[slot], wish)
            assert cache.bytes_held == sum(map(cache.bytes_for, tokens.values()))
            assert cache.bytes_free == cache.budget - cache.bytes_held


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_what_a_slab_was_is_counted_while_it_is_copied(monkeypatch, kv):
    """All tensors that hold keys and values at once, old ones too, are what ``bytes_held`` says, and ``peak_bytes`` bounds."""
    live, seen, fresh = [0], [], torch.empty

    def empty(*args, **options):
        made = fresh(*args, **options)
        live[0] += made.nbytes
        weakref.finalize(made, lambda size=made.nbytes: live.__setitem__(0, live[0] - size))
        seen.append((live[0], cache.bytes_held))
        return made

    monkeypatch.setattr(torch, "empty", empty)
    cache = SlabCache(3, 2, 8, kv=kv)
    cache.allocate(0)
    for tokens in (1, 256, 257, 700, 3000, 3001, 9000):
        cache.grow(0, tokens)
        assert live[0] == cache.bytes_held == cache.bytes_for(tokens)
        assert max(size for size, _ in seen) <= max(held for _, held in seen) <= cache.peak_bytes(tokens)
        assert all(size <= held for size, held in seen)
    assert max(held for _, held in seen) > cache.bytes_for(9000), "the last slab was copied beside an old one"


def test_growth_with_no_room_for_the_copy_is_refused():
    cache = SlabCache(2, 1, 4, budget=(2 * 512 + 255) * 32)
    cache.allocate(0)
    cache.grow(0, 256)
    with pytest.raises(OutOfMemory):
        cache.grow(0, 257)
    assert cache.bytes_held == cache.bytes_for(256) and cache.room(0) == 256
    larger = SlabCache(2, 1, 4, budget=(2 * 512 + 256) * 32)
    larger.allocate(0)
    larger.grow(0, 256)
    larger.grow(0, 257)
    assert larger.bytes_held == larger.bytes_for(257)


def test_an_allocator_that_fails_leaves_the_count_as_it_was(monkeypatch):
    cache = SlabCache(2, 1, 4)
    cache.allocate(0)
    cache.grow(0, 200)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch, "empty", lambda *a, **o: (_ for _ in ()).throw(MemoryError()))
        cache.grow(0, 300)
    assert cache.bytes_held == cache.bytes_for(200)
    cache.free(0)
    assert cache.bytes_held == 0


def test_writing_past_the_budget_raises():
    for cache in caches("auto", 300):
        cache.allocate(0)
        work = gqa(1) if isinstance(cache, SlabCache | PagedCache) else None
        with pytest.raises(OutOfMemory):
            if work:
                work(cache, 0, step([4000], [0], [0]))
            else:
                cache.extend(0, torch.zeros(4000, 16), step([4000], [0], [0]))
        assert cache.bytes_held <= cache.budget


def test_a_slab_grows_by_an_eighth_at_most():
    cache, past, moves = SlabCache(1, 1, 4), 0, 0
    held = 0
    while past < 140_000:
        past = cache.capacity(past + 1)
        assert past <= held + max(module.BLOCK, held // 8)
        moves, held = moves + 1, past
    assert moves < 64
    for tokens in (1, 255, 256, 257, 2047, 2048, 4095, 4097, 131_071, 131_072):
        assert tokens <= cache.capacity(tokens) < tokens + max(module.BLOCK, tokens // 8 + 1)


def test_what_a_slab_held_is_there_after_growing(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)
    for kv in ("auto", "int8"):
        cache = LatentCache(1, 3, 1, kv=kv)
        cache.allocate(0)
        rows = torch.randn(41, 4, generator=torch.Generator().manual_seed(1))
        for past in range(41):
            (got,) = cache.extend(0, rows[past : past + 1], step([1], [past], [0]))
        whole = LatentCache(1, 3, 1, kv=kv)
        whole.allocate(0)
        (want,) = whole.extend(0, rows, step([41], [0], [0]))
        assert torch.equal(*(x.to(torch.float32) for x in (got, want)))


def test_settings_are_checked():
    with pytest.raises(SettingsError, match="layout 'pagd'"):
        make_cache(GQA, torch.float32, "cpu", layout="pagd")
    with pytest.raises(SettingsError, match="kv='int4'"):
        make_cache(GQA, torch.float32, "cpu", kv="int4")
    with pytest.raises(SettingsError, match="need a budget"):
        make_cache(GQA, torch.float32, "cpu", layout="paged")
    with pytest.raises(SettingsError, match="need a budget"):
        make_cache(GQA, torch.float32, "cpu", layout="paged", budget=100)
    with pytest.raises(UnknownName, match="latnt"):
        make_cache(LATENT | {"kind": "latnt"}, torch.float32, "cpu", layout="paged", budget=1 << 20)
    assert isinstance(make_cache(GQA, torch.float32, "cpu", budget=1 << 20), SlabCache)


# Pages.


def paged(pages=12, **more):
    size = make_cache(GQA, torch.float32, "cpu").bytes_per_token
    return PagedCache(**GQA, budget=pages * 4 * size, page=4, **more)


def test_a_kernel_that_is_there_decodes(monkeypatch):
    """It gets pages, tables and lengths from which a plain loop finds every key; prefill does not go through it."""
    calls = []

    def kernel(pools, q, tables, scale):
        if max(tables.counts) > 1:
            return None
        calls.append(len(q))
        (k_pages, v_pages), block_tables, lengths = pools, tables.block_tables, tables.lengths
        out = []
        for row, table, length in zip(q, block_tables.tolist(), lengths.tolist(), strict=True):
            sides = [torch.stack([pool[table[i // 4], i % 4] for i in range(length)], 1) for pool in (k_pages, v_pages)]
            out.append(attend_one(row[None], *sides, scale, "eager"))
        return torch.cat(out)

    schedule = [{0: 9, 2: 1}, {0: 1, 1: 6}, {0: 1, 1: 1, 2: 1}, {1: 1, 0: 1}]
    plain, _ = play(paged(), schedule, gqa(4))
    monkeypatch.setattr(paged_module.fused, "attend_pages", kernel)
    through, _ = play(paged(), schedule, gqa(4))
    assert calls == [3, 3, 2, 2]
    for a, b in zip(through, plain, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_growth_copies_nothing():
    cache = paged()
    where = [pool.data_ptr() for layer in range(LAYERS) for pool in cache.pools(layer)]
    play(cache, [{0: 3}, {0: 9}, {0: 1, 1: 5}], gqa(0))
    assert where == [pool.data_ptr() for layer in range(LAYERS) for pool in cache.pools(layer)]


def test_shared_pages_are_counted_once_and_never_written():
    cache = paged()
    store = cache.store(cache.budget, 32)
    assert store.block == 4
    cache.allocate(0)
    gqa(1)(cache, 0, step([10], [0], [0]))
    pages = store.keep(0, 0, 2)
    cache.allocate(1)
    store.reuse(1, pages)
    assert cache.bytes_held == 3 * cache.bytes_per_page
    with pytest.raises(ValueError, match="shared pages"):
        gqa(1)(cache, 0, step([1], [7], [1]))
    gqa(1)(cache, 0, step([1], [8], [1]))
    assert cache.bytes_held == 4 * cache.bytes_per_page
    cache.free(0)
    assert cache.bytes_held == 3 * cache.bytes_per_page
    cache.free(1)
    assert cache.bytes_held == 0 and len(cache._free) == cache.num_pages - 2
    for page in pages:
        store.drop(page)
    assert sorted(cache._free) == list(range(cache.num_pages))


def test_kept_pages_give_way_to_sequences():
    cache = paged(4)
    store, kept = cache.store(cache.budget, 32), []
    cache.allocate(0)
    gqa(1)(cache, 0, step([12], [0], [0]))
    kept += store.keep(0, 0, 3)
    cache.free(0)
    cache.allocate(1)
    with pytest.raises(OutOfMemory, match="prefix_cache_bytes"):
        cache.grow(1, 16)
    assert cache.bytes_held == 0

    def reclaim(count):
        dropped = [kept.pop() for _ in range(min(count, len(kept)))]
        for page in dropped:
            store.drop(page)
        return len(dropped)

    cache.reclaim = reclaim
    cache.grow(1, 16)
    assert not kept and cache.bytes_held == cache.budget


def test_latent_pages_are_one_row_wide():
    cache = PagedLatentCache(3, 12, 4, budget=1 << 20)
    assert cache.pools(2)[0].shape[2:] == (1, 16) and cache.bytes_per_token == 3 * 16 * 4


def test_a_layout_that_lacks_something_is_not_made():
    class Half(Cache):
        def free(self, slot: int) -> None: ...

    with pytest.raises(TypeError, match="capacity"):
        Half(1, ((1, 1),), torch.float32, "cpu")
