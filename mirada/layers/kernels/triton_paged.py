"""Attention over pages: one new token per sequence, its context split among programs; and many new tokens.

B sequences, T new tokens of all, H query and K key-value heads, G = H / K, d head width, M pages of a block table's row,
S splits of a context. The heads that share a key-value head are rows of one product, so every key is read once.
"""

# Inside kernels Triton gives operators other meanings.
# pyright: reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirada.layers.kernels.triton_launch import launch, power, processors, product

LEAST = 256
"""Tokens of a context that are worth a program of their own."""
MOST_SPLITS = 64
LOG2E = math.log2(math.e)
MERGED = 128
"""Channels of one program that merges splits."""
ROWS = 64
"""Query rows (queries times heads of a group) of one program of many tokens."""


@triton.jit
def _attend(q, k, v, k_scale, v_scale, live, best, total, acc, scale):
    """One more tile of keys and values, each token with a scale of its own: running maximum, sum of exponentials, and sum of
    values."""
    scores = product(q, tl.trans(k)) * k_scale[None, :] * scale
    scores = tl.where(live, scores, float("-inf"))
    most = tl.maximum(best, tl.max(scores, 1))
    shares = tl.exp2(scores - most[:, None])
    fade = tl.exp2(best - most)
    acc = acc * fade[:, None] + product((shares * v_scale[None, :]).to(v.dtype), v)
    return most, total * fade + tl.sum(shares, 1), acc


