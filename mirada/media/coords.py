"""Between what a model says of places in a picture and pixels of the original: the only arithmetic of coordinates.

Models say places as thousandths or fractions of what they see, or as pixels of it. What callers see, and what training data
holds, are pixels of the original, upright picture (EXIF and container rotation applied), counted from its top left corner.
x runs to the right, y down; both are real numbers, and a picture of W pixels reaches from 0 to W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mirada.errors import SettingsError
from mirada.media.grid import Patches

Scale = Literal["thousand", "unit", "pixels"]
"""Of the numbers that a model says: 0 to 1000 or 0 to 1 over what it sees, or pixels of it after resizing."""
FULL = {"thousand": 1000.0, "unit": 1.0}
Point = tuple[float, float]
"""(x, y)"""


@dataclass(frozen=True, slots=True)
class View:
    """How one picture, or the frames of one video, came before a model. Sizes are (height, width) in pixels."""

    kind: Literal["image", "video"]
    size: tuple[int, int]
    """Of the original, upright."""
    resized: tuple[int, int]
    """Of the whole original after its resize."""
    canvas: tuple[int, int]
    """Of what was cut into patches: larger than ``resized`` with a border to the right and below, smaller where ``resized`` was
    cut around its centre."""

    @classmethod
    def of(cls, patches: Patches, patch: int) -> View:
        """Of a prepared medium, with patches of ``patch`` pixels a side; of a video whose frames have several sizes, the
        first counts."""
        _, rows, columns = patches.grids[0]
        canvas = rows * patch, columns * patch
        return cls(patches.kind, patches.size, patches.resized or canvas, canvas)

    def to_original(self, point: Point, scale: Scale) -> Point:
        """What the model said -> pixels of the original, none outside it. Raises SettingsError for an unknown scale."""
        x, y = (self._back(value, axis, scale) for value, axis in zip(point, (1, 0), strict=True))
        return min(max(x, 0.0), float(self.size[1])), min(max(y, 0.0), float(self.size[0]))

    def from_original(self, point: Point, scale: Scale) -> Point:
        """Pixels of the original -> what the model is to say; outside its range for what a cut has taken away."""
        x, y = (self._forth(value, axis, scale) for value, axis in zip(point, (1, 0), strict=True))
        return x, y

    def _seen(self, axis: int) -> tuple[int, int]:
        """(start, length) along ``axis`` of the part of ``resized`` that lies on the canvas."""
        whole, canvas = self.resized[axis], self.canvas[axis]
        return (round((whole - canvas) / 2), canvas) if whole > canvas else (0, whole)

    def _back(self, value: float, axis: int, scale: Scale) -> float:
        start, length = self._seen(axis)
        along = value if scale == "pixels" else value / _full(scale) * length
        return (start + along) * self.size[axis] / self.resized[axis]

    def _forth(self, value: float, axis: int, scale: Scale) -> float:
        start, length = self._seen(axis)
        along = value * self.resized[axis] / self.size[axis] - start
        return along if scale == "pixels" else along / length * _full(scale)


def _full(scale: str) -> float:
    if scale not in FULL:
        raise SettingsError(f"the scale {scale!r} of coordinates is unknown", f"use {', '.join(FULL)} or pixels")
    return FULL[scale]


def box_of(points: Sequence[Point]) -> tuple[Point, Point]:
    """(top left, bottom right) around ``points``."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return (min(xs), min(ys)), (max(xs), max(ys))
