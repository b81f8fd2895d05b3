"""``keye_vl_utils`` 1.5.2 (Keye-VL-1.5): ``from mirada.compat.keye_vl_utils import process_vision_info``.

Follows the package ``keye-vl-utils`` 1.5.2 on PyPI: alpha is dropped, videos are slow-fast and stay at their original size,
and ``process_vision_info`` always returns three values. For the two or three values of 1.0.0 (Keye-VL-8B-Preview) either
import :mod:`mirada.compat.keye_vl_utils_1_0`, or call ``process_vision_info(..., version="1.0.0")``; giving
``return_video_kwargs``, which only 1.0.0 has, means the same. Errors are ``MediaError`` and ``SettingsError`` (ValueErrors).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from mirada.compat import keye_vl_utils_1_0, vision
from mirada.compat.vision import Ele, extract_vision_info
from mirada.errors import MessageError, SettingsError, nearest
from mirada.media.rule import KEYE_15

if TYPE_CHECKING:
    import torch

__all__ = ["extract_vision_info", "fetch_image", "fetch_video", "process_vision_info", "smart_resize"]

IMAGE_FACTOR = 28
MIN_PIXELS = 4 * 28 * 28
MAX_PIXELS = 20480 * 28 * 28
VIDEO_MIN_PIXELS = 48 * 28 * 28
VIDEO_MAX_PIXELS = 768 * 28 * 28
VIDEO_TOTAL_PIXELS = 65536 * 28 * 28
FPS = 2.0
FAST_TOKEN_RATIO = 0.3
MIN_FRAME_SIMILARITY = 0.9
VERSIONS = ("1.0.0", "1.5.2")

RULE = replace(KEYE_15, alpha="drop")


def smart_resize(
    height: int, width: int, factor: int = IMAGE_FACTOR, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """(H, W): multiples of ``factor``, ratio kept as far as that allows, area within the bounds. ValueError above 200:1."""
    return vision.smart_resize(height, width, factor, min_pixels, max_pixels)


def fetch_image(ele: Ele, size_factor: int = IMAGE_FACTOR) -> Image.Image:
    """The RGB picture of ``{"image": source, ...}`` after the first resize."""
    return vision.fetch_image(ele, vision.with_factor(RULE, size_factor))


def fetch_video(ele: Ele, image_factor: int = IMAGE_FACTOR) -> tuple[torch.Tensor, dict[str, Any]]:
    """uint8 [T, C, H, W] at the original size, and ``{height, width, fast_height, fast_width, timestamps, frame_types}``.

    ``timestamps`` float32 [T] seconds (absent for a list of frames without fps), ``frame_types`` int32 [T], 1 for fast.
    """
    vision.note_reader("FORCE_KEYEVL_VIDEO_READER")
    return vision.fetch_slow_fast(ele, vision.with_factor(RULE, image_factor))


def process_vision_info(
    conversations: Sequence[Any] | None = None,
    vision_infos: Sequence[Ele] | None = None,
    image_factor: int = IMAGE_FACTOR,
    *,
    return_video_kwargs: bool | None = None,
    version: str | None = None,
) -> tuple[Any, ...]:
    """(images or None, videos or None, lists of the video settings by name) of one chat or several.

    As version 1.0.0: (images or None, videos or None), and with ``return_video_kwargs`` also ``{"fps": [rate, ...]}``.
    """
    if version is not None and version not in VERSIONS:
        raise SettingsError(f"keye_vl_utils has no version {version!r} here", nearest(version, VERSIONS))
    if conversations is None and vision_infos is None:
        raise MessageError("process_vision_info was given nothing", "give conversations or vision_infos")
    if version == "1.0.0" or (version is None and return_video_kwargs is not None):
        chats = conversations if vision_infos is None else [{"role": "user", "content": list(vision_infos)}]
        return keye_vl_utils_1_0.process_vision_info(chats or [], bool(return_video_kwargs))
    images: list[Image.Image] = []
    videos: list[torch.Tensor] = []
    kwargs: dict[str, list[Any]] = defaultdict(list)
    for kind, info in vision.split(extract_vision_info(conversations or []) if vision_infos is None else vision_infos):
        if kind == "image":
            images.append(fetch_image(info, image_factor))
        else:
            frames, facts = fetch_video(info, image_factor)
            videos.append(frames)
            for name, value in facts.items():
                kwargs[name].append(value)
    return images or None, videos or None, kwargs
