"""Matrix products, and matrices stored as int8 rows with one scale each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_ONEDNN_FROM = 1 << 20
"""Multiplications below which the ten microseconds that oneDNN takes to find its kernel cost more than it saves."""


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


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [.., columns] times weight [rows, columns] transposed -> [.., rows]; differentiable where gradients are wanted.

    On a CPU in float32 without gradients a large product is oneDNN's, which reads the weight as it lies. torch's own choice
    there is MKL, which on a processor that is not Intel's takes two to three times as long for more than a few rows of x.
    """
    if (
        _ONEDNN
        and x.numel() * len(weight) >= _ONEDNN_FROM
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


class Linear(nn.Linear):
    """torch's, without a bias, through ``linear``."""

    stays_float: bool = False
    """Its weight is read by another module, so a quantised checkpoint is widened into it, never held packed."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)
