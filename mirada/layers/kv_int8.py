"""Keys and values as int8 with a float32 scale per head and token: 0.26 to 0.28 of the bytes of float32.

S tokens; P parts of a row that have scales of their own; d width of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 127
TINY = torch.finfo(torch.float32).tiny
SCALE_TYPE = torch.float32
"""float16 would save 2 bytes of a row, and round the scales of small rows to nothing."""


@dataclass(frozen=True, eq=False)
class Quantised:
    """int8 ``values`` [.., S, d] and ``scales`` [.., S, P] of ``parts`` (widths that sum to d), views into a cache."""

    values: Tensor
    scales: Tensor
    parts: tuple[int, ...]

    def __len__(self) -> int:
        """S."""
        return self.values.shape[-2]

    def __getitem__(self, tokens: slice) -> Quantised:
        return Quantised(self.values[..., tokens, :], self.scales[..., tokens, :], self.parts)

    @property
    def device(self) -> torch.device:
        return self.values.device

    def to(self, dtype: torch.dtype) -> Tensor:
        """[.., S, d] in ``dtype``; for a bounded run of tokens, else this is the copy that the format avoids."""
        if len(self.parts) == 1:
            return (self.values * self.scales).to(dtype)
        pieces = zip(self.values.split(self.parts, -1), self.scales.split(1, -1), strict=True)
        return torch.cat([values * scale for values, scale in pieces], -1).to(dtype)


def quantise(x: Tensor, parts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """[.., d] -> int8 [.., d] and scales [.., P]: each part's largest magnitude becomes 127. Zeros stay zeros."""
    made = [_quantise(part.float()) for part in x.split(parts, -1)]
    if len(made) == 1:
        return made[0]
    return torch.cat([values for values, _ in made], -1), torch.cat([scales for _, scales in made], -1)


def _quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.abs().amax(-1, keepdim=True).div_(LEVELS).clamp_min_(TINY)
    return (x / scales).round_().to(torch.int8), scales
