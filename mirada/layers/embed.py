"""Patches to vectors: a Linear (never a convolution) plus a learnt table resampled to each picture's grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirada.layers.linear import Linear
from mirada.types import Grid

CACHED_SIZES = 8
"""Resampled tables kept between calls when no gradient is wanted."""


class PatchEmbed(nn.Module):
    """[N, C, P, P] or [N, C, t, P, P] -> [N, D]; the weight's columns run over (channel, frame, row, column)."""

    def __init__(self, channels: int, patch: int, dim: int, *, frames: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.width = dim
        self.proj = Linear(channels * frames * patch * patch, dim, bias=bias)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels.flatten(1).to(self.proj.weight.dtype))


class GridPositions(nn.Module):
    """A table of vectors, resampled (half-pixel centres, no antialias) to the rows and columns of a grid; frames share it.

    ``side``: of a square table, held as [side*side, D], or its rows and columns, held as [rows, columns, D].
    """

    def __init__(self, side: int | tuple[int, int], dim: int, mode: Literal["bilinear", "bicubic"] = "bilinear") -> None:
        super().__init__()
        self.size = (side, side) if isinstance(side, int) else side
        self.mode = mode
        shape = (side * side,) if isinstance(side, int) else side
        self.weight = nn.Parameter(torch.empty(*shape, dim).normal_(std=0.02))
        self._cache: dict[tuple, Tensor] = {}

    def resample(self, h: int, w: int) -> Tensor:
        """[h*w, D], row-major, in the table's dtype."""
        table = self.weight.view(*self.size, -1).permute(2, 0, 1)[None]
        made = F.interpolate(table.float(), size=(h, w), mode=self.mode, align_corners=False)
        return made[0].permute(1, 2, 0).reshape(h * w, -1).to(self.weight.dtype)

    def forward(self, grids: Sequence[Grid]) -> Tensor:
        """[N, D] for the patches of all grids."""
        made: dict[tuple[int, int], Tensor] = {}
        for _, h, w in grids:
            if (h, w) not in made:
                made[h, w] = self.resample(h, w) if torch.is_grad_enabled() else self._cached(h, w)
        return torch.cat([made[h, w] for t, h, w in grids for _ in range(t)])

    def _cached(self, h: int, w: int) -> Tensor:
        # An optimiser step or a load changes the version or the storage, and so the key.
        key = (h, w, self.weight.data_ptr(), self.weight._version, self.weight.dtype, self.weight.device)
        if key not in self._cache:
            if len(self._cache) >= CACHED_SIZES:
                self._cache.pop(next(iter(self._cache)))
            self._cache[key] = self.resample(h, w)
        return self._cache[key]
