"""Every Triton kernel against the torch code that it stands for, in Triton's interpreter: ``test_triton.py`` runs this file in
a process of its own, where TRITON_INTERPRET is set before Triton is imported. ``tests/gpu`` runs it on a card.

Sizes are small and odd: heads and widths that fill no block, contexts that end within a page, rows of no sequence.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mirada.adapt.packed import Packed
from mirada.layers.kernels import (
    triton_mla,
    triton_moe,
    triton_moe_packed,
    triton_norm,
    triton_packed,
    triton_paged,
    triton_rope,
    triton_varlen,
)
from mirada.layers.kv_int8 import Quantised, quantise
from mirada.layers.mla import attend_latents
from mirada.layers.moe import Experts
from mirada.layers.norm import RMSNorm, norm_heads
from mirada.layers.past import attend_one
from mirada.layers.rope import rotate, rotation

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TYPES = (torch.float32, torch.bfloat16)
PAGE = 8


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def near(ours: Tensor, theirs: Tensor, times: float = 1.0) -> None:
    """Within the roundings of the type, of which bfloat16 keeps 8 bits; never NaN."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    limit = (2e-5 if ours.dtype == torch.float32 else 1.6e-2) * times
    gap = (ours.double() - theirs.double()).abs() / (theirs.double().abs() + theirs.double().std() + 1e-9)
    assert gap.max() < limit, f"differs by {gap.max():.2e}, limit {limit:.1e}"


@pytest.mark.parametrize("dtype", TYPES)
def test_norm(dtype):
    norm = RMSNorm(37, 1e-6).to(DEVICE, dtype)
    norm.weight.copy_(noise(37, seed=1))
    x, delta = noise(5, 74, dtype=dtype)[:, :37], noise(5, 37, dtype=dtype, seed=2)
    near(triton_norm.rms_norm(x, norm.weight, norm.eps), norm(x))
    total, made = triton_norm.add_norm(x.contiguous(), delta, norm.weight, norm.eps)
    near(total, x + delta)  # the interpreter cuts bits off where a card rounds to even
    near(made, norm(x + delta))


