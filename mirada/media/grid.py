"""Pixel budgets to patch grids, and pictures to patches: the only resize arithmetic.

H, W pixels; h, w patches; P patch side; C channels; f frames that one patch spans. Patches are uint8 and come frame after
frame; inside a frame row after row or, in merged order, square after square.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mirada.errors import ContextOverflow, MediaUnsupported
from mirada.types import Grid

MAX_RATIO = 200


@dataclass(frozen=True, slots=True)
class GridRule:
    """How a family turns a picture into patches. ``min_pixels`` / ``max_pixels`` bound the resized area."""

    patch: int = 14
    merge: int = 2
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 1280 * 28 * 28
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    frames: int = 1
    """Frames that one patch spans; a picture, and a last frame left over, is repeated to fill it."""
    merged_order: bool = False
    """The patches that become one token follow one another, instead of row after row over the whole frame."""
    enlarge: bool = True
    """Scale sides below one cell up with their ratio kept (Keye); False: stretch them to one cell (Qwen2-VL)."""
    border: Literal["stretch", "pad", "crop"] = "stretch"
    """How sides become whole cells: with a resize to the nearest multiple, or, after one that keeps the ratio, by black pixels
    to the right and below, or by cutting around the centre to whole patches (Kimi-VL, whose releases pad)."""
    max_side: int | None = None
    """Most patches on a side."""

    @property
    def factor(self) -> int:
        return self.patch * self.merge

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """The size that the image processor gives a picture: :func:`fit` with this rule's bounds, or ``shrink`` and the
        border. Raises MediaUnsupported for a picture that cannot be given one."""
        if self.border == "stretch":
            return fit(
                height, width, factor=self.factor, min_pixels=self.min_pixels, max_pixels=self.max_pixels, enlarge=self.enlarge
            )
        high, wide = self.shrink(height, width)
        if self.border == "pad":
            high, wide = -(-high // self.factor) * self.factor, -(-wide // self.factor) * self.factor
        else:
            high, wide = _whole(high, self.patch, self.factor), _whole(wide, self.patch, self.factor)
        if self.max_side is not None and max(high, wide) // self.patch > self.max_side:
            raise MediaUnsupported(
                f"a picture of {width}x{height} pixels has more than {self.max_side} patches of {self.patch} pixels on a side",
                "crop it to a shorter strip",
            )
        return high, wide

    def shrink(self, height: int, width: int) -> tuple[int, int]:
        """The size to which a picture is resized before its border, ratio kept, fractions cut.

        It changes only where whole patches are more than ``max_pixels`` hold (after the border they may be a few more), or
        pixels fewer than ``min_pixels`` (Kimi-VL ``image_processing_kimi_vl.py`` rescale, which has no lower bound).
        """
        if height < 1 or width < 1:
            raise MediaUnsupported(f"a picture of {width}x{height} pixels is empty", "give one with at least one pixel a side")
        count, most = (width // self.patch) * (height // self.patch), max(1, self.max_pixels // self.patch**2)
        scale = 1.0
        if count > most:
            scale = math.sqrt(most / count)
        elif height * width < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
        return max(1, int(height * scale)), max(1, int(width * scale))

    def frame(self, picture: np.ndarray, height: int, width: int) -> np.ndarray:
        """uint8 [H, W, C] of ``shrink``'s size -> [height, width, C]: black pixels to the right and below, or cut around the
        centre (an odd one to the bottom or right by rounding half to even, as torchvision cuts)."""
        high, wide = picture.shape[:2]
        if self.border == "pad":
            return np.pad(picture, ((0, height - high), (0, width - wide), (0, 0)))
        top, left = round((high - height) / 2), round((wide - width) / 2)
        return picture[top : top + height, left : left + width]

    def patchify(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, C] -> uint8 [N, C, P, P], or [N, C, f, P, P] where patches span f > 1 frames."""
        if missing := -len(frames) % self.frames:
            frames = np.concatenate([frames, np.repeat(frames[-1:], missing, 0)])
        return patchify(frames, self.patch, self.frames, self.merge if self.merged_order else 1)


@dataclass(frozen=True, slots=True)
class Patches:
    """One prepared picture or video.

    ``pixels`` uint8 [N, C, P, P], or [N, C, f, P, P] where patches span f frames; ``grids`` one (t, h, w) per run of equal
    frames (or of groups of f frames), in order, with sum(t*h*w) == N.
    ``size`` (height, width) of the original after orientation; ``key`` 32 bytes over pixels, grids and rule.
    """

    kind: Literal["image", "video"]
    pixels: np.ndarray
    grids: tuple[Grid, ...]
    size: tuple[int, int]
    key: bytes
    timestamps: tuple[float, ...] | None = None
    """Seconds of each frame used (video)."""
    fast: tuple[bool, ...] | None = None
    """Per frame: True where slow-fast chose the small size (video)."""
    fps: float | None = None
    """Rate of the sampled frames (video)."""
    notes: tuple[str, ...] = field(default=())
    """What was done on the caller's behalf (clamped, deprecated variable read, ...)."""
    resized: tuple[int, int] | None = None
    """(height, width) after its resize, before a border was added or cut away; None: what the grids say."""

    @property
    def num_frames(self) -> int:
        """Frames, with those that were repeated to fill a patch."""
        return sum(t for t, _, _ in self.grids) * (self.pixels.shape[2] if self.pixels.ndim == 5 else 1)

    def num_tokens(self, merge: int) -> int:
        """Tokens of a prompt that it becomes, each of ``merge`` x ``merge`` patches."""
        return sum(t * h * w for t, h, w in self.grids) // merge**2


