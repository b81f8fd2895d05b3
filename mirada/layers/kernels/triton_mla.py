"""Latent attention of new tokens over pages of latents: one key of W = c + r values for all heads.

B sequences, T new tokens of all, H heads, c latent and r rotary channels, M pages of a block table's row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirada.layers.kernels.triton_launch import launch, power, product
from mirada.layers.kernels.triton_paged import LOG2E, merge, num_splits

HEADS = 16
"""Heads of one program: the least rows of a product."""


@triton.jit
def _scores(
    latent_q, rope_q, rows, scales, place, there, c, r,
    RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Products of queries with the rows at ``place`` [BLOCK], and of these the latents (in the type of the queries) with their
    scales."""
    at = (place * (RANK + ROPE))[:, None]
    latent = tl.load(rows + at + c[None, :], mask=there[:, None] & (c < RANK)[None, :], other=0).to(latent_q.dtype)
    rope = tl.load(rows + at + RANK + r[None, :], mask=there[:, None] & (r < ROPE)[None, :], other=0).to(rope_q.dtype)
    latent_scale = tl.full([BLOCK], 1.0, tl.float32)
    scores, turned = product(latent_q, tl.trans(latent)), product(rope_q, tl.trans(rope))
    if INT8:
        latent_scale = tl.load(scales + place * 2, mask=there, other=0.0).to(tl.float32)
        rope_scale = tl.load(scales + place * 2 + 1, mask=there, other=0.0).to(tl.float32)
        scores, turned = scores * latent_scale[None, :], turned * rope_scale[None, :]
    return scores + turned, latent, latent_scale


