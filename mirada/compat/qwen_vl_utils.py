"""``qwen_vl_utils`` on Mirada's media: ``from mirada.compat.qwen_vl_utils import process_vision_info``.

Follows qwen-vl-utils 0.0.8 (github.com/QwenLM/Qwen2-VL, ``qwen-vl-utils/src/qwen_vl_utils/vision_process.py``): alpha is
dropped, frame counts round to the nearest multiple of two. ``return_video_kwargs`` is that of later versions, and so is the
environment variable ``VIDEO_MAX_PIXELS`` (pixels of all frames of one video). ``FORCE_QWENVL_VIDEO_READER`` is noted and
has no effect. Errors are ``MediaError`` and ``SettingsError``, both ValueErrors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from mirada.compat import vision
from mirada.compat.vision import Ele, extract_vision_info
from mirada.media.rule import MediaRule, Stage

if TYPE_CHECKING:
    import torch

__all__ = ["extract_vision_info", "fetch_image", "fetch_video", "process_vision_info", "smart_resize"]

IMAGE_FACTOR = 28
MIN_PIXELS = 4 * 28 * 28
MAX_PIXELS = 16384 * 28 * 28
VIDEO_MIN_PIXELS = 128 * 28 * 28
VIDEO_MAX_PIXELS = 768 * 28 * 28
VIDEO_TOTAL_PIXELS = 24576 * 28 * 28
FRAME_FACTOR = 2
FPS = 2.0
FPS_MIN_FRAMES = 4
FPS_MAX_FRAMES = 768

RULE = MediaRule(
    first=Stage(MIN_PIXELS, MAX_PIXELS),
    alpha="drop",
    frame_rounding="nearest",
    frame_min_pixels=VIDEO_MIN_PIXELS,
    frame_max_pixels=VIDEO_MAX_PIXELS,
    total_pixels=VIDEO_TOTAL_PIXELS,
)


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
    vision.note_reader("FORCE_QWENVL_VIDEO_READER")
    rule = replace(vision.with_factor(RULE, image_factor), total_pixels=vision.total_pixels(VIDEO_TOTAL_PIXELS))
    if ele.get("max_pixels") is not None:  # 0.0.8 lets it override the budget of the whole video
        rule = replace(rule, frame_max_pixels=ele["max_pixels"], total_pixels=1 << 62)
    frames, fps = vision.fetch_uniform(ele, rule)
    return (frames, fps) if return_video_sample_fps else frames


def process_vision_info(conversations: Sequence[Any], return_video_kwargs: bool = False) -> tuple[Any, ...]:
    """(images or None, videos or None) of one chat or several; ``return_video_kwargs`` adds ``{"fps": [rate, ...]}``."""
    return vision.process_uniform(conversations, fetch_image, fetch_video, return_video_kwargs)
