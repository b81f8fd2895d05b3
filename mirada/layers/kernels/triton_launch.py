"""What all Triton kernels share: how they are launched, and sizes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirada import config

INTERPRETED = tl.constexpr(config.env("TRITON_INTERPRET", "0") == "1")


@triton.jit
def product(a, b):
    """``tl.dot`` in float32, of float32 operands without tf32. The interpreter multiplies the bits of bfloat16 as integers."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """``kernel[grid](*args, **meta)`` on the device of the first tensor, which need not be the current one."""
    device = args[0].device
    if device.type == "cuda":
        # Multiplying and adding in one rounding: said, for the default changes between releases of Triton.
        meta["enable_fp_fusion"] = True
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


def power(n: int, least: int = 1) -> int:
    """The least power of two that is at least ``n`` and ``least``: blocks have such sizes only."""
    return max(least, 1 << max(0, n - 1).bit_length())


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(x: Tensor) -> int:
    """Multiprocessors of the device of ``x``; 4 off a GPU, where nothing depends on it but the shape of small tests."""
    return _processors(x.device.index) if x.device.type == "cuda" else 4
