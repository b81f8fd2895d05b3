"""Named colours, shape masks, and the labels of patches that objects cover."""

from __future__ import annotations

import functools
import math
import random

import numpy as np
from PIL import Image, ImageDraw

from mirada.synth.effects import RGB, paint, shifted
from mirada.synth.types import COLOURS, IGNORE, PATCH, SHAPES, Dense

PALETTE: dict[str, RGB] = {
    "red": (214, 38, 38), "green": (44, 160, 58), "blue": (38, 82, 214), "yellow": (246, 218, 40), "orange": (246, 134, 22),
    "purple": (132, 48, 172), "pink": (246, 132, 192), "brown": (124, 74, 34), "black": (20, 20, 20),
    "white": (248, 248, 248), "gray": (128, 128, 128), "cyan": (40, 206, 222),
}  # fmt: skip
DRAWN_SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
PLURALS = {name: name + ("es" if name.endswith("s") else "s") for name in DRAWN_SHAPES}
PAPERS: tuple[RGB, ...] = (
    (255, 255, 255),
    (235, 235, 230),
    (245, 238, 220),
    (214, 228, 244),
    (226, 240, 222),
    (26, 28, 38),
    (0, 0, 0),
)
MIN_DISTANCE = 110
"""Objects differ from the background by at least this much in RGB (Euclidean)."""
_SCALE = 3
_CORNERS = {"square": (4, 45, 1.0), "triangle": (3, 90, 1.0), "diamond": (4, 90, 1.0), "star": (10, 90, 0.42)}
"""Corners, angle of the first in degrees, reach of every second corner."""


def colours_on(paper: RGB) -> list[str]:
    """Names of the colours that stand out from ``paper``."""
    return [name for name, colour in PALETTE.items() if math.dist(colour, paper) >= MIN_DISTANCE]


def tint(rng: random.Random, name: str, level: float) -> RGB:
    """The named colour, moved a little at higher levels (black, white and gray only in brightness)."""
    amount = round(14 * level)
    if name in ("black", "white", "gray"):
        move = rng.randint(-amount, amount)
        r, g, b = (min(max(c + move, 0), 255) for c in PALETTE[name])
        return r, g, b
    return shifted(rng, PALETTE[name], amount)


def _outline(shape: str, turn: int) -> list[tuple[float, float]]:
    """Corner points on the unit circle (cross: a plus sign), turned by ``turn`` degrees."""
    if shape == "cross":
        a = 0.36  # half the width of an arm
        flat = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    else:
        corners, start, inner = _CORNERS[shape]
        reach = [inner if i % 2 else 1.0 for i in range(corners)]
        angles = [math.radians(start + 360 / corners * i) for i in range(corners)]
        flat = [(r * math.cos(a), -r * math.sin(a)) for r, a in zip(reach, angles, strict=True)]
        if shape == "diamond":
            flat = [(0.72 * x, y) for x, y in flat]
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    return [(c * x - s * y, s * x + c * y) for x, y in flat]


@functools.lru_cache(maxsize=4096)
def shape_mask(shape: str, radius: int, turn: int = 0) -> np.ndarray:
    """Smooth mask uint8 [2r + 1, 2r + 1] of a shape whose corners lie ``radius`` pixels from the centre."""
    side = 2 * radius + 1
    big = Image.new("L", (side * _SCALE, side * _SCALE))
    draw, middle = ImageDraw.Draw(big), side * _SCALE / 2
    reach = radius * _SCALE
    if shape == "circle":
        reach *= 0.92
        draw.ellipse((middle - reach, middle - reach, middle + reach, middle + reach), fill=255)
    else:
        draw.polygon([(middle + reach * x, middle + reach * y) for x, y in _outline(shape, turn)], fill=255)
    mask = np.array(big.reduce(_SCALE))
    mask.setflags(write=False)
    return mask


def place(canvas: np.ndarray, mask: np.ndarray, left: int, top: int, colour: RGB) -> None:
    """Paint a mask that lies wholly inside ``canvas`` float32 [H, W, 3]."""
    height, width = mask.shape
    paint(canvas[top : top + height, left : left + width], mask, colour)


def mark(dense: Dense, mask: np.ndarray, left: int, top: int, shape: str, colour: str, box: int = 0) -> None:
    """Label the patches that a mask placed at (left, top) covers (see Dense). Objects must not overlap."""
    height, width = mask.shape
    row, column = top // PATCH, left // PATCH
    rows, columns = (top + height - 1) // PATCH - row + 1, (left + width - 1) // PATCH - column + 1
    aligned = np.zeros((rows * PATCH, columns * PATCH), np.float32)
    aligned[top - row * PATCH :, left - column * PATCH :][:height, :width] = mask
    cover = aligned.reshape(rows, PATCH, columns, PATCH).sum((1, 3)) * np.float32(1 / (255 * PATCH * PATCH))
    cover[(top + height // 2) // PATCH - row, (left + width // 2) // PATCH - column] = 1.0
    sure, unsure = cover >= 0.25, (cover >= 0.05) & (cover < 0.25)
    for labels, value in ((dense.shape, SHAPES.index(shape)), (dense.colour, COLOURS.index(colour)), (dense.box, box)):
        window = labels[row : row + rows, column : column + columns]
        window[unsure & (window == 0)] = IGNORE
        window[sure] = value