@pytest.mark.parametrize("dtype", TYPES)
def test_swiglu(dtype):
    gate, up = (both := noise(3, 2 * 1029, dtype=dtype)).chunk(2, -1)
    near(triton_norm.swiglu(both), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("normed", (True, False))
def test_heads_are_normalised_turned_and_written(dtype, normed):
    tokens, heads, kv_heads, width = 3, 3, 2, 20
    qkv = noise(tokens, (heads + 2 * kv_heads) * width, dtype=dtype)
    norms = [RMSNorm(width, 1e-6).to(DEVICE, dtype) for _ in range(2)]
    for i, norm in enumerate(norms):
        norm.weight.copy_(noise(width, seed=3 + i))
    turn = rotation(noise(tokens, width // 2, seed=5))
    pools = [torch.full((4, PAGE, kv_heads, width), 7.0, dtype=dtype, device=DEVICE) for _ in range(2)]
    rows = torch.tensor([17, -1, 3], device=DEVICE)
    given = (norms[0].weight, norms[1].weight, 1e-6) if normed else None
    q = triton_rope.rope_write(qkv, heads, turn, given, rows, *pools)
    qk, v = qkv.view(tokens, -1, width).split((heads + kv_heads, kv_heads), 1)
    qk = rotate(norm_heads(qk, *norms, heads) if normed else qk, turn)
    near(q, qk[:, :heads])
    for pool, new in zip(pools, (qk[:, heads:], v), strict=True):
        flat = pool.flatten(0, 1)
        near(flat[[17, 3]], new[[0, 2]])
        flat[[17, 3]] = 7.0
        assert bool((flat == 7.0).all()), "written elsewhere"


@pytest.mark.parametrize("dtype", (*TYPES, torch.int8))
def test_rows_are_written(dtype):
    new = noise(3, 2, 600).mul(20).to(dtype)
    whole = torch.full((5, PAGE, 2, 600), 7, dtype=dtype, device=DEVICE)
    pool = whole[1:]  # what a place of -1 would write to lies before it
    triton_rope.write(pool, torch.tensor([17, -1, 3], device=DEVICE), new)
    flat = pool.flatten(0, 1)
    assert torch.equal(flat[[17, 3]], new[[0, 2]])
    flat[[17, 3]] = 7
    assert bool((whole == 7).all()), "written elsewhere"


def pages(lengths: tuple[int, ...], kv_heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values [pages, PAGE, K, d], a block table whose pages are shuffled, and lengths. Unused places are infinite."""
    most = -(-max(lengths) // PAGE) + 1
    order = torch.randperm(len(lengths) * most, generator=torch.Generator().manual_seed(1)).view(len(lengths), most)
    pools = [noise(len(lengths) * most, PAGE, kv_heads, width, dtype=dtype, seed=8 + i) for i in range(2)]
    for b, length in enumerate(lengths):
        for at in range(length, most * PAGE):
            for pool in pools:
                pool[order[b, at // PAGE], at % PAGE] = math.inf
    return *pools, order.to(DEVICE, torch.int32), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def past_of(pool: Tensor, tables: Tensor, b: int, length: int) -> Tensor:
    """[K, S, d]."""
    return pool[tables[b].long()].flatten(0, 1)[:length].transpose(0, 1)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("lengths", "splits"), (((1, 30, 0), 1), ((75, 130), 4)))
def test_paged_decode(dtype, lengths, splits):
    heads, kv_heads, width = 6, 2, 20
    keys, values, tables, totals = pages(lengths, kv_heads, width, dtype)
    q = noise(len(lengths), heads, width, dtype=dtype)
    made = triton_paged.paged_decode(q, (keys, values), tables, totals, 0.3, splits)
    for b, length in enumerate(lengths):
        if not length:
            assert not made[b].any()
            continue
        k, v = (past_of(pool, tables, b, length) for pool in (keys, values))
        near(made[b], attend_one(q[b : b + 1], k, v, 0.3)[0], 2)


def test_paged_decode_of_int8():
    lengths, heads, kv_heads, width = (19, 70), 4, 2, 16
    keys, values, tables, totals = pages(lengths, kv_heads, width, torch.float32)
    pools = tuple(plane for pool in (keys, values) for plane in quantise(pool.nan_to_num(0, 0, 0).flatten(0, 1), (width,)))
    pools = tuple(plane.unflatten(0, keys.shape[:2]) for plane in pools)
    q = noise(len(lengths), heads, width)
    made = triton_paged.paged_decode(q, pools, tables, totals, 0.3, 2)
    for b, length in enumerate(lengths):
        planes = [past_of(pool, tables, b, length) for pool in pools]
        sides = [Quantised(planes[i], planes[i + 1], (width,)) for i in (0, 2)]
        near(made[b], attend_one(q[b : b + 1], sides[0], sides[1], 0.3)[0], 2)


@pytest.mark.parametrize("dtype", TYPES)
def test_paged_prefill(dtype):
    counts, lengths, heads, kv_heads, width = (1, 23, 9), (14, 23, 70), 6, 2, 20
    keys, values, tables, totals = pages(lengths, kv_heads, width, dtype)
    q = noise(sum(counts), heads, width, dtype=dtype)
    places = triton_paged.tiles(counts, triton_paged.queries(heads, kv_heads), q.device)
    made = triton_paged.paged_prefill(q, (keys, values), tables, totals, places, 0.3)
    for b, (part, ours) in enumerate(zip(q.split(counts), made.split(counts), strict=True)):
        k, v = (past_of(pool, tables, b, lengths[b]) for pool in (keys, values))
        near(ours, attend_one(part, k, v, 0.3), 2)


def in_int8(pool: Tensor, parts: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Values and scales of pages."""
    return tuple(plane.unflatten(0, pool.shape[:2]) for plane in quantise(pool.nan_to_num(0, 0, 0).flatten(0, 1), parts))


def test_paged_prefill_of_int8():
    counts, lengths, heads, kv_heads, width = (1, 9), (14, 40), 4, 2, 16
    keys, values, tables, totals = pages(lengths, kv_heads, width, torch.float32)
    pools = (*in_int8(keys, (width,)), *in_int8(values, (width,)))
    q = noise(sum(counts), heads, width)
    places = triton_paged.tiles(counts, triton_paged.queries(heads, kv_heads), q.device)
    made = triton_paged.paged_prefill(q, pools, tables, totals, places, 0.3)
    for b, (part, ours) in enumerate(zip(q.split(counts), made.split(counts), strict=True)):
        planes = [past_of(pool, tables, b, lengths[b]) for pool in pools]
        near(ours, attend_one(part, *(Quantised(planes[i], planes[i + 1], (width,)) for i in (0, 2)), 0.3), 2)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "rank", "rope", "splits"), ((3, 24, 8, 1), (20, 40, 12, 2)))
def test_latent_decode(dtype, heads, rank, rope, splits):
    lengths = (1, 45)
    rows, _, tables, totals = pages(lengths, 1, rank + rope, dtype)
    q = noise(len(lengths), heads, rank + rope, dtype=dtype)
    made = triton_mla.latent_decode(q, (rows,), tables, totals, rank, 0.2, splits)
    for b, length in enumerate(lengths):
        near(made[b], attend_latents(q[b : b + 1], past_of(rows, tables, b, length)[0], rank, 0.2)[0], 2)


@pytest.mark.parametrize(("dtype", "int8"), ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)))
def test_latents_of_many_tokens(dtype, int8):
    counts, lengths, heads, rank, rope = (1, 5), (12, 21), 18, 24, 8
    rows, _, tables, totals = pages(lengths, 1, rank + rope, dtype)
    pools = in_int8(rows, (rank, rope)) if int8 else (rows,)
    q = noise(sum(counts), heads, rank + rope, dtype=dtype)
    places = triton_paged.tiles(counts, triton_mla.QUERIES, q.device)
    made = triton_mla.latent_prefill(q, pools, tables, totals, places, rank, 0.2)
    for b, (part, ours) in enumerate(zip(q.split(counts), made.split(counts), strict=True)):
        held = [past_of(pool, tables, b, lengths[b])[0] for pool in pools]
        near(ours, attend_latents(part, Quantised(*held, (rank, rope)) if int8 else held[0], rank, 0.2), 2)


