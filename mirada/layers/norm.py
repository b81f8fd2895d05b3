"""Normalisation, computed in float32 whatever the storage."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirada.layers import fused


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) in float32, cast back, then times ``weight`` (Qwen3 order of roundings)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        made = fused.rms_norm(x, self.weight, self.eps)
        if made is not None:
            return made
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


def norm_heads(heads: Tensor, q_norm: RMSNorm, k_norm: RMSNorm, num_q: int) -> Tensor:
    """RMS-normalise the first ``num_q`` heads of [T, heads, d] by ``q_norm`` and the rest by ``k_norm``, in one pass."""
    if q_norm.eps != k_norm.eps:
        raise ValueError(f"q_norm eps {q_norm.eps} differs from k_norm eps {k_norm.eps}")
    weight = torch.cat((q_norm.weight.expand(num_q, -1), k_norm.weight.expand(heads.shape[1] - num_q, -1)))
    return F.rms_norm(heads.float(), heads.shape[-1:], None, q_norm.eps).to(heads.dtype) * weight


def add_norm(x: Tensor, delta: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """x and delta [T, D] -> x + delta, and the norm of that. One that something is hooked on is called as a module."""
    made = fused.add_norm(x, delta, norm.weight, norm.eps) if fused.plain(norm) else None
    if made is not None:
        return made
    total = x + delta
    return total, norm(total)


def norm_in_place(x: Tensor, norm: RMSNorm) -> None:
    """x [T, D], any number apart, becomes ``norm(x)``."""
    if not fused.plain(norm) or not fused.norm_in_place(x, norm.weight, norm.eps):
        x.copy_(norm(x))


class LayerNorm(nn.LayerNorm):
    """torch's: its kernels accumulate in float32 for every storage type."""
