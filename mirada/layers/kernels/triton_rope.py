"""The heads of new tokens, normalised, turned, and written to their places in pages, in one pass.

T tokens, H query and K key-value heads, d head width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mirada.layers.kernels.triton_launch import launch, power


@triton.jit
def _rope_write(
    qkv, cos, sin, q_weight, k_weight, rows, q_out, keys, values, eps, stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    live = at < WIDTH
    row = tl.load(rows + token)
    kept = at < tl.where(row < 0, 0, WIDTH)
    source = qkv + token * stride + head * WIDTH
    x = tl.load(source + at, mask=live, other=0.0)
    if head >= HEADS + KV_HEADS:
        to = values + (row * KV_HEADS + head - HEADS - KV_HEADS) * WIDTH
        tl.store(to + at, x.to(values.dtype.element_ty), mask=kept)
    else:
        # Channel i turns with channel i + d/2, which is read beside it.
        other_at = tl.where(at < WIDTH // 2, at + WIDTH // 2, at - WIDTH // 2)
        other = tl.load(source + other_at, mask=live, other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            scale = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
            weight = q_weight if head < HEADS else k_weight
            mine = tl.load(weight + at, mask=live, other=0.0).to(tl.float32)
            theirs = tl.load(weight + other_at, mask=live, other=0.0).to(tl.float32)
            x = ((wide * scale).to(x.dtype).to(tl.float32) * mine).to(x.dtype)
            other = ((other.to(tl.float32) * scale).to(x.dtype).to(tl.float32) * theirs).to(x.dtype)
        turned = x.to(tl.float32) * tl.load(cos + token * WIDTH + at, mask=live, other=0.0)
        turned += other.to(tl.float32) * tl.load(sin + token * WIDTH + at, mask=live, other=0.0)
        turned = turned.to(x.dtype)
        if head < HEADS:
            tl.store(q_out + (token * HEADS + head) * WIDTH + at, turned, mask=live)
        else:
            to = keys + (row * KV_HEADS + head - HEADS) * WIDTH
            tl.store(to + at, turned.to(keys.dtype.element_ty), mask=kept)


def rope_write(
    qkv: Tensor,
    heads: int,
    turn: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor, float] | None,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """qkv [T, (H + 2 K) d] -> turned queries [T, H, d]; turned keys and values go to places ``rows`` (int64 [T], negative:
    nowhere) of ``keys`` and ``values`` [pages, page, K, d].

    ``norms``: weights [d] of the heads of q and of k, and eps; None: they are not normalised.
    """
    kv_heads, width = keys.shape[-2:]
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    out = qkv.new_empty(len(qkv), heads, width)
    q_weight, k_weight, eps = norms or (qkv, qkv, 0.0)
    cos, sin = turn
    launch(
        _rope_write, (len(qkv), heads + 2 * kv_heads), qkv, cos, sin, q_weight, k_weight, rows, out, keys, values, eps,
        qkv.stride(0), HEADS=heads, KV_HEADS=kv_heads, WIDTH=width, BLOCK=power(width), NORM=norms is not None, num_warps=1,
    )  # fmt: skip
    return out


@triton.jit
def _write(new, rows, pool, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + token)
    kept = at < tl.where(row < 0, 0, WIDTH)
    value = tl.load(new + token * WIDTH + at, mask=kept, other=0)
    tl.store(pool + row * WIDTH + at, value.to(pool.dtype.element_ty), mask=kept)


def write(pool: Tensor, rows: Tensor, new: Tensor) -> None:
    """new [T, heads, width] to places ``rows`` (int64 [T], negative: nowhere) of ``pool`` [pages, page, heads, width]."""
    width = new.shape[1] * new.shape[2]
    block = min(1024, power(width))
    grid = (len(new), triton.cdiv(width, block))
    launch(_write, grid, new, rows, pool, WIDTH=width, BLOCK=block, num_warps=min(4, max(1, block // 256)))
