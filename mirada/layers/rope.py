"""Rotary positions, rotate-half form: channel i turns with channel i + d/2.

T tokens, d head size. Angles and rotation are in float32. A ``Rotation`` is made once per forward and shared by all layers.
Ported facts: RoPE (arXiv 2104.09864), M-RoPE sections (Qwen2-VL, arXiv 2409.12191), rows and columns
(Keye ``modeling_keye.py``), YaRN as DeepSeek-V3 uses it (deepseek-ai/DeepSeek-V3 ``modeling_deepseek.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    return section_angles(positions, sections, inverse_frequencies(head_dim, theta, positions.device))


def section_angles(positions: Tensor, sections: Sequence[int], frequencies: Tensor) -> Tensor:
    """As ``mrope_angles``, with frequencies [d/2] of any kind."""
    axes = zip(positions.float(), frequencies.split(list(sections)), strict=True)
    return torch.cat([axis[:, None] * part for axis, part in axes], -1)


def grid_angles(grids: Sequence[Grid], head_dim: int, theta: float, device: torch.device, merge: int = 1) -> Tensor:
    """Patches of each grid -> [N, d/2]: the first quarter of d turns by row, the next by column; frames repeat.

    Patches come row after row, or, with ``merge`` above 1, one square of that side after another.
    """
    frequencies = inverse_frequencies(head_dim // 2, theta, device)
    made: dict[tuple[int, int], Tensor] = {}
    for _, h, w in grids:
        if (h, w) not in made:
            y = torch.arange(h, dtype=torch.float32, device=device)[:, None, None] * frequencies
            x = torch.arange(w, dtype=torch.float32, device=device)[None, :, None] * frequencies
            both = torch.cat((y.expand(h, w, -1), x.expand(h, w, -1)), -1)
            if merge > 1:
                both = both.view(h // merge, merge, w // merge, merge, -1).transpose(1, 2)
            made[h, w] = both.reshape(h * w, -1)
    return torch.cat([made[h, w] for t, h, w in grids for _ in range(t)])


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): frequencies that turn seldom within the trained context are slowed by ``factor``."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    @property
    def turn_scale(self) -> float:
        """What cosines and sines are multiplied by."""
        return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)

    @property
    def softmax_scale(self) -> float:
        """What the scale of the scores is multiplied by (DeepSeek: only where ``mscale_all_dim`` is set)."""
        return self._mscale(self.mscale_all_dim) ** 2

    def _mscale(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def frequencies(self, dim: int, theta: float, device: torch.device | None = None) -> Tensor:
        """[dim/2]: as trained where a channel turns more than ``beta_fast`` times in the trained context, divided by
        ``factor`` where it turns less than ``beta_slow`` times, and a linear mixture by channel between."""
        trained = inverse_frequencies(dim, theta, device)
        low = max(math.floor(self._channel(self.beta_fast, dim, theta)), 0)
        high = min(math.ceil(self._channel(self.beta_slow, dim, theta)), dim - 1)
        channels = torch.arange(dim // 2, dtype=torch.float32, device=device)
        # The released code widens an empty ramp by this much.
        slowed = ((channels - low) / (high - low if high > low else 0.001)).clamp(0, 1)
        return trained / self.factor * slowed + trained * (1 - slowed)

    def _channel(self, turns: float, dim: int, theta: float) -> float:
        """The channel (a fraction) that turns ``turns`` times within the trained context."""
        return dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))


def pairs_to_halves(x: Tensor) -> Tensor:
    """[.., d] whose adjacent channels turn together -> the order of ``rotate``: first of each pair, then the seconds."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
