"""Rotary positions, rotate-half form: channel i turns with channel i + d/2.

T tokens, d head size. Angles and rotation are in float32. A ``Rotation`` is made once per forward and shared by all layers.
Ported facts: RoPE (arXiv 2104.09864), M-RoPE sections (Qwen2-VL, arXiv 2409.12191), rows and columns
(Keye ``modeling_keye.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mirada.types import Grid

Rotation = tuple[Tensor, Tensor]
"""cos [T, 1, d] and sin [T, 1, d], float32; sin carries the sign of rotate-half in its first half."""


def inverse_frequencies(dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """theta^(-2j/dim), j = 0 .. dim/2-1."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def rotation(angles: Tensor) -> Rotation:
    """[T, d/2] angles -> the factors that ``rotate`` takes."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """[T, heads, d] turned by its positions; same dtype as ``x``."""
    cos, sin = turn
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def mrope_angles(positions: Tensor, sections: Sequence[int], head_dim: int, theta: float) -> Tensor:
    """positions [3, T] -> [T, d/2]: the first ``sections[0]`` frequencies turn by time, the next by row, the last by column."""
    frequencies = inverse_frequencies(head_dim, theta, positions.device)
    axes = zip(positions.float(), frequencies.split(list(sections)), strict=True)
    return torch.cat([axis[:, None] * part for axis, part in axes], -1)


def grid_angles(grids: Sequence[Grid], head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Row-major patches of each grid -> [N, d/2]: the first quarter of d turns by row, the next by column; frames repeat."""
    frequencies = inverse_frequencies(head_dim // 2, theta, device)
    made: dict[tuple[int, int], Tensor] = {}
    for _, h, w in grids:
        if (h, w) not in made:
            y = torch.arange(h, dtype=torch.float32, device=device)[:, None, None] * frequencies
            x = torch.arange(w, dtype=torch.float32, device=device)[None, :, None] * frequencies
            made[h, w] = torch.cat((y.expand(h, w, -1), x.expand(h, w, -1)), -1).reshape(h * w, -1)
    return torch.cat([made[h, w] for t, h, w in grids for _ in range(t)])
