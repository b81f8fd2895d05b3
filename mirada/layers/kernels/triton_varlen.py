"""Attention inside segments that lie end to end, each of its own length: pictures of a vision tower, without padding.

T tokens of all segments, H heads, d head width.
"""

# Inside kernels Triton gives operators other meanings.
# pyright: reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirada.layers.kernels.triton_launch import launch, power
from mirada.layers.kernels.triton_paged import LOG2E, _attend

ROWS = 64
"""Queries of one program."""


@triton.jit
def _varlen(
    q, k, v, tiles, out, scale, programs, q_token, q_head, k_token, k_head, v_token, v_head,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    first, begin, end = tl.load(tiles + tile), tl.load(tiles + programs + tile), tl.load(tiles + 2 * programs + tile)
    r, d, n = tl.arange(0, ROWS), tl.arange(0, WIDTH_P), tl.arange(0, BLOCK)
    query = first + r
    held, wide = query < end, d < WIDTH
    place = query.to(tl.int64)[:, None]
    x = tl.load(q + place * q_token + head * q_head + d[None, :], mask=held[:, None] & wide[None, :], other=0.0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH_P], tl.float32)
    ones = tl.full([BLOCK], 1.0, tl.float32)
    last = end
    if CAUSAL:
        last = tl.minimum(first + ROWS, end)
    for start in range(begin, last, BLOCK):
        token = start + n
        there = token < end
        at, mask = token.to(tl.int64)[:, None], there[:, None] & wide[None, :]
        keys = tl.load(k + at * k_token + head * k_head + d[None, :], mask=mask, other=0.0)
        values = tl.load(v + at * v_token + head * v_head + d[None, :], mask=mask, other=0.0)
        live = there[None, :] & (r >= 0)[:, None]
        if CAUSAL:  # every row sees the first token, so no maximum stays infinite
            live = live & (token[None, :] <= tl.minimum(query, end - 1)[:, None])
        best, total, acc = _attend(x, keys, values, ones, ones, live, best, total, acc, scale)
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    to = (place * HEADS + head) * WIDTH + d[None, :]
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=held[:, None] & wide[None, :])


def tiles(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [3, programs]: of each program its first query, and where its segment begins and ends."""
    made, begin = [], 0
    for length in lengths:
        made += [(first, begin, begin + length) for first in range(begin, begin + length, ROWS)]
        begin += length
    return torch.tensor(made, dtype=torch.int32).T.contiguous().to(device)


def varlen(q: Tensor, k: Tensor, v: Tensor, places: Tensor, causal: bool, scale: float) -> Tensor:
    """softmax(q kᵀ · scale) v inside each segment: q, k and v [T, H, d], any number apart but for the last dimension -> [T, H,
    d]. ``places``: of ``tiles``; what is in no segment stays as it happens to be."""
    heads, width = q.shape[1:]
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(
        _varlen, (places.shape[1], heads), q, k, v, places, out, scale * LOG2E, places.shape[1], *q.stride()[:2],
        *k.stride()[:2], *v.stride()[:2], HEADS=heads, WIDTH=width, WIDTH_P=power(width, 16), ROWS=ROWS,
        BLOCK=64 if q.element_size() == 2 else 32, CAUSAL=causal, num_warps=4 if q.element_size() == 2 else 8, num_stages=2,
    )  # fmt: skip
    return out
