"""What one forward works on, said explicitly: all sequences end to end, no padding.

T tokens, N patches, F features, C channels, P patch side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mirada.types import Grid


@dataclass(frozen=True, eq=False)
class Batch:
    """T tokens of all sequences end to end. What the host must know (lengths, slots) lies on the host."""

    tokens: Tensor
    """int64 [T]."""
    positions: Tensor
    """int64 [3, T]: time, row, column."""
    lengths: tuple[int, ...]
    """New tokens per sequence; they sum to T."""
    past: tuple[int, ...] = ()
    """Tokens already in the cache, per sequence; zeros without a cache."""
    slots: tuple[int, ...] = ()
    """Cache slot, per sequence."""
    feature_rows: Tensor | None = None
    """int64 [F]: rows of ``tokens`` that visual features replace, in order."""

    def __post_init__(self) -> None:
        if not self.past:
            object.__setattr__(self, "past", (0,) * len(self.lengths))
        if not self.slots:
            object.__setattr__(self, "slots", tuple(range(len(self.lengths))))


@dataclass(frozen=True, eq=False)
class MediaBatch:
    """Pictures and videos to encode, end to end."""

    pixels: Tensor
    """float [N, C, P, P], normalised."""
    grids: tuple[Grid, ...]
    """(t, h, w) in patches; their products sum to N."""
    kinds: tuple[Literal["image", "video"], ...] = ()
    """One per grid."""
