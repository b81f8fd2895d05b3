"""Keye-VL-1.5 slow-fast: which frames are new (slow, large) and which repeat the latest slow one (fast, small).

Ported in arithmetic from ``keye-vl-utils`` 1.5.2 (PyPI), ``vision_process.py``. One frame at a time: only the patches of
the latest slow frame are kept. H, W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mirada.media.exact import resize_bilinear, rgb_to_hsv
from mirada.media.grid import fit
from mirada.media.rule import MediaRule
from mirada.types import Video

SIMILAR_PATCH = 0.7
"""Cosine above which two patches count as similar."""
COMPARED_TOKENS = 256
"""Most cells of a frame when frames are compared."""


@dataclass(frozen=True, slots=True)
class Look:
    """What is kept of a frame to compare others with: ``patches`` float32 [cells, 3 * factor**2] of HSV, ``norms`` [cells]."""

    patches: np.ndarray
    norms: np.ndarray


def compared_size(height: int, width: int, rule: MediaRule) -> tuple[int, int]:
    """The size at which frames are compared."""
    factor = rule.grid.factor
    most = COMPARED_TOKENS * factor * factor
    return fit(height, width, factor=factor, min_pixels=rule.frame_min_pixels, max_pixels=most, enlarge=False)


def look(frame: np.ndarray, rule: MediaRule) -> Look:
    """uint8 [H, W, 3] at original size -> its patches in HSV at :func:`compared_size`."""
    factor = rule.grid.factor
    small = rgb_to_hsv(resize_bilinear(frame, compared_size(frame.shape[0], frame.shape[1], rule)))
    high, wide = small.shape[0] // factor, small.shape[1] // factor
    cut = small.reshape(high, factor, wide, factor, 3).transpose(0, 2, 4, 1, 3)
    patches = cut.reshape(high * wide, -1).astype(np.float32)
    # Sums of squares of bytes: exact in float64, at most 153 million.
    return Look(patches, np.sqrt(np.einsum("pi,pi->p", patches, patches, dtype=np.float64)))


def similarity(one: Look, other: Look) -> float:
    """Share of patches whose cosine is above 0.7, over the patches that are not black in both frames.

    Two wholly black frames: 1.0 (the reference divides by zero, gets NaN, and so types the second as fast too).
    """
    seen = (one.norms > 0) | (other.norms > 0)
    if not seen.any():
        return 1.0
    dots = np.einsum("pi,pi->p", one.patches, other.patches, dtype=np.float64)
    cosines = dots / ((one.norms + 1e-8) * (other.norms + 1e-8))
    return float(np.mean(cosines[seen] > SIMILAR_PATCH))


@dataclass
class Typist:
    """Types frames in order: :meth:`is_fast` compares each with the latest slow one. The first is slow."""

    rule: MediaRule
    threshold: float
    similarities: list[tuple[int, int, float]] = field(default_factory=list)
    """(latest slow frame, frame, similarity) of every comparison."""
    fast: list[bool] = field(default_factory=list)
    _slow: tuple[int, Look] | None = None

    def is_fast(self, frame: np.ndarray) -> bool:
        """Type the next frame (uint8 [H, W, 3])."""
        index, seen = len(self.fast), look(frame, self.rule)
        fast = False
        if self._slow is not None:
            alike = similarity(self._slow[1], seen)
            self.similarities.append((self._slow[0], index, alike))
            fast = alike >= self.threshold
        if not fast:
            self._slow = (index, seen)
        self.fast.append(fast)
        return fast


def frame_sizes(
    size: tuple[int, int], counts: tuple[int, int], part: Video, rule: MediaRule
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes (H, W) of slow and of fast frames of a video of ``size``, ``counts`` = (number of slow, number of fast) frames.

    A binary search over tokens of a slow frame, a fast one taking ``fast_ratio`` of it but no less than the least. As in the
    reference, the search ends at the first value that exceeds the budget (or at the maximum), so that the budget can be
    overshot by one step.
    """
    factor = rule.grid.factor
    cell = factor * factor
    height, width = size
    min_pixels = max(int(part.min_pixels or 0), rule.frame_min_pixels)
    if part.resized_height is not None and part.resized_width is not None:
        stage = rule.first or rule.grid
        slow = fit(
            part.resized_height,
            part.resized_width,
            factor=factor,
            min_pixels=stage.min_pixels,
            max_pixels=stage.max_pixels,
            enlarge=False,
        )
    else:
        most = _slow_tokens(*counts, min_pixels, part, rule) * cell
        slow = fit(height, width, factor=factor, min_pixels=min_pixels, max_pixels=most, enlarge=False)
    fast_most = max(int(slow[0] * slow[1] / cell * rule.fast_ratio) * cell, rule.frame_min_pixels)
    fast = fit(height, width, factor=factor, min_pixels=min_pixels, max_pixels=fast_most, enlarge=False)
    return slow, fast


def _slow_tokens(num_slow: int, num_fast: int, min_pixels: int, part: Video, rule: MediaRule) -> float:
    cell = rule.grid.factor**2
    budget = rule.total_pixels if part.total_pixels is None else part.total_pixels
    least = int(min_pixels / cell)
    left, right = min_pixels / cell, (rule.frame_max_pixels if part.max_pixels is None else part.max_pixels) / cell
    while left < right:
        middle = int(left + right) // 2
        tokens = num_slow * middle + num_fast * max(int(rule.fast_ratio * middle), least)
        if tokens * cell > budget:
            right = middle
        else:
            left = middle + 1
    return left
