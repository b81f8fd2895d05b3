"""``keye_vl_utils`` 1.0.0 (Keye-VL-8B-Preview): ``import mirada.compat.keye_vl_utils_1_0 as keye_vl_utils``.

Follows github.com/Kwai-Keye/Keye, ``keye-vl-utils/src/keye_vl_utils/vision_process.py``: RGBA is laid on white, frame counts
round down to a multiple of two. ``VIDEO_MAX_PIXELS`` in the environment is the budget of pixels over all frames of a video;
``FORCE_KEYEVL_VIDEO_READER`` is noted and has no effect. Errors are ``MediaError`` and ``SettingsError``, both ValueErrors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from mirada.compat import vision
from mirada.compat.vision import Ele, extract_vision_info
from mirada.media.rule import KEYE_PREVIEW

if TYPE_CHECKING:
    import torch

__all__ = ["extract_vision_info", "fetch_image", "fetch_video", "process_vision_info", "smart_resize"]

IMAGE_FACTOR = 28
MIN_PIXELS = 4 * 28 * 28
MAX_PIXELS = 16384 * 28 * 28
VIDEO_MIN_PIXELS = 128 * 28 * 28
VIDEO_MAX_PIXELS = 768 * 28 * 28
FRAME_FACTOR = 2
FPS = 2.0
FPS_MIN_FRAMES = 4
FPS_MAX_FRAMES = 768

RULE = replace(KEYE_PREVIEW, alpha="white_rgba")


def smart_resize(
    height: int, width: int, factor: int = IMAGE_FACTOR, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """(H, W): multiples of ``factor``, ratio kept as far as that allows, area within the bounds. ValueError above 200:1."""
    return vision.smart_resize(height, width, factor, min_pixels, max_pixels)


def fetch_image(ele: Ele, size_factor: int = IMAGE_FACTOR) -> Image.Image:
    """The RGB picture of ``{"image": source, ...}`` after the first resize."""
    return vision.fetch_image(ele, vision.with_factor(RULE, size_factor))


def fetch_video(
    ele: Ele, image_factor: int = IMAGE_FACTOR, return_video_sample_fps: bool = False
) -> torch.Tensor | list[Image.Image] | tuple[torch.Tensor | list[Image.Image], float]:
    """float32 tensor [T, C, H, W] in 0..255, or PIL images for a list of frames; with the rate of the frames if asked."""
    vision.note_reader("FORCE_KEYEVL_VIDEO_READER")
    rule = replace(vision.with_factor(RULE, image_factor), total_pixels=vision.total_pixels(RULE.total_pixels))
    frames, fps = vision.fetch_uniform(ele, rule)
    return (frames, fps) if return_video_sample_fps else frames


def process_vision_info(conversations: Sequence[Any], return_video_kwargs: bool = False) -> tuple[Any, ...]:
    """(images or None, videos or None) of one chat or several; ``return_video_kwargs`` adds ``{"fps": [rate, ...]}``."""
    return vision.process_uniform(conversations, fetch_image, fetch_video, return_video_kwargs)
