"""Pictures and videos of many requests through the vision tower together, in passes of bounded size.

N patches, F features, D width of the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirada.layers.batch import MediaBatch
from mirada.media.grid import GridRule, Patches, normalise
from mirada.types import Grid

PASS_PATCHES = 16384
"""Patches that one pass through the tower takes at most, unless a single grid that cannot be cut has more."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A grid, or some frames of one, with its patches."""

    kind: str
    grid: Grid
    pixels: np.ndarray


def encode(model: Any, media: Sequence[Patches], rule: GridRule, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Features [F, D] of all media in order; None for no media."""
    features = [
        model.encode(
            MediaBatch(
                pixels=torch.from_numpy(normalise(np.concatenate([piece.pixels for piece in group]), rule)).to(device, dtype),
                grids=tuple(piece.grid for piece in group),
                kinds=tuple(piece.kind for piece in group),  # pyright: ignore[reportArgumentType]
            )
        )
        for group in passes(pieces(model, media), PASS_PATCHES)
    ]
    return torch.cat(features) if features else None


def pieces(model: Any, media: Sequence[Patches]) -> Iterator[Piece]:
    """The grids in order; one whose frames do not see each other is cut where it would overfill a pass."""
    for item in media:
        start = 0
        for t, h, w in item.grids:
            frames = t
            if len(model.segments(((t, h, w),))) == t:
                frames = max(1, PASS_PATCHES // (h * w))
            for first in range(0, t, frames):
                count = min(frames, t - first)
                end = start + count * h * w
                yield Piece(item.kind, (count, h, w), item.pixels[start:end])
                start = end


def passes(items: Iterator[Piece], most: int) -> Iterator[list[Piece]]:
    """Runs of pieces of at most ``most`` patches together."""
    group: list[Piece] = []
    size = 0
    for piece in items:
        if group and size + len(piece.pixels) > most:
            yield group
            group, size = [], 0
        group.append(piece)
        size += len(piece.pixels)
    if group:
        yield group