def test_latent_decode_of_int8():
    lengths, heads, rank, rope = (1, 45), 3, 24, 8
    rows, _, tables, totals = pages(lengths, 1, rank + rope, torch.float32)
    pools = in_int8(rows, (rank, rope))
    q = noise(len(lengths), heads, rank + rope)
    made = triton_mla.latent_decode(q, pools, tables, totals, rank, 0.2, 2)
    for b, length in enumerate(lengths):
        held = Quantised(*(past_of(pool, tables, b, length)[0] for pool in pools), (rank, rope))
        near(made[b], attend_latents(q[b : b + 1], held, rank, 0.2)[0], 2)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("causal", (False, True))
def test_segments_of_any_length(dtype, causal):
    """Pictures end to end, q, k and v being views of one product; against each by itself."""
    lengths, heads, width = (5, 70, 1), 2, 20
    q, k, v = noise(sum(lengths), 3 * heads, width, dtype=dtype).split(heads, 1)
    made = triton_varlen.varlen(q, k, v, triton_varlen.tiles(lengths, q.device), causal, 0.3)
    for part, *sides in zip(made.split(lengths), *(x.split(lengths) for x in (q, k, v)), strict=True):
        q1, k1, v1 = (side.transpose(0, 1).float() for side in sides)
        near(part, F.scaled_dot_product_attention(q1, k1, v1, is_causal=causal, scale=0.3).transpose(0, 1).to(dtype), 2)


