"""A pass through a vision tower in slices: it stops between layers, so that who drives it may do other things meanwhile.

N patches, W width of the tower.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from typing import TypeVar

from torch import Tensor, nn

from mirada.layers.rope import Rotation
from mirada.types import Grid

T = TypeVar("T")
Slices = Generator[None, None, T]
"""Computes up to its next ``yield``, and in the end returns a ``T``. What it holds in between is all that a pass needs."""


def whole(slices: Slices[T]) -> T:
    """All slices one after the other."""
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return end.value


def through(layers: Iterable[nn.Module], x: Tensor, turn: Rotation, segments: Sequence[int]) -> Slices[Tensor]:
    """``x`` [N, W] through ``layers``, a slice each."""
    for layer in layers:
        yield
        x = layer(x, turn, segments)
    return x


class SlicedTower(nn.Module, ABC):
    """A tower says its pass as ``slices``; ``forward`` is these run to their end."""

    @abstractmethod
    def slices(self, pixels: Tensor, grids: Sequence[Grid], segments: Sequence[int]) -> Slices[Tensor]:
        """[N, ..] patches of all pictures -> [N, W]. ``grids``: (t, h, w) per picture or video; ``segments``: runs of patches
        that see each other, summing to N."""

    def forward(self, pixels: Tensor, grids: Sequence[Grid], segments: Sequence[int]) -> Tensor:
        """As ``slices``, all at once."""
        return whole(self.slices(pixels, grids, segments))