class Room:
    """How many tokens of a prompt the media of one request may become; ``most`` None: any number."""

    def __init__(self, most: int | None) -> None:
        self.most, self.used = most, 0

    @property
    def left(self) -> int | None:
        return None if self.most is None else max(0, self.most - self.used)

    def check(self, tokens: int, name: str) -> None:
        """Raise ContextOverflow unless there is room for ``tokens`` more, those of ``name``."""
        if self.most is None or self.used + tokens <= self.most:
            return
        before = f" ({self.used:,} are taken by what comes before)" if self.used else ""
        raise ContextOverflow(
            f"{name} would become at least {tokens:,} tokens, and the model's context has room for {self.most:,}{before}",
            "lower max_pixels (for a video also fps, nframes or total_pixels), or send fewer",
            needed=self.used + tokens, available=self.most, unit="tokens",
        )  # fmt: skip

    def take(self, tokens: int, name: str) -> None:
        """``check``, and count them."""
        self.check(tokens, name)
        self.used += tokens


def _whole(side: int, patch: int, factor: int) -> int:
    """``side`` cut to whole patches; MediaUnsupported unless they are whole cells too."""
    made = side // patch * patch
    if not made or made % factor:
        raise MediaUnsupported(
            f"a side of {side} pixels is cut to {made}, which is no multiple of {factor}",
            "crop or pad the picture, or set pad_input in preprocessor_config.json",
        )
    return made


def fit(height: int, width: int, *, factor: int, min_pixels: float, max_pixels: float, enlarge: bool = True) -> tuple[int, int]:
    """Smallest change of (height, width) to multiples of ``factor`` with an area between the bounds.

    ``enlarge`` first scales sides below ``factor`` up with their ratio kept, as Keye's image processor does
    (Keye ``image_processing_keye.py`` smart_resize); without it sides are clamped, as qwen-vl-utils and keye-vl-utils do.
    Rounding is to even (Python ``round``). Raises MediaUnsupported above a ratio of 200.
    """
    if height < 1 or width < 1:
        raise MediaUnsupported(f"a picture of {width}x{height} pixels is empty", "give one with at least one pixel a side")
    if enlarge:
        height, width = _enlarge(height, width, factor)
    if max(height, width) / min(height, width) > MAX_RATIO:
        raise MediaUnsupported(
            f"the sides {width}x{height} differ by more than {MAX_RATIO} times", "crop or pad the picture to a wider strip"
        )
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if not enlarge:
        high, wide = max(factor, high), max(factor, wide)
    if high * wide > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        high, wide = _steps(height / beta, factor, math.floor), _steps(width / beta, factor, math.floor)
    elif high * wide < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        high, wide = _steps(height * beta, factor, math.ceil), _steps(width * beta, factor, math.ceil)
    return high, wide


def _enlarge(height: int, width: int, factor: int) -> tuple[int, int]:
    if height < factor:
        height, width = factor, round(width * factor / height)
    if width < factor:
        height, width = round(height * factor / width), factor
    return height, width


def _steps(side: float, factor: int, rounding) -> int:
    # A strip at the upper bound may round down to nothing; one step is the least that can be cut into patches.
    return max(factor, rounding(side / factor) * factor)


def patchify(frames: np.ndarray, patch: int, span: int = 1, square: int = 1) -> np.ndarray:
    """uint8 [T, H, W, C] -> uint8 [T*h*w, C, P, P], row-major.

    With ``span`` > 1 a patch goes through that many frames: [T/span*h*w, C, span, P, P]. With ``square`` > 1 the patches of a
    square of that side follow one another (Qwen2-VL: transformers ``image_processing_qwen2_vl.py``).
    """
    total, high, wide, channels = frames.shape
    t, h, w = total // span, high // patch, wide // patch
    shape = (t, span, h // square, square, patch, w // square, square, patch, channels)
    cut = frames.reshape(shape).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    depth = (span,) if span > 1 else ()
    return np.ascontiguousarray(cut).reshape(t * h * w, channels, *depth, patch, patch)


def normalise(pixels: np.ndarray, rule: GridRule) -> np.ndarray:
    """uint8 patches -> float32, with the reference's order of roundings (float64 rescale, float32 normalise)."""
    table = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    channels = (-1, *[1] * (pixels.ndim - 2))
    mean = np.asarray(rule.mean, np.float32).reshape(channels)
    std = np.asarray(rule.std, np.float32).reshape(channels)
    return (table[pixels] - mean) / std


def denormalise(values: np.ndarray, rule: GridRule, tolerance: float = 1e-4) -> np.ndarray:
    """The uint8 patches that :func:`normalise` made float ``values`` [N, C, ...] of.

    Raises MediaUnsupported if a value is further than ``tolerance`` from that of every byte: it is no picture's.
    """
    channels = (-1, *[1] * (values.ndim - 2))
    mean = np.asarray(rule.mean, np.float32).reshape(channels)
    std = np.asarray(rule.std, np.float32).reshape(channels)
    scaled = np.nan_to_num((values.astype(np.float32) * std + mean) * 255)
    made = np.rint(scaled).clip(0, 255).astype(np.uint8)
    if not (np.abs(normalise(made, rule) - values) <= tolerance).all():  # also for NaN
        raise MediaUnsupported(
            "the pixel values are not those of pictures of 8 bits a channel",
            "give what the processor of this model made, unchanged but for its type",
        )
    return made


def content_key(pixels: np.ndarray, *facts: object) -> bytes:
    """256-bit hash of pixels and whatever else decides their features."""
    digest = hashlib.blake2b(repr((pixels.shape, facts)).encode(), digest_size=32)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()
