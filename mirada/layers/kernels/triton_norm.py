"""RMSNorm, alone and after a residual sum, and SwiGLU: one pass over memory each, rounded where the modules round.

T tokens, D width, I inner width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, contiguous_format, empty_like

from mirada.layers.kernels.triton_launch import launch, power


@triton.jit
def _norm(x, delta, weight, total, out, eps, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    live = at < WIDTH
    value = tl.load(x + row * stride + at, mask=live, other=0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(delta + row * WIDTH + at, mask=live, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(total + row * WIDTH + at, value, mask=live)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    scaled = wide.to(value.dtype).to(tl.float32) * tl.load(weight + at, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + at, scaled.to(value.dtype), mask=live)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[T, D], rows any distance apart -> [T, D]: see ``layers.norm.RMSNorm``."""
    out = empty_like(x, memory_format=contiguous_format)
    _run(x, None, weight, None, out, eps)
    return out


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x and delta [T, D] -> x + delta, and its norm."""
    total, out = empty_like(x, memory_format=contiguous_format), empty_like(x, memory_format=contiguous_format)
    _run(x, delta.contiguous(), weight, total, out, eps)
    return total, out


def _run(x: Tensor, delta: Tensor | None, weight: Tensor, total: Tensor | None, out: Tensor, eps: float) -> None:
    width, block = x.shape[1], power(x.shape[1])
    warps = min(16, max(1, block // 512))
    launch(
        _norm, (len(x),), x, x if delta is None else delta, weight, out if total is None else total, out, eps, x.stride(0),
        WIDTH=width, BLOCK=block, ADD=delta is not None, num_warps=warps,
    )  # fmt: skip


@triton.jit
def _swiglu(x, out, INNER: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < INNER
    gate = tl.load(x + row * 2 * INNER + at, mask=live, other=0.0)
    up = tl.load(x + row * 2 * INNER + INNER + at, mask=live, other=0.0)
    wide = gate.to(tl.float32)
    wide = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * INNER + at, wide.to(gate.dtype), mask=live)


def swiglu(gate_up: Tensor) -> Tensor:
    """[T, 2 I], gates then ups -> silu(gate) * up [T, I]."""
    x = gate_up.contiguous()
    inner = x.shape[1] // 2
    out = x.new_empty(len(x), inner)
    block = min(1024, power(inner))
    launch(_swiglu, (len(x), triton.cdiv(inner, block)), x, out, INNER=inner, BLOCK=block, num_warps=4)
    return out
