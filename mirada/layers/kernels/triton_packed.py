"""Products with packed integers in the canonical form of ``adapt.packed``, and their widening.

T tokens, R rows (outputs), C columns (inputs), g columns that share a scale. ``values`` uint8 [R, C], or [R, C/2] of four bits
with the even column in the low half; ``scales`` [R, C/g]; ``zeros`` uint8 [R, C/g] or None (the middle of the range).
"""

# Inside kernels Triton gives operators other meanings.
# pyright: reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirada.layers.kernels.triton_launch import launch, power, processors, product

MOST = 64
"""Tokens up to which the integers are multiplied as they lie; for more, widening them once costs less."""
CHUNK = 128
"""Columns of a step at most."""


@triton.jit
def _one(
    x, values, scales, zeros, bias, out, columns,
    GROUP: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr,
    BIAS: tl.constexpr, BLOCK_R: tl.constexpr, rows,
):  # fmt: skip
    """One token: CHUNKS runs of columns at a time, each with one scale, summed apart from each other till the end."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live_r = r < rows
    PER: tl.constexpr = 8 // BITS
    j, n = tl.arange(0, CHUNKS), tl.arange(0, CHUNK // PER)
    acc = tl.zeros([BLOCK_R, CHUNKS], tl.float32)
    base = r.to(tl.int64)[:, None, None] * (columns // PER)
    groups = columns // GROUP
    for start in range(0, columns, CHUNKS * CHUNK):
        first = start + j * CHUNK
        live = live_r[:, None] & (first < columns)[None, :]
        at = (first[:, None] // PER + n[None, :])[None, :, :]
        held = tl.load(values + base + at, mask=live[:, :, None], other=0)
        group = first // GROUP
        where = r.to(tl.int64)[:, None] * groups + group[None, :]
        scale = tl.load(scales + where, mask=live, other=0.0).to(tl.float32)
        if ZEROS:
            zero = tl.load(zeros + where, mask=live, other=0).to(tl.float32)
        else:
            zero = tl.full([BLOCK_R, CHUNKS], 1 << (BITS - 1), tl.float32)
        x_at = first[:, None] + n[None, :] * PER
        x_live = (first < columns)[:, None]
        if BITS == 4:
            even = tl.load(x + x_at, mask=x_live, other=0.0).to(tl.float32)
            odd = tl.load(x + x_at + 1, mask=x_live, other=0.0).to(tl.float32)
            low, high = (held & 15).to(tl.float32), (held >> 4).to(tl.float32)
            part = tl.sum(low * even[None, :, :] + high * odd[None, :, :], 2)
            whole = tl.sum(even + odd, 1)
        else:
            some = tl.load(x + x_at, mask=x_live, other=0.0).to(tl.float32)
            part = tl.sum(held.to(tl.float32) * some[None, :, :], 2)
            whole = tl.sum(some, 1)
        acc += (part - zero * whole[None, :]) * scale
    made = tl.sum(acc, 1)
    if BIAS:
        made = made.to(out.dtype.element_ty).to(tl.float32) + tl.load(bias + r, mask=live_r, other=0.0).to(tl.float32)
    tl.store(out + r, made.to(out.dtype.element_ty), mask=live_r)


@triton.jit
def _few(
    x, values, scales, zeros, bias, out, columns, tokens, rows,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    live_r, live_t = r < rows, t < tokens
    PER: tl.constexpr = 8 // BITS
    n = tl.arange(0, CHUNK // PER)
    acc = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    base = r.to(tl.int64)[:, None] * (columns // PER)
    groups = columns // GROUP
    x_base = t.to(tl.int64)[None, :] * columns
    for start in range(0, columns, CHUNK):
        held = tl.load(values + base + (start // PER + n)[None, :], mask=live_r[:, None], other=0)
        where = r.to(tl.int64) * groups + start // GROUP
        scale = tl.load(scales + where, mask=live_r, other=0.0).to(tl.float32)
        if ZEROS:
            zero = tl.load(zeros + where, mask=live_r, other=0).to(tl.int32)[:, None]
        else:
            zero = 1 << (BITS - 1)
        if BITS == 4:
            # Differences of small integers: every float type here holds them exactly.
            even = tl.load(x + x_base + (start + n * 2)[:, None], mask=live_t[None, :], other=0.0)
            odd = tl.load(x + x_base + (start + n * 2 + 1)[:, None], mask=live_t[None, :], other=0.0)
            low = ((held & 15).to(tl.int32) - zero).to(tl.float32).to(even.dtype)
            high = ((held >> 4).to(tl.int32) - zero).to(tl.float32).to(even.dtype)
            part = product(low, even)
            part += product(high, odd)
        else:
            some = tl.load(x + x_base + (start + n)[:, None], mask=live_t[None, :], other=0.0)
            part = product((held.to(tl.int32) - zero).to(tl.float32).to(some.dtype), some)
        acc += part * scale[:, None]
    if BIAS:
        acc = acc.to(out.dtype.element_ty).to(tl.float32) + tl.load(bias + r, mask=live_r, other=0.0).to(tl.float32)[:, None]
    to = t.to(tl.int64)[None, :] * rows + r[:, None]
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=live_r[:, None] & live_t[None, :])


@triton.jit
def _widen(
    values, scales, zeros, out, columns,
    GROUP: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = c < columns
    PER: tl.constexpr = 8 // BITS
    held = tl.load(values + row * (columns // PER) + c // PER, mask=live, other=0).to(tl.int32)
    if BITS == 4:
        held = (held >> ((c % 2) * 4)) & 15
    where = row * (columns // GROUP) + c // GROUP
    if ZEROS:
        zero = tl.load(zeros + where, mask=live, other=0).to(tl.int32)
    else:
        zero = 1 << (BITS - 1)
    scale = tl.load(scales + where, mask=live, other=0.0).to(tl.float32)
    made = (held - zero).to(tl.float32) * scale
    tl.store(out + row * columns + c, made.to(out.dtype.element_ty), mask=live)


def takes(columns: int, group: int) -> bool:
    """Whether these kernels read such a matrix: whole groups, of which each is a whole number of steps."""
    return group > 0 and columns % group == 0 and group % 32 == 0 and (power(group) == group or group % CHUNK == 0)


def packed_linear(
    x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, columns: int, bits: int, bias: Tensor | None = None
) -> Tensor:
    """x [T, C] -> [T, R] in x's type, ``bias`` [R] added after that rounding. The group is C over the number of scales."""
    tokens, rows, group = len(x), len(values), columns // scales.shape[1]
    if tokens > MOST:
        return torch.nn.functional.linear(x, widen(values, scales, zeros, columns, bits, x.dtype), bias)
    out = x.new_empty(tokens, rows)
    some = scales if zeros is None else zeros
    own = scales if bias is None else bias
    chunk = min(group, CHUNK)
    same = {"GROUP": group, "CHUNK": chunk, "BITS": bits, "ZEROS": zeros is not None, "BIAS": bias is not None}
    if tokens == 1:
        block, chunks = 8, max(1, 1024 // chunk)
        launch(
            _one, (triton.cdiv(rows, block),), x.contiguous(), values, scales, some, own, out, columns, rows=rows,
            CHUNKS=chunks, BLOCK_R=block, **same, num_warps=4, num_stages=3,
        )  # fmt: skip
        return out
    block, width = 64 if rows >= 128 * processors(x) else 32, 16 if tokens <= 16 else 32
    launch(
        _few, (triton.cdiv(rows, block), triton.cdiv(tokens, width)), x.contiguous(), values, scales, some, own, out, columns,
        tokens, rows, BLOCK_R=block, BLOCK_T=width, **same, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def widen(values: Tensor, scales: Tensor, zeros: Tensor | None, columns: int, bits: int, dtype: torch.dtype) -> Tensor:
    """The matrix [R, C] in ``dtype``."""
    out = torch.empty(len(values), columns, dtype=dtype, device=values.device)
    block = min(1024, power(columns))
    launch(
        _widen, (len(values), triton.cdiv(columns, block)), values, scales, scales if zeros is None else zeros, out, columns,
        GROUP=columns // scales.shape[1], BITS=bits, ZEROS=zeros is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out
