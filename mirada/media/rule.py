"""All that a model family says of its media, as one frozen value.

Families build theirs from one of the presets with ``dataclasses.replace`` (the bounds of ``grid`` come from the
checkpoint's ``preprocessor_config.json``). The numbers of the presets that no checkpoint file holds are those of the
families' utility packages: ``keye-vl-utils`` 1.0.0 (Preview) and 1.5.2 (Keye-VL-1.5), ``qwen-vl-utils`` 0.0.8 (Qwen2-VL), all
on PyPI.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from mirada.errors import SettingsError
from mirada.media.grid import GridRule

Alpha = Literal["white", "white_rgba", "drop"]
Resample = Literal["bicubic", "bilinear"]
_CELL = 28 * 28


@dataclass(frozen=True, slots=True)
class Stage:
    """A resize that comes before the image processor's own: sides clamped to multiples of the grid's factor."""

    min_pixels: int = 4 * _CELL
    max_pixels: int = 16384 * _CELL


@dataclass(frozen=True, slots=True)
class MediaRule:
    """How a family turns pictures and videos into patches. Areas in pixels, times in seconds.

    ``grid`` is the image processor (its bounds apply last, to every picture and frame); ``first`` the resize of the
    utility package before it, which settings of one picture override (``None``: there is none, they override ``grid``).
    """

    grid: GridRule = field(default_factory=GridRule)
    first: Stage | None = None
    resample: Resample = "bicubic"
    width_first: bool = True
    """Resize the width, then the height, as Pillow did up to 12 and so as the families saw their pictures; False: in the
    order of the installed Pillow. Pillow 13 swaps them where only the height shrinks, and values differ by up to 17."""
    alpha: Alpha = "white"
    """``white``: whatever has transparency is laid on white. ``white_rgba``: only mode RGBA is, the rest lose their
    alpha (keye-vl-utils 1.0.0). ``drop``: alpha is dropped (1.5.2)."""

    video: Literal["uniform", "slowfast"] | None = "uniform"
    """How frames are chosen; ``None``: the family takes no videos."""
    fps: float = 2.0
    """Frames per second to sample when nothing is asked."""
    min_frames: int = 4
    max_frames: int | None = 768
    """``None``: as many as ``total_pixels`` holds at ``frame_min_pixels``."""
    frame_multiple: int = 2
    """Number of frames is rounded to a multiple of this."""
    frame_rounding: Literal["down", "nearest"] = "down"
    """``nearest``: as qwen-vl-utils 0.0.8 rounds."""
    max_pixels_wins: bool = False
    """What a video asks for as ``max_pixels`` of a frame holds even past its total budget (qwen-vl-utils 0.0.8)."""
    frame_min_pixels: int = 128 * _CELL
    frame_max_pixels: int = 768 * _CELL
    total_pixels: int = 115200 * _CELL
    """Budget over all frames of one video."""
    fast_ratio: float = 0.3
    """Slow-fast: tokens of a fast frame as a share of a slow frame's."""
    min_frame_similarity: float = 0.9
    """Slow-fast: a frame less similar to the latest slow frame than this starts a new slow one."""

    def bounded(self, min_pixels: int | None = None, max_pixels: int | None = None) -> MediaRule:
        """This rule with other bounds of the image processor (``None`` keeps one). Raises SettingsError if they cross."""
        low = self.grid.min_pixels if min_pixels is None else min_pixels
        high = self.grid.max_pixels if max_pixels is None else max_pixels
        check_bounds(low, high, self.grid.factor)
        return replace(self, grid=replace(self.grid, min_pixels=low, max_pixels=high))

    def check_resize(self, size: tuple[int, int], original: tuple[int, int]) -> None:
        """Raise SettingsError for a resize of a picture or frame to far more pixels than it has and than this model ever takes:
        only ``min_pixels`` can ask for that, and nothing of it would reach the model. Sizes are (height, width)."""
        first = 0 if self.first is None else self.first.max_pixels
        most = max(original[0] * original[1], self.grid.max_pixels, self.frame_max_pixels, first)
        if size[0] * size[1] > 2 * most:
            raise SettingsError(
                f"min_pixels would enlarge {original[1]}x{original[0]} pixels to {size[1]}x{size[0]}, and this model takes at"
                f" most {self.grid.max_pixels:,}", "lower min_pixels"
            )  # fmt: skip


def check_bounds(min_pixels: int, max_pixels: int, factor: int) -> None:
    """Raise SettingsError unless 1 <= min_pixels <= max_pixels and one cell of ``factor`` pixels a side fits."""
    for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingsError(
                f"{name}={value!r} is not a positive whole number of pixels", f"give an area, e.g. {256 * _CELL}"
            )
    if max_pixels < factor * factor:
        raise SettingsError(f"max_pixels={max_pixels} is less than one cell", f"give at least {factor * factor}")
    if min_pixels > max_pixels:
        raise SettingsError(f"min_pixels={min_pixels} is above max_pixels={max_pixels}", "lower min_pixels or raise max_pixels")


KEYE_PREVIEW = MediaRule(first=Stage())
"""Keye-VL-8B-Preview with keye-vl-utils 1.0.0."""

KEYE_15 = MediaRule(
    first=Stage(max_pixels=20480 * _CELL),
    video="slowfast",
    min_frames=1,
    max_frames=None,
    frame_multiple=1,
    frame_min_pixels=48 * _CELL,
    total_pixels=65536 * _CELL,
)
"""Keye-VL-1.5 with keye-vl-utils 1.5.2, but for its dropped alpha."""

KEYE_671B = replace(KEYE_15, grid=GridRule(min_pixels=102400, max_pixels=4096 * _CELL), total_pixels=8192 * _CELL)
"""Keye-VL-671B-A37B, with the bounds of its serving code (Keye's SGLang fork, ``multimodal/processors/keye.py``)."""

KIMI = MediaRule(grid=GridRule(min_pixels=1, max_pixels=4096 * 14 * 14, border="pad", max_side=511), video=None)
"""Kimi-VL-A3B-Instruct and -Thinking, but for their dropped alpha; Thinking-2506 allows 16384 patches (its
``preprocessor_config.json`` says so)."""

QWEN2_VL = MediaRule(
    grid=GridRule(
        max_pixels=16384 * _CELL,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        frames=2,
        merged_order=True,
        enlarge=False,
    ),
    first=Stage(),
    width_first=False,
    frame_rounding="nearest",
    max_pixels_wins=True,
    total_pixels=24576 * _CELL,
)
"""Qwen2-VL with qwen-vl-utils 0.0.8, but for its dropped alpha. Later versions changed which frames a model sees; 0.0.8 is the
package that stood beside Qwen2-VL when it was released. Passes of a resize come in the order of the installed Pillow, so that
pixels equal those of transformers' processor beside it."""

QWEN2_VL_LATER = replace(QWEN2_VL, frame_rounding="down", max_pixels_wins=False, total_pixels=int(128000 * _CELL * 0.9))
"""Qwen2-VL with qwen-vl-utils 0.0.11 to 0.0.14: the number of frames is rounded down to whole pairs (90 frames at 25 a second
give 6, not 8), the budget of a video is larger, and ``max_pixels`` stays within it."""