@triton.jit
def _decode(
    q, rows, scales, tables, lengths, out, sums, scale, table_stride,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_H: tl.constexpr, RANK_P: tl.constexpr,
    ROPE_P: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    held = head < HEADS
    c, r, n = tl.arange(0, RANK_P), tl.arange(0, ROPE_P), tl.arange(0, BLOCK)
    length = tl.load(lengths + b)
    each = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    begin = split * each
    end = tl.minimum(begin + each, length)
    WIDTH: tl.constexpr = RANK + ROPE
    query = (b * HEADS + head)[:, None] * WIDTH
    latent_q = tl.load(q + query + c[None, :], mask=held[:, None] & (c < RANK)[None, :], other=0.0)
    rope_q = tl.load(q + query + RANK + r[None, :], mask=held[:, None] & (r < ROPE)[None, :], other=0.0)
    best = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, RANK_P], tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + n
        there = token < end
        page = tl.load(tables + b * table_stride + token // PAGE, mask=there, other=0).to(tl.int64)
        place = page * PAGE + token % PAGE
        scores, latent, latent_scale = _scores(latent_q, rope_q, rows, scales, place, there, c, r, RANK, ROPE, BLOCK, INT8)
        scores = tl.where(there[None, :], scores * scale, float("-inf"))
        most = tl.maximum(best, tl.max(scores, 1))
        shares = tl.exp2(scores - most[:, None])
        fade = tl.exp2(best - most)
        total = total * fade + tl.sum(shares, 1)
        acc = acc * fade[:, None] + product((shares * latent_scale[None, :]).to(latent.dtype), latent)
        best = most
    some = total > 0.0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    to = (b * SPLITS + split) * HEADS + head
    tl.store(out + to[:, None] * RANK + c[None, :], acc.to(out.dtype.element_ty), mask=held[:, None] & (c < RANK)[None, :])
    if SPLITS > 1:
        tl.store(sums + to, tl.where(some, best + tl.log2(tl.where(some, total, 1.0)), float("-inf")), mask=held)


def latent_decode(
    q: Tensor,
    pools: tuple[Tensor, ...],
    block_tables: Tensor,
    lengths: Tensor,
    rank: int,
    scale: float,
    splits: int | None = None,
) -> Tensor:
    """One new token of each sequence: queries in the space of the latents [B, H, W] -> [B, H, c], see ``mla.attend_latents``.

    ``pools``: pages [pages, page, 1, W], or as int8 with scales [pages, page, 1, 2], of latent and rotary key.
    ``block_tables``, ``lengths``, ``splits``: as of ``paged_decode``.
    """
    pages, int8 = pools[0], len(pools) == 2
    count, heads, width = q.shape
    page, rope = pages.shape[1], width - rank
    blocks = triton.cdiv(heads, HEADS)
    splits = splits or num_splits(count * blocks, block_tables.shape[1] * page, q)
    shape = (count, splits, heads, rank)
    parts = torch.empty(shape, dtype=q.dtype if splits == 1 else torch.float32, device=q.device)
    sums = torch.empty(shape[:3], dtype=torch.float32, device=q.device)
    launch(
        _decode, (count, blocks, splits), q.contiguous(), pages, pools[1] if int8 else lengths, block_tables, lengths, parts,
        sums, scale * LOG2E, block_tables.stride(0), HEADS=heads, RANK=rank, ROPE=rope, BLOCK_H=HEADS,
        RANK_P=power(rank, 16), ROPE_P=power(rope, 16), PAGE=page, BLOCK=32 if q.element_size() == 2 else 16, SPLITS=splits,
        INT8=int8, num_warps=8 if int8 else 4, num_stages=2,
    )  # fmt: skip
    return parts[:, 0] if splits == 1 else merge(parts, sums, q.dtype)


@triton.jit
def _latent_prefill(
    q, rows, scales, tables, lengths, counts, starts, tile_of, tile_from, out, scale, table_stride,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_H: tl.constexpr, QUERIES: tl.constexpr,
    RANK_P: tl.constexpr, ROPE_P: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    b = tl.load(tile_of + tile).to(tl.int64)
    first, count, start = tl.load(tile_from + tile), tl.load(counts + b), tl.load(starts + b).to(tl.int64)
    past = tl.load(lengths + b) - count
    i = tl.arange(0, QUERIES * BLOCK_H)
    query, head = first + i // BLOCK_H, tl.program_id(1) * BLOCK_H + i % BLOCK_H
    held = (query < count) & (head < HEADS)
    c, r, n = tl.arange(0, RANK_P), tl.arange(0, ROPE_P), tl.arange(0, BLOCK)
    row = (start + query) * HEADS + head
    at = (row * (RANK + ROPE))[:, None]
    latent_q = tl.load(q + at + c[None, :], mask=held[:, None] & (c < RANK)[None, :], other=0.0)
    rope_q = tl.load(q + at + RANK + r[None, :], mask=held[:, None] & (r < ROPE)[None, :], other=0.0)
    best = tl.full([QUERIES * BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES * BLOCK_H], tl.float32)
    acc = tl.zeros([QUERIES * BLOCK_H, RANK_P], tl.float32)
    end = past + tl.minimum(first + QUERIES, count)
    for begin in range(0, end, BLOCK):
        token = begin + n
        there = token < end
        page = tl.load(tables + b * table_stride + token // PAGE, mask=there, other=0).to(tl.int64)
        place = page * PAGE + token % PAGE
        scores, latent, latent_scale = _scores(latent_q, rope_q, rows, scales, place, there, c, r, RANK, ROPE, BLOCK, INT8)
        # Every row sees token 0, so no maximum stays infinite: rows beyond the last query are as if they were it.
        live = token[None, :] <= past + tl.minimum(query, count - 1)[:, None]
        scores = tl.where(live, scores * scale, float("-inf"))
        most = tl.maximum(best, tl.max(scores, 1))
        shares = tl.exp2(scores - most[:, None])
        fade = tl.exp2(best - most)
        total = total * fade + tl.sum(shares, 1)
        acc = acc * fade[:, None] + product((shares * latent_scale[None, :]).to(latent.dtype), latent)
        best = most
    acc = acc / total[:, None]
    tl.store(out + row[:, None] * RANK + c[None, :], acc.to(out.dtype.element_ty), mask=held[:, None] & (c < RANK)[None, :])


QUERIES = 2
"""Queries of one program of many tokens: with HEADS heads each, as many rows of 512 sums as registers take."""


def latent_prefill(
    q: Tensor,
    pools: tuple[Tensor, ...],
    block_tables: Tensor,
    lengths: Tensor,
    places: tuple[Tensor, ...],
    rank: int,
    scale: float,
) -> Tensor:
    """The last tokens of each sequence, already in their pages, causally: [T, H, W] -> [T, H, c].

    ``pools``: as of ``latent_decode``; ``places``: of ``triton_paged.tiles``, for ``QUERIES``.
    """
    tile_of, tile_from, counts, starts = places
    pages, int8 = pools[0], len(pools) == 2
    tokens, heads, width = q.shape
    out = q.new_empty(tokens, heads, rank)
    launch(
        _latent_prefill, (len(tile_of), triton.cdiv(heads, HEADS)), q.contiguous(), pages, pools[1] if int8 else lengths,
        block_tables, lengths, counts, starts, tile_of, tile_from, out, scale * LOG2E, block_tables.stride(0), HEADS=heads,
        RANK=rank, ROPE=width - rank, BLOCK_H=HEADS, QUERIES=QUERIES, RANK_P=power(rank, 16),
        ROPE_P=power(width - rank, 16), PAGE=pages.shape[1], BLOCK=32 if q.element_size() == 2 else 16, INT8=int8,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return out
