"""Matrices stored as int8 rows with one scale each."""

from __future__ import annotations

import torch
from torch import Tensor


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, ..] float -> int8 of the same shape and float16 scales [rows]: value = int8 * scale.

    Symmetric, largest magnitude to 127, rounded to even with the scale as it is stored. A row of zeros has scale zero.
    """
    flat = weight.detach().float().flatten(1)
    scale = (flat.abs().amax(1) / 127).to(torch.float16)
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    values = (flat / divisor[:, None]).round_().clamp_(-127, 127)
    # A row too small for float16's least step would be divided by one: that is zeros, as it should be.
    return values.to(torch.int8).view(weight.shape), scale


def dequantise_rows(values: Tensor, scale: Tensor) -> Tensor:
    """int8 [rows, ..] and scales [rows] -> float32 [rows, ..]."""
    return values.float() * scale.float().view(-1, *[1] * (values.ndim - 1))
