"""Backgrounds, contrast and disturbances. Noise comes from one fixed bank, cut at random places: cheap and repeatable."""

from __future__ import annotations

import functools
import io
import random

import numpy as np
from PIL import Image, ImageFilter

RGB = tuple[int, int, int]
_BANK_HEIGHT, _BANK_WIDTH = 512, 1024


@functools.lru_cache(maxsize=1)
def _noise_bank() -> np.ndarray:
    """Standard normal float32 [512, 1024, 3]; RandomState keeps its stream over NumPy versions."""
    bank = np.random.RandomState(20240).standard_normal((_BANK_HEIGHT, _BANK_WIDTH, 3))
    return bank.astype(np.float32)


def noise(rng: random.Random, height: int, width: int) -> np.ndarray:
    """A float32 [height, width, 3] cut of the bank (tiled when larger)."""
    bank = _noise_bank()
    if height > _BANK_HEIGHT or width > _BANK_WIDTH:
        bank = np.tile(bank, (-(-height // _BANK_HEIGHT), -(-width // _BANK_WIDTH), 1))
    y = rng.randrange(bank.shape[0] - height + 1)
    x = rng.randrange(bank.shape[1] - width + 1)
    return bank[y : y + height, x : x + width]


@functools.cache
def _linear(value: int) -> float:
    share = value / 255
    return share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4


def luminance(colour: RGB) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.1)."""
    return 0.2126 * _linear(colour[0]) + 0.7152 * _linear(colour[1]) + 0.0722 * _linear(colour[2])


def contrast(one: RGB, other: RGB) -> float:
    """Contrast ratio of two colours (WCAG 2.1), 1 to 21."""
    a, b = luminance(one), luminance(other)
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


def needed_contrast(level: float) -> float:
    """The contrast rule: text against both ends of its background has at least this ratio, 9 falling to 3.5."""
    return 9.0 - 5.5 * level


def shifted(rng: random.Random, colour: RGB, amount: int) -> RGB:
    """``colour`` with every channel moved by up to ``amount``."""
    r, g, b = (min(max(c + rng.randint(-amount, amount), 0), 255) for c in colour)
    return r, g, b


def ink_and_paper(rng: random.Random, level: float) -> tuple[RGB, RGB, RGB]:
    """Ink, and the two ends of a background gradient (equal when flat), that keep the contrast rule."""
    need = needed_contrast(level)
    if rng.random() < 0.25 + 0.5 * (1 - level):
        ink, paper = rng.choice((((0, 0, 0), (255, 255, 255)), ((20, 20, 20), (250, 250, 245)), ((255, 255, 255), (0, 0, 0))))
        return ink, paper, paper
    for _ in range(20):
        low, high = (0, 110) if rng.random() < 0.7 else (150, 255)
        ink = rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)
        if rng.random() < 0.2:
            paper = rng.randrange(256), rng.randrange(256), rng.randrange(256)
        elif low:
            paper = rng.randrange(90), rng.randrange(90), rng.randrange(90)
        else:
            paper = rng.randint(185, 255), rng.randint(185, 255), rng.randint(185, 255)
        end = shifted(rng, paper, 40) if rng.random() < 0.3 * level else paper
        if contrast(ink, paper) >= need and contrast(ink, end) >= need:
            return ink, paper, end
    return (0, 0, 0), (255, 255, 255), (255, 255, 255)


def background(rng: random.Random, height: int, width: int, start: RGB, end: RGB, level: float) -> np.ndarray:
    """Flat or gradient float32 [height, width, 3], at higher levels with paper noise or faint lines."""
    canvas = np.empty((height, width, 3), np.float32)
    if start == end:
        canvas[:] = start
    else:
        first, last = np.array(start, np.float32), np.array(end, np.float32)
        if rng.random() < 0.6:
            canvas[:] = first + np.linspace(0, 1, width, dtype=np.float32)[:, None] * (last - first)
        else:
            canvas[:] = (first + np.linspace(0, 1, height, dtype=np.float32)[:, None] * (last - first))[:, None]
    if rng.random() < 0.15 * level:
        canvas += rng.uniform(2, 9) * noise(rng, height, width)[:, :, :1]
    if rng.random() < 0.12 * level:
        shade = rng.choice((-1, 1)) * rng.uniform(8, 26)
        step = rng.randint(6, 20)
        if rng.random() < 0.7:
            canvas[rng.randrange(step) :: step] += shade
        if rng.random() < 0.4:
            canvas[:, rng.randrange(step) :: step] += shade
    return canvas


def paint(canvas: np.ndarray, mask: np.ndarray, colour: RGB) -> None:
    """Blend ``colour`` into float32 ``canvas`` [H, W, 3] where uint8 ``mask`` [H, W] says."""
    alpha = mask[:, :, None] * np.float32(1 / 255)
    canvas += alpha * (np.array(colour, np.float32) - canvas)


def disturb(rng: random.Random, canvas: np.ndarray, level: float) -> np.ndarray:
    """Blur, noise and JPEG on a share of the pictures that grows with ``level``. Returns uint8 [H, W, 3]."""
    if rng.random() < 0.35 * level:
        canvas = canvas + rng.uniform(2, 4 + 14 * level) * noise(rng, *canvas.shape[:2])
    np.clip(canvas, 0, 255, out=canvas)
    pixels = (canvas + 0.5).astype(np.uint8)
    blur, jpeg = rng.random() < 0.2 * level, rng.random() < 0.2 * level
    if blur or jpeg:
        picture = Image.fromarray(pixels)
        if blur:
            picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.4 + 0.5 * level)))
        if jpeg:
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=rng.randint(95 - int(55 * level), 95))
            picture = Image.open(buffer)
        pixels = np.array(picture)
    return pixels
