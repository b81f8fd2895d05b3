"""Text lines and short paragraphs: placed, tilted, coloured and disturbed, with a class for every sub-column."""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image

from mirada.synth import effects, glyphs
from mirada.synth.fonts import font_files
from mirada.synth.glyphs import Face, TextRun
from mirada.synth.phrasing import ask
from mirada.synth.types import CELL, IGNORE, MIN_PIXELS, Dense, Options, Sample
from mirada.synth.words import line_text

MAX_TILT = math.tan(math.radians(3.0))


def pick_face(rng: random.Random, options: Options, low: int, high: int) -> Face:
    """A face of the split's fonts with a size of ``low`` to ``high`` pixels per em."""
    file = rng.choice(font_files(options.fonts, options.split))
    return glyphs.face(file, rng.randint(low, high), options.fonts != "debian-any")


def wrap(text: str, max_chars: int) -> list[str]:
    """Break at spaces into rows of about ``max_chars`` (a longer word stays whole)."""
    rows: list[str] = []
    for part in text.split(" "):
        if rows and len(rows[-1]) + 1 + len(part) <= max_chars:
            rows[-1] += " " + part
        else:
            rows.append(part)
    return rows


def _cells(pixels: float) -> int:
    return max(math.ceil(pixels / CELL), 1)


def _canvas_size(width: int, height: int) -> tuple[int, int]:
    """(H, W) in pixels: multiples of CELL that hold the text and at least MIN_PIXELS."""
    rows = _cells(height)
    columns = max(_cells(width), math.ceil(MIN_PIXELS / (rows * CELL * CELL)))
    return rows * CELL, columns * CELL


def _tilted(mask: np.ndarray, slope: float) -> np.ndarray:
    """Rotate ``mask`` about its centre so that lines fall by ``slope`` pixels per pixel."""
    height, width = mask.shape
    x, y = width / 2, height / 2
    # Destination to source, pixel centres: a rotation by a small angle (cos is 1 within 0.2 %).
    matrix = (1.0, slope, -slope * y, -slope, 1.0, slope * x)
    turned = Image.fromarray(mask).transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(turned)


def draw_rows(rng: random.Random, runs: list[TextRun], pitch: int, level: float) -> tuple[np.ndarray, Dense]:
    """Ink mask uint8 [H, W] of text rows ``pitch`` pixels apart, and its labels; placed and tilted at random."""
    text_width = max(run.width for run in runs)
    top = runs[0].top
    text_height = (len(runs) - 1) * pitch + runs[-1].bottom - top
    height, width = _canvas_size(text_width + 4, text_height + 2)
    if rng.random() < 0.3 * level:
        width += CELL * rng.randint(1, 2)
    if rng.random() < 0.06 * level:
        height += CELL
    slack = height - text_height - 2
    slope = 0.0
    if rng.random() < 0.35 * level:
        limit = min(MAX_TILT, slack / max(text_width, 1))
        slope = rng.uniform(-limit, limit)
    spare_y = max(int(slack - abs(slope) * text_width), 0)
    spare_x = max(width - text_width - 2, 0)
    middle = (height - text_height) // 2
    y0 = middle + round(rng.uniform(-0.5, 0.5) * spare_y * (0.3 + 0.7 * level)) - top
    x0 = 1 + (rng.randint(0, spare_x) if rng.random() < 0.3 + 0.4 * level else min(rng.randint(1, 6), spare_x))
    centred = len(runs) > 1 and rng.random() < 0.3
    mask = np.zeros((height, width), np.uint8)
    dense = Dense.empty(height, width, colour=IGNORE)
    for i, run in enumerate(runs):
        x = x0 - run.left + ((text_width - run.width) // 2 if centred else 0)
        y = y0 + i * pitch
        glyphs.stamp(mask, run, x, y)
        # Rotation moves a line sideways by its distance from the centre, and up or down by its middle's.
        ink_middle = y + (run.top + run.bottom) / 2
        shift_x = -slope * (ink_middle - height / 2)
        shift_y = slope * (x + run.edges[-1] / 2 - width / 2)
        edges = [x + edge + shift_x for edge in run.edges]
        glyphs.label(dense.char, run.text, edges, y + run.top + shift_y, y + run.bottom + shift_y, slope)
    return (_tilted(mask, slope) if slope else mask), dense


def _picture(rng: random.Random, mask: np.ndarray, level: float) -> np.ndarray:
    ink, start, end = effects.ink_and_paper(rng, level)
    height, width = mask.shape
    canvas = effects.background(rng, height, width, start, end, level)
    effects.paint(canvas, mask, ink)
    return effects.disturb(rng, canvas, level)


def draw_line(rng: random.Random, options: Options) -> Sample:
    """Task ``line``: one text of up to ``options.max_chars`` characters, wrapped into rows when long."""
    level = options.level
    text, kind = line_text(rng, options.split, options.max_chars)
    big = rng.random() < 0.15 * level
    font = pick_face(rng, options, 21, 40) if big else pick_face(rng, options, 16 if level > 0.3 else 18, 20)
    spacing = rng.choice((0.0, 0.0, 0.0, 0.5, 1.0, 2.0, -0.4)) if rng.random() < level else 0.0
    rows = wrap(text, rng.randint(14, 22)) if len(text) > 20 and rng.random() < 0.7 else [text]
    runs = [glyphs.lay_out(font, row, spacing) for row in rows]
    pitch = CELL if font.size <= 20 and rng.random() < 0.6 else round(font.size * rng.uniform(1.2, 1.5))
    mask, dense = draw_rows(rng, runs, pitch, level)
    image = _picture(rng, mask, level)
    facts = {"text": text, "kind": kind, "rows": rows, "font": font.name, "size": font.size, "question_type": "read"}
    return Sample("line", image, ask(rng, "read", options.phrasing), text, dense, facts)


def draw_paragraph(rng: random.Random, options: Options) -> Sample:
    """Task ``paragraph``: two to four short lines, answered with newlines between them."""
    level = options.level
    limit = min(options.max_chars, 10 + round(8 * level))
    font = pick_face(rng, options, 16 if level > 0.3 else 18, 20 + round(4 * level))
    rows = [line_text(rng, options.split, limit)[0] for _ in range(rng.randint(2, 4))]
    runs = [glyphs.lay_out(font, row) for row in rows]
    pitch = CELL if font.size <= 20 and rng.random() < 0.5 else round(font.size * rng.uniform(1.2, 1.5))
    mask, dense = draw_rows(rng, runs, pitch, level)
    image = _picture(rng, mask, level)
    facts = {"text": "\n".join(rows), "rows": rows, "font": font.name, "size": font.size, "question_type": "read"}
    return Sample("paragraph", image, ask(rng, "read", options.phrasing), "\n".join(rows), dense, facts)


def write_text(
    canvas: np.ndarray, dense: Dense, run: TextRun, x: int, y: int, ink: effects.RGB, baseline: bool = False
) -> None:
    """Paint a laid-out text into float32 ``canvas`` and label its characters.

    Its ink is centred at ``x``, and at ``y`` too unless ``baseline``: then y is the baseline, common to several texts.
    """
    mask = np.zeros((run.height, run.width), np.uint8)
    glyphs.stamp(mask, run, -run.left, -run.top)
    left = x - run.width // 2
    top = y + run.top if baseline else y - run.height // 2
    window = canvas[top : top + run.height, left : left + run.width]
    effects.paint(window, mask[: window.shape[0], : window.shape[1]], ink)
    edges = [left - run.left + edge for edge in run.edges]
    glyphs.label(dense.char, run.text, edges, top, top + run.height)