@triton.jit
def _decode(
    q, keys, values, key_scales, value_scales, tables, lengths, out, sums, scale, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, GROUP_P: tl.constexpr, WIDTH_P: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    b, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + b)
    each = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    begin = split * each
    end = tl.minimum(begin + each, length)
    g, d, n = tl.arange(0, GROUP_P), tl.arange(0, WIDTH_P), tl.arange(0, BLOCK)
    wide, grouped = d < WIDTH, g < GROUP
    heads = b * KV_HEADS * GROUP + head * GROUP + g
    query = tl.load(q + heads[:, None] * WIDTH + d[None, :], mask=grouped[:, None] & wide[None, :], other=0.0)
    best = tl.full([GROUP_P], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_P], tl.float32)
    acc = tl.zeros([GROUP_P, WIDTH_P], tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + n
        there = token < end
        page = tl.load(tables + b * table_stride + token // PAGE, mask=there, other=0).to(tl.int64)
        row = (page * PAGE + token % PAGE) * KV_HEADS + head
        at = row[:, None] * WIDTH + d[None, :]
        k = tl.load(keys + at, mask=there[:, None] & wide[None, :], other=0)
        v = tl.load(values + at, mask=there[:, None] & wide[None, :], other=0)
        scores = product(query, tl.trans(k.to(query.dtype))) * scale
        if INT8:
            scores = scores * tl.load(key_scales + row, mask=there, other=0.0).to(tl.float32)[None, :]
        scores = tl.where(there[None, :], scores, float("-inf"))
        most = tl.maximum(best, tl.max(scores, 1))
        shares = tl.exp2(scores - most[:, None])
        fade = tl.exp2(best - most)
        total = total * fade + tl.sum(shares, 1)
        if INT8:
            shares = shares * tl.load(value_scales + row, mask=there, other=0.0).to(tl.float32)[None, :]
        acc = acc * fade[:, None] + product(shares.to(query.dtype), v.to(query.dtype))
        best = most
    some = total > 0.0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    to = (b * SPLITS + split) * KV_HEADS * GROUP + head * GROUP + g
    tl.store(out + to[:, None] * WIDTH + d[None, :], acc.to(out.dtype.element_ty), mask=grouped[:, None] & wide[None, :])
    if SPLITS > 1:
        tl.store(sums + to, tl.where(some, best + tl.log2(tl.where(some, total, 1.0)), float("-inf")), mask=grouped)


@triton.jit
def _merge(parts, sums, out, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """Splits of one head, merged by the logarithms of their sums."""
    b, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, d = tl.arange(0, SPLITS), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    at = (b * SPLITS + s) * HEADS + head
    logs = tl.load(sums + at)
    most = tl.max(logs, 0)
    shares = tl.where(logs > float("-inf"), tl.exp2(logs - tl.where(most > float("-inf"), most, 0.0)), 0.0)
    whole = tl.sum(shares, 0)
    shares = shares / tl.where(whole > 0.0, whole, 1.0)
    part = tl.load(parts + at[:, None] * WIDTH + d[None, :], mask=(d < WIDTH)[None, :], other=0.0)
    made = tl.sum(part * shares[:, None], 0)
    tl.store(out + (b * HEADS + head) * WIDTH + d, made.to(out.dtype.element_ty), mask=d < WIDTH)


def num_splits(programs: int, capacity: int, of: Tensor) -> int:
    """Programs that share a context of at most ``capacity`` tokens where there are ``programs`` without it: a power of two."""
    wanted = min(2 * processors(of) // max(1, programs), capacity // LEAST, MOST_SPLITS)
    return 1 << max(0, wanted.bit_length() - 1)


def merge(parts: Tensor, sums: Tensor, dtype: torch.dtype) -> Tensor:
    """parts [B, S, H, d] and logarithms (of base 2) of their sums [B, S, H], float32 -> [B, H, d]."""
    count, splits, heads, width = parts.shape
    out = torch.empty(count, heads, width, dtype=dtype, device=parts.device)
    grid, block = (count, heads, triton.cdiv(width, MERGED)), min(MERGED, power(width))
    launch(_merge, grid, parts, sums, out, HEADS=heads, WIDTH=width, BLOCK=block, SPLITS=splits, num_warps=4)
    return out


def paged_decode(
    q: Tensor,
    pools: tuple[Tensor, ...],
    block_tables: Tensor,
    lengths: Tensor,
    scale: float,
    splits: int | None = None,
) -> Tensor:
    """One new token of each sequence, already in its page: q [B, H, d] -> [B, H, d].

    ``pools``: keys and values [pages, page, K, d], or as int8 each with scales [pages, page, K, 1]. ``block_tables`` int32
    [B, M]; ``lengths`` int32 [B], tokens in the cache (0: a row without a sequence, which gives zeros). ``splits``: a power
    of two; None: by the sizes that the host knows, so that a CUDA graph holds for any lengths.
    """
    int8 = len(pools) == 4
    keys, values = (pools[0], pools[2]) if int8 else pools
    scales = (pools[1], pools[3]) if int8 else (lengths, lengths)
    count, heads, width = q.shape
    page, kv_heads = keys.shape[1:3]
    group = heads // kv_heads
    splits = splits or num_splits(count * kv_heads, block_tables.shape[1] * page, q)
    shape = (count, splits, heads, width)
    parts = torch.empty(shape, dtype=q.dtype if splits == 1 else torch.float32, device=q.device)
    sums = torch.empty(shape[:3], dtype=torch.float32, device=q.device)
    launch(
        _decode, (count, kv_heads, splits), q.contiguous(), keys, values, *scales, block_tables, lengths, parts, sums,
        scale * LOG2E, block_tables.stride(0), KV_HEADS=kv_heads, GROUP=group, WIDTH=width, GROUP_P=power(group, 16),
        WIDTH_P=power(width, 16), PAGE=page, BLOCK=64 if q.element_size() == 2 else 16, SPLITS=splits, INT8=int8,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return parts[:, 0] if splits == 1 else merge(parts, sums, q.dtype)


@triton.jit
def _prefill(
    q, keys, values, key_scales, value_scales, tables, lengths, counts, starts, tile_of, tile_from, out, scale, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    b = tl.load(tile_of + tile).to(tl.int64)
    first = tl.load(tile_from + tile)
    count = tl.load(counts + b)
    past = tl.load(lengths + b) - count
    start = tl.load(starts + b).to(tl.int64)
    r, d, n = tl.arange(0, ROWS), tl.arange(0, WIDTH_P), tl.arange(0, BLOCK)
    QUERIES: tl.constexpr = ROWS // GROUP
    query = first + r // GROUP
    held = (query < count) & (r < QUERIES * GROUP)
    wide = d < WIDTH
    at = ((start + query) * KV_HEADS * GROUP + head * GROUP + r % GROUP)[:, None] * WIDTH + d[None, :]
    x = tl.load(q + at, mask=held[:, None] & wide[None, :], other=0.0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH_P], tl.float32)
    end = past + tl.minimum(first + QUERIES, count)
    for begin in range(0, end, BLOCK):
        token = begin + n
        there = token < end
        page = tl.load(tables + b * table_stride + token // PAGE, mask=there, other=0).to(tl.int64)
        row = (page * PAGE + token % PAGE) * KV_HEADS + head
        place = row[:, None] * WIDTH + d[None, :]
        k = tl.load(keys + place, mask=there[:, None] & wide[None, :], other=0)
        v = tl.load(values + place, mask=there[:, None] & wide[None, :], other=0)
        # Every row sees token 0, so no maximum stays infinite: rows beyond the last query are as if they were it.
        live = token[None, :] <= past + tl.minimum(query, count - 1)[:, None]
        k_scale, v_scale = tl.full([BLOCK], 1.0, tl.float32), tl.full([BLOCK], 1.0, tl.float32)
        if INT8:
            k_scale = tl.load(key_scales + row, mask=there, other=0.0).to(tl.float32)
            v_scale = tl.load(value_scales + row, mask=there, other=0.0).to(tl.float32)
        best, total, acc = _attend(x, k.to(x.dtype), v.to(x.dtype), k_scale, v_scale, live, best, total, acc, scale)
    acc = acc / total[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=held[:, None] & wide[None, :])


def tiles(counts: tuple[int, ...], step: int, device: torch.device) -> tuple[Tensor, ...]:
    """For programs of ``step`` queries: of each its sequence and first query; of each sequence its new tokens and first row."""
    pairs = [(b, at) for b, count in enumerate(counts) for at in range(0, count, step)]
    starts = [sum(counts[:b]) for b in range(len(counts))]
    of, begin = zip(*pairs, strict=True)
    return tuple(torch.tensor(x, dtype=torch.int32, device=device) for x in (of, begin, counts, starts))


def queries(heads: int, kv_heads: int) -> int:
    """Queries of one program of ``paged_prefill``."""
    return ROWS // (heads // kv_heads)


def paged_prefill(
    q: Tensor,
    pools: tuple[Tensor, ...],
    block_tables: Tensor,
    lengths: Tensor,
    places: tuple[Tensor, ...],
    scale: float,
) -> Tensor:
    """The last tokens of each sequence, already in their pages, causally: q [T, H, d] -> [T, H, d].

    ``pools``: as of ``paged_decode``. ``lengths``: past and new tokens; ``places``: of ``tiles``, for ``queries``.
    """
    int8 = len(pools) == 4
    keys, values = (pools[0], pools[2]) if int8 else pools
    scales = (pools[1], pools[3]) if int8 else (lengths, lengths)
    tile_of, tile_from, counts, starts = places
    heads, width = q.shape[1:]
    page, kv_heads = keys.shape[1:3]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    launch(
        _prefill, (len(tile_of), kv_heads), q.contiguous(), keys, values, *scales, block_tables, lengths, counts, starts,
        tile_of, tile_from, out, scale * LOG2E, block_tables.stride(0), KV_HEADS=kv_heads, GROUP=heads // kv_heads,
        WIDTH=width, WIDTH_P=power(width, 16), PAGE=page, ROWS=ROWS, BLOCK=64 if q.element_size() == 2 else 32, INT8=int8,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
