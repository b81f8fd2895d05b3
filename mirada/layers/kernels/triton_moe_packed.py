"""Products of many experts at once with packed integers as they lie: ``triton_moe`` with the matrices of ``triton_packed``.

T tokens, k experts per token, N = T k, E experts, D width, I inner width of an expert, g columns that share a scale.
"""

# Inside kernels Triton gives operators other meanings.
# pyright: reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mirada.layers.kernels.triton_launch import launch, power, product
from mirada.layers.kernels.triton_moe import _place
from mirada.layers.kernels.triton_packed import CHUNK


@triton.jit
def _integers(
    values, scales, zeros, row, wide, start, columns,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """Columns [start, start + CHUNK) of the rows ``row``: even and odd ones (8 bits: all of them, twice), and their scale."""
    PER: tl.constexpr = 8 // BITS
    n = tl.arange(0, CHUNK // PER)
    held = tl.load(values + row[:, None] * (columns // PER) + (start // PER + n)[None, :], mask=wide[:, None], other=0)
    where = row * (columns // GROUP) + start // GROUP
    scale = tl.load(scales + where, mask=wide, other=0.0).to(tl.float32)
    if ZEROS:
        zero = tl.load(zeros + where, mask=wide, other=0).to(tl.int32)[:, None]
    else:
        zero = 1 << (BITS - 1)
    # Differences of small integers: every float type here holds them exactly.
    if BITS == 4:
        low = ((held & 15).to(tl.int32) - zero).to(tl.float32)
        high = ((held >> 4).to(tl.int32) - zero).to(tl.float32)
    else:
        low = (held.to(tl.int32) - zero).to(tl.float32)
        high = low
    return low, high, scale


@triton.jit
def _tokens(x, at, live, start, CHUNK: tl.constexpr, BITS: tl.constexpr):
    """The same columns of rows of x that begin ``at`` [M]: two [CHUNK / 2, M] (8 bits: [CHUNK, M], twice)."""
    PER: tl.constexpr = 8 // BITS
    n = start + tl.arange(0, CHUNK // PER) * PER
    even = tl.load(x + at[None, :] + n[:, None], mask=live[None, :], other=0.0)
    odd = even
    if BITS == 4:
        odd = tl.load(x + at[None, :] + (n + 1)[:, None], mask=live[None, :], other=0.0)
    return even, odd


@triton.jit
def _times(low, high, scale, even, odd, BITS: tl.constexpr):
    """float32 [rows, M]."""
    part = product(low.to(even.dtype), even)
    if BITS == 4:
        part += product(high.to(odd.dtype), odd)
    return part * scale[:, None]


@triton.jit
def _gate_up_packed(
    x, tokens, values, scales, zeros, counts, out,
    EXPERTS: tl.constexpr, EXPERTS_P: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    expert, first, end = _place(counts, EXPERTS, EXPERTS_P, BLOCK_M)
    if expert < EXPERTS:
        row = first + tl.arange(0, BLOCK_M)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        live, wide = row < end, n < INNER
        at = tl.load(tokens + row, mask=live, other=0).to(tl.int64) * WIDTH
        of = expert.to(tl.int64) * 2 * INNER + n
        gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for start in range(0, WIDTH, CHUNK):
            even, odd = _tokens(x, at, live, start, CHUNK, BITS)
            low, high, scale = _integers(values, scales, zeros, of, wide, start, WIDTH, GROUP, CHUNK, BITS, ZEROS)
            gate += _times(low, high, scale, even, odd, BITS)
            low, high, scale = _integers(values, scales, zeros, of + INNER, wide, start, WIDTH, GROUP, CHUNK, BITS, ZEROS)
            up += _times(low, high, scale, even, odd, BITS)
        kind = x.dtype.element_ty
        gate = gate.to(kind).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
        made = silu * up.to(kind).to(tl.float32)
        to = row.to(tl.int64)[None, :] * INNER + n[:, None]
        tl.store(out + to, made.to(kind), mask=live[None, :] & wide[:, None])


@triton.jit
def _down_packed(
    x, shares, places, values, scales, zeros, counts, out,
    EXPERTS: tl.constexpr, EXPERTS_P: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    expert, first, end = _place(counts, EXPERTS, EXPERTS_P, BLOCK_M)
    if expert < EXPERTS:
        row = first + tl.arange(0, BLOCK_M)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        live, wide = row < end, n < WIDTH
        of = expert.to(tl.int64) * WIDTH + n
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for start in range(0, INNER, CHUNK):
            even, odd = _tokens(x, row.to(tl.int64) * INNER, live, start, CHUNK, BITS)
            low, high, scale = _integers(values, scales, zeros, of, wide, start, INNER, GROUP, CHUNK, BITS, ZEROS)
            acc += _times(low, high, scale, even, odd, BITS)
        kind = x.dtype.element_ty
        share = tl.load(shares + row, mask=live, other=0.0).to(tl.float32)
        made = acc.to(kind).to(tl.float32) * share[None, :]
        # Rows go back to the order of the tokens, so that the sum over a token's experts has a fixed order.
        to = tl.load(places + row, mask=live, other=0).to(tl.int64)[None, :] * WIDTH + n[:, None]
        tl.store(out + to, made.to(kind), mask=live[None, :] & wide[:, None])


def grouped_packed_experts(
    x: Tensor, gate_up: Any, down: Any, tokens: Tensor, shares: Tensor, order: Tensor, counts: Tensor
) -> Tensor:
    """As ``triton_moe.grouped_experts``, of ``adapt.packed.Packed`` matrices one below another: ``gate_up`` [E 2 I, D] and
    ``down`` [E D, I], in groups that ``triton_packed.takes``."""
    total, experts, width, inner = len(tokens), len(counts), x.shape[1], down.columns
    block_m = 16 if total <= 32 * experts else 64
    # No word to the host: as many programs as there can be tiles, and those beyond the last find no expert.
    most = min(total, triton.cdiv(total, block_m) + experts)
    sizes = {"EXPERTS": experts, "EXPERTS_P": power(experts), "WIDTH": width, "INNER": inner, "BLOCK_M": block_m}
    block_n = 32 if block_m == 16 else 64
    middle, out = x.new_empty(total, inner), x.new_empty(total, width)
    tuned = {"BLOCK_N": block_n, "num_warps": 4, "num_stages": 3}
    launch(
        _gate_up_packed, (most, triton.cdiv(inner, block_n)), x.contiguous(), tokens, *_planes(gate_up), counts, middle,
        **sizes, **_form(gate_up, block_m), **tuned,
    )  # fmt: skip
    launch(
        _down_packed, (most, triton.cdiv(width, block_n)), middle, shares, order, *_planes(down), counts, out, **sizes,
        **_form(down, block_m), **tuned,
    )  # fmt: skip
    return out.view(len(x), -1, width).sum(1)


def _planes(form: Any) -> tuple[Tensor, Tensor, Tensor]:
    return form.values, form.scales, form.scales if form.zeros is None else form.zeros


def _form(form: Any, block_m: int) -> dict[str, Any]:
    group = form.columns // form.scales.shape[1]
    most = CHUNK if block_m == 16 else CHUNK // 2  # wider ones would not lie in registers
    return {"GROUP": group, "CHUNK": min(group, most), "BITS": form.bits, "ZEROS": form.zeros is not None}
