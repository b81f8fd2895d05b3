"""Products of many experts at once, tokens sorted by expert; which tile is whose is found on the device.

T tokens, k experts per token, N = T k, E experts, D width, I inner width of an expert.
"""

# Inside kernels Triton gives operators other meanings.
# pyright: reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mirada.layers.kernels.triton_launch import launch, power, product


@triton.jit
def _place(counts, EXPERTS: tl.constexpr, EXPERTS_P: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of this program: its expert (EXPERTS: none is left), its first row, and the row behind the expert's last."""
    e = tl.arange(0, EXPERTS_P)
    count = tl.load(counts + e, mask=e < EXPERTS, other=0).to(tl.int32)
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    ends, last = tl.cumsum(tiles, 0), tl.cumsum(count, 0)
    tile = tl.program_id(0)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    mine = e == expert
    end = tl.sum(tl.where(mine, last, 0), 0)
    first = end - tl.sum(tl.where(mine, count, 0), 0)
    first += (tile - tl.sum(tl.where(mine, ends - tiles, 0), 0)) * BLOCK_M
    return tl.where(expert < EXPERTS, expert, EXPERTS), first, end


@triton.jit
def _gate_up(
    x, tokens, weight, counts, out,
    EXPERTS: tl.constexpr, EXPERTS_P: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert, first, end = _place(counts, EXPERTS, EXPERTS_P, BLOCK_M)
    if expert < EXPERTS:
        row = first + tl.arange(0, BLOCK_M)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        live, wide = row < end, n < INNER
        token = tl.load(tokens + row, mask=live, other=0).to(tl.int64)
        at = weight + expert.to(tl.int64) * 2 * INNER * WIDTH + n.to(tl.int64)[None, :] * WIDTH
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, WIDTH, BLOCK_K):
            some = (start + k) < WIDTH
            a = tl.load(x + token[:, None] * WIDTH + (start + k)[None, :], mask=live[:, None] & some[None, :], other=0.0)
            mask = some[:, None] & wide[None, :]
            g = tl.load(at + (start + k)[:, None], mask=mask, other=0.0)
            u = tl.load(at + INNER * WIDTH + (start + k)[:, None], mask=mask, other=0.0)
            gate += product(a, g)
            up += product(a, u)
        kind = x.dtype.element_ty
        gate = gate.to(kind).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
        made = silu * up.to(kind).to(tl.float32)
        to = row.to(tl.int64)[:, None] * INNER + n[None, :]
        tl.store(out + to, made.to(kind), mask=live[:, None] & wide[None, :])


@triton.jit
def _down(
    x, shares, places, weight, counts, out,
    EXPERTS: tl.constexpr, EXPERTS_P: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert, first, end = _place(counts, EXPERTS, EXPERTS_P, BLOCK_M)
    if expert < EXPERTS:
        row = first + tl.arange(0, BLOCK_M)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        live, wide = row < end, n < WIDTH
        at = weight + expert.to(tl.int64) * WIDTH * INNER + n.to(tl.int64)[None, :] * INNER
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, INNER, BLOCK_K):
            some = (start + k) < INNER
            source = x + row.to(tl.int64)[:, None] * INNER + (start + k)[None, :]
            a = tl.load(source, mask=live[:, None] & some[None, :], other=0.0)
            b = tl.load(at + (start + k)[:, None], mask=some[:, None] & wide[None, :], other=0.0)
            acc += product(a, b)
        kind = x.dtype.element_ty
        share = tl.load(shares + row, mask=live, other=0.0).to(tl.float32)
        made = acc.to(kind).to(tl.float32) * share[:, None]
        # Rows go back to the order of the tokens, so that the sum over a token's experts has a fixed order.
        to = tl.load(places + row, mask=live, other=0).to(tl.int64)[:, None] * WIDTH + n[None, :]
        tl.store(out + to, made.to(kind), mask=live[:, None] & wide[None, :])


def grouped_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, tokens: Tensor, shares: Tensor, order: Tensor, counts: Tensor
) -> Tensor:
    """Sum over a token's experts of share times expert: x [T, D] -> [T, D]; see ``layers.moe.Experts``.

    ``gate_up`` [E, 2 I, D], ``down`` [E, D, I]; sorted by expert, ``tokens`` [N] and ``shares`` [N] in x's type, and
    ``order`` [N], the place of each in [T, k]; ``counts`` [E], rows of each expert.
    """
    total, experts = len(tokens), len(down)
    width, inner = x.shape[1], down.shape[2]
    block_m = 16 if total <= 32 * experts else 64
    # No word to the host: as many programs as there can be tiles, and those beyond the last find no expert.
    most = min(total, triton.cdiv(total, block_m) + experts)
    sizes = {"EXPERTS": experts, "EXPERTS_P": power(experts), "WIDTH": width, "INNER": inner, "BLOCK_M": block_m}
    middle, out = x.new_empty(total, inner), x.new_empty(total, width)
    block_n = 32 if block_m == 16 else 64
    block_k = 128 if block_m == 16 else 64
    block_k = min(block_k, power(min(width, inner), 16)) // (x.element_size() // 2)
    tuned = {"BLOCK_N": block_n, "BLOCK_K": max(16, block_k), "num_warps": 4, "num_stages": 3}
    launch(_gate_up, (most, triton.cdiv(inner, block_n)), x.contiguous(), tokens, gate_up, counts, middle, **sizes, **tuned)
    launch(_down, (most, triton.cdiv(width, block_n)), middle, shares, order, down, counts, out, **sizes, **tuned)
    return out.view(len(x), -1, width).sum(1)