def packed(rows: int, columns: int, group: int, bits: int, zeros: bool) -> Packed:
    random = torch.Generator().manual_seed(2)
    values = torch.randint(0, 256, (rows, columns * bits // 8), generator=random, dtype=torch.uint8)
    scales = (torch.rand(rows, columns // group, generator=random) + 0.1).half()
    zero = torch.randint(0, 1 << bits, scales.shape, generator=random, dtype=torch.uint8) if zeros else None
    return Packed(values, scales, columns, bits, group, zero).to(DEVICE)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("columns", "group", "bits", "zeros"),
    ((96, 32, 4, True), (192, 64, 4, False), (256, 128, 4, True), (384, 384, 8, False), (1152, 128, 8, True)),
)
def test_packed_products(dtype, columns, group, bits, zeros):
    p = packed(21, columns, group, bits, zeros)
    bias = noise(21, dtype=dtype, seed=4)
    assert torch.equal(triton_packed.widen(p.values, p.scales, p.zeros, columns, bits, torch.float32), p.widen())
    for tokens in (1, 5, 19):
        x = noise(tokens, columns, dtype=dtype)
        exact = F.linear(x.float(), p.widen()).to(dtype) + bias
        near(triton_packed.packed_linear(x, p.values, p.scales, p.zeros, columns, bits, bias), exact, 2)


def test_many_tokens_widen_the_matrix_once():
    p = packed(21, 96, 32, 4, True)
    x = noise(triton_packed.MOST + 1, 96)
    near(triton_packed.packed_linear(x, p.values, p.scales, p.zeros, 96, 4), F.linear(x, p.widen()), 2)


def sorted_by_expert(tokens: int, experts: int, top: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, shares, order and counts, see ``grouped_experts``."""
    random = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(experts, generator=random)[:top] for _ in range(tokens)]).to(DEVICE)
    order = chosen.flatten().argsort(stable=True)
    shares = torch.rand(tokens, top, generator=random).to(DEVICE).flatten()[order].to(dtype)
    return order // top, shares, order, torch.bincount(chosen.flatten(), minlength=experts)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("tokens", "experts", "top"), ((1, 5, 3), (9, 5, 2), (70, 1, 1)))
def test_experts(dtype, tokens, experts, top):
    module = Experts(experts, 40, 24).to(DEVICE, dtype)
    module.gate_up.copy_(noise(experts, 48, 40, seed=6) / 6)
    module.down.copy_(noise(experts, 40, 24, seed=7) / 5)
    x = noise(tokens, 40, dtype=dtype)
    rows, shares, order, counts = sorted_by_expert(tokens, experts, top, dtype)
    made = triton_moe.grouped_experts(x, module.gate_up, module.down, rows, shares, order, counts)
    near(made, module._one_by_one(x, rows, shares[:, None], counts.tolist()), 2)


@pytest.mark.parametrize(
    ("tokens", "experts", "top", "bits", "group", "zeros", "dtype"),
    ((1, 3, 2, 4, 32, True, TYPES[1]), (5, 3, 2, 8, 64, False, TYPES[0]), (70, 1, 1, 4, 32, False, TYPES[1])),
)
def test_packed_experts(tokens, experts, top, bits, group, zeros, dtype):
    """Against the same matrices widened, by the modules' own code."""
    width, inner = (96, 32) if bits == 4 else (128, 64)
    forms = [packed(experts * 2 * inner, width, group, bits, zeros), packed(experts * width, inner, group, bits, zeros)]
    forms = [replace(form, scales=form.scales * 0.02) for form in forms]
    module = Experts(experts, width, inner).to(DEVICE, dtype)
    for parameter, form in zip((module.gate_up, module.down), forms, strict=True):
        parameter.data = form.widen().view(parameter.shape)
    x = noise(tokens, width, dtype=dtype)
    rows, shares, order, counts = sorted_by_expert(tokens, experts, top, dtype)
    made = triton_moe_packed.grouped_packed_experts(x, *forms, rows, shares, order, counts)
    near(made, module._one_by_one(x.float(), rows, shares[:, None].float(), counts.tolist()).to(dtype), 2)
