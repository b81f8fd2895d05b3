"""Cached glyph masks, and text composed from them: much faster than drawing each line with a font engine."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import ImageFont

from mirada.synth.fonts import BUILTIN, FontFile, font_bytes
from mirada.synth.types import CHAR_CLASS, IGNORE, PATCH

SUB = PATCH // 2


class Glyph(NamedTuple):
    """``mask`` uint8 [h, w] placed at (dx, dy) from the pen on the baseline; ``advance`` in pixels."""

    mask: np.ndarray
    dx: int
    dy: int
    advance: float


class Face:
    """One font at one size. Glyphs are drawn on first use and kept; kerning and ligatures are not applied."""

    def __init__(self, file: FontFile, size: int, strict: bool) -> None:
        self.name = file.name if file is not BUILTIN else "builtin"
        self.size = size
        if file is BUILTIN:
            font = ImageFont.load_default(size)
        else:
            data = io.BytesIO(font_bytes(file, strict))
            font = ImageFont.truetype(data, size, layout_engine=ImageFont.Layout.BASIC)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise TypeError("Pillow was built without FreeType")
        self._font = font
        self._glyphs: dict[str, Glyph] = {}

    def glyph(self, char: str) -> Glyph:
        found = self._glyphs.get(char)
        if found is None:
            core, (dx, dy) = self._font.getmask2(char, mode="L", anchor="ls")
            width, height = core.size
            mask = np.array(core, dtype=np.uint8).reshape(height, width)
            mask, dx, dy = _trim(mask, int(dx), int(dy))
            found = self._glyphs[char] = Glyph(mask, dx, dy, float(self._font.getlength(char)))
        return found


def _trim(mask: np.ndarray, dx: int, dy: int) -> tuple[np.ndarray, int, int]:
    """Cut empty borders off, so that glyph boxes are ink boxes."""
    rows, columns = np.flatnonzero(mask.max(1, initial=0)), np.flatnonzero(mask.max(0, initial=0))
    if not len(rows):
        return np.zeros((0, 0), np.uint8), 0, 0
    cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.ascontiguousarray(cut), dx + int(columns[0]), dy + int(rows[0])


@functools.lru_cache(maxsize=4096)
def face(file: FontFile, size: int, strict: bool = True) -> Face:
    """The cached face of a font file at ``size`` pixels per em."""
    return Face(file, size, strict)


@dataclass(slots=True)
class TextRun:
    """One laid-out line of text, pen at x = 0 and baseline at y = 0.

    ``edges`` len(text) + 1 pen positions; ink spans x from ``left`` to ``right``, y from ``top`` to ``bottom``.
    """

    text: str
    glyphs: list[Glyph]
    edges: list[float]
    left: int
    right: int
    top: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top


def lay_out(font: Face, text: str, spacing: float = 0.0) -> TextRun:
    """Place the glyphs of ``text`` with ``spacing`` extra pixels between them."""
    pen, edges, glyphs = 0.0, [0.0], []
    left, right, top, bottom = 10**6, -(10**6), 10**6, -(10**6)
    for char in text:
        glyph = font.glyph(char)
        glyphs.append(glyph)
        height, width = glyph.mask.shape
        if width:
            x = round(pen) + glyph.dx
            left, right = min(left, x), max(right, x + width)
            top, bottom = min(top, glyph.dy), max(bottom, glyph.dy + height)
        pen += glyph.advance + spacing
        edges.append(pen)
    if right < left:
        left = right = top = bottom = 0
    return TextRun(text, glyphs, edges, left, right, top, bottom)


def stamp(canvas: np.ndarray, run: TextRun, x: int, y: int) -> None:
    """Write the ink of ``run`` into ``canvas`` uint8 [H, W] with the pen starting at (x, y); ink outside is cut."""
    limit_y, limit_x = canvas.shape
    for glyph, edge in zip(run.glyphs, run.edges, strict=False):
        height, width = glyph.mask.shape
        if not width:
            continue
        x0, y0 = x + round(edge) + glyph.dx, y + glyph.dy
        if x0 >= 0 and y0 >= 0 and x0 + width <= limit_x and y0 + height <= limit_y:
            window = canvas[y0 : y0 + height, x0 : x0 + width]
            np.maximum(window, glyph.mask, out=window)
        else:
            cut_x, cut_y = max(-x0, 0), max(-y0, 0)
            window = canvas[max(y0, 0) : max(y0 + height, 0), max(x0, 0) : max(x0 + width, 0)]
            part = glyph.mask[cut_y : cut_y + window.shape[0], cut_x : cut_x + window.shape[1]]
            np.maximum(window, part, out=window)


def owners(edges: list[float], num_columns: int) -> list[int]:
    """Which character owns each sub-column: index into the text, or -1.

    ``edges``: pen positions in canvas pixels, one more than characters.
    """
    result = [-1] * num_columns
    counts, narrow = [0] * (len(edges) - 1), []
    for i in range(len(edges) - 1):
        first = max(-int(-(edges[i] - SUB / 2) // SUB), 0)
        last = min(-int(-(edges[i + 1] - SUB / 2) // SUB), num_columns)
        counts[i] = max(last - first, 0)
        for k in range(first, last):
            result[k] = i
        if not counts[i]:
            narrow.append(i)
    for i in narrow:
        k = int((edges[i] + edges[i + 1]) / 2 // SUB)
        if 0 <= k < num_columns and (result[k] < 0 or counts[result[k]] >= 2):
            if result[k] >= 0:
                counts[result[k]] -= 1
            result[k], counts[i] = i, 1
    return result


def label(char: np.ndarray, text: str, edges: list[float], top: float, bottom: float, slope: float = 0.0) -> None:
    """Write the character classes of one text line into ``char`` int16 [h, w, 2].

    ``edges``: pen positions in canvas pixels; ink between ``top`` and ``bottom`` at the middle of the text, whose
    baseline falls by ``slope`` pixels per pixel to the right.
    """
    h, w, _ = char.shape
    middle = (edges[0] + edges[-1]) / 2
    flat = char.reshape(h, 2 * w)
    rows = _rows(top, bottom, h)
    for k, i in enumerate(owners(edges, 2 * w)):
        if i < 0 or text[i] == " ":
            continue
        if slope:
            drop = slope * (k * SUB + SUB / 2 - middle)
            rows = _rows(top + drop, bottom + drop, h)
        for row, is_sure in rows:
            before, value = flat[row, k], CHAR_CLASS[text[i]]
            if is_sure and (before <= 0 or before == value):
                flat[row, k] = value
            elif is_sure or before == 0:  # two lines meet in this patch, or this one only touches it
                flat[row, k] = IGNORE


def _rows(top: float, bottom: float, num_rows: int) -> list[tuple[int, bool]]:
    """Patch rows that the ink from ``top`` to ``bottom`` touches, and whether by 3 pixels or more (or wholly)."""
    found = []
    for row in range(max(int(top // PATCH), 0), min(int(bottom // PATCH) + 1, num_rows)):
        overlap = min(bottom, (row + 1) * PATCH) - max(top, row * PATCH)
        if overlap > 0:
            found.append((row, overlap >= min(3, bottom - top)))
    return found
