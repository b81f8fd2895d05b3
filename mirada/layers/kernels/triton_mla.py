"""Latent attention of one new token per sequence over pages of latents: one key of W = c + r values for all heads.

B sequences, H heads, c latent and r rotary channels, M pages of a block table's row.
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
def _decode(
    q, rows, tables, lengths, out, sums, scale, table_stride,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_H: tl.constexpr, RANK_P: tl.constexpr,
    ROPE_P: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
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
        at = ((page * PAGE + token % PAGE) * WIDTH)[:, None]
        latent = tl.load(rows + at + c[None, :], mask=there[:, None] & (c < RANK)[None, :], other=0.0)
        rope = tl.load(rows + at + RANK + r[None, :], mask=there[:, None] & (r < ROPE)[None, :], other=0.0)
        scores = product(latent_q, tl.trans(latent))
        scores = (scores + product(rope_q, tl.trans(rope))) * scale
        scores = tl.where(there[None, :], scores, float("-inf"))
        most = tl.maximum(best, tl.max(scores, 1))
        shares = tl.exp2(scores - most[:, None])
        fade = tl.exp2(best - most)
        total = total * fade + tl.sum(shares, 1)
        acc = acc * fade[:, None] + product(shares.to(latent.dtype), latent)
        best = most
    some = total > 0.0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    to = (b * SPLITS + split) * HEADS + head
    tl.store(out + to[:, None] * RANK + c[None, :], acc.to(out.dtype.element_ty), mask=held[:, None] & (c < RANK)[None, :])
    if SPLITS > 1:
        tl.store(sums + to, tl.where(some, best + tl.log2(tl.where(some, total, 1.0)), float("-inf")), mask=held)


def latent_decode(
    q: Tensor, pages: Tensor, block_tables: Tensor, lengths: Tensor, rank: int, scale: float, splits: int | None = None
) -> Tensor:
    """Queries in the space of the latents [B, H, W], pages [pages, page, 1, W] -> [B, H, c], see ``mla.attend_latents``.

    ``block_tables``, ``lengths``, ``splits``: as of ``paged_decode``.
    """
    count, heads, width = q.shape
    page, rope = pages.shape[1], width - rank
    blocks = triton.cdiv(heads, HEADS)
    splits = splits or num_splits(count * blocks, block_tables.shape[1] * page, q)
    shape = (count, splits, heads, rank)
    parts = torch.empty(shape, dtype=q.dtype if splits == 1 else torch.float32, device=q.device)
    sums = torch.empty(shape[:3], dtype=torch.float32, device=q.device)
    launch(
        _decode, (count, blocks, splits), q.contiguous(), pages, block_tables, lengths, parts, sums, scale * LOG2E,
        block_tables.stride(0), HEADS=heads, RANK=rank, ROPE=rope, BLOCK_H=HEADS, RANK_P=power(rank, 16),
        ROPE_P=power(rope, 16), PAGE=page, BLOCK=32 if q.element_size() == 2 else 16, SPLITS=splits,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return parts[:, 0] if splits == 1 else merge(parts, sums, q.dtype)
