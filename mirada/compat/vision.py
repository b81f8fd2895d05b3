"""What the faces of the utility packages share: their dictionaries to typed parts, and ``media``'s results to PIL and torch.

T frames, C channels, H, W pixels. Where the originals crash (clips shorter than one interval, aspect ratios that round a side
to nothing) the media room's answer is given instead; pictures are upright (EXIF), which the originals leave to the caller.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as pil

from mirada import config
from mirada.errors import MediaTooLarge, MessageError, SettingsError
from mirada.media.exact import resize_bicubic
from mirada.media.frames import FrameList
from mirada.media.grid import GridRule, fit
from mirada.media.limits import FetchLimits
from mirada.media.prepare import resize_first
from mirada.media.rule import MediaRule, Stage
from mirada.media.sample import check_settings, choose
from mirada.media.slowfast import Typist, frame_sizes
from mirada.media.video import open_video, video_budget
from mirada.types import Image, Video

if TYPE_CHECKING:
    import torch

MAX_BYTES = 8 << 30
"""Most memory for the frames of one video at their original size."""

Ele = Mapping[str, Any]
"""One part of a message, as the originals take it: ``{"type": "image", "image": source, "max_pixels": ...}``."""


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(H, W): multiples of ``factor`` with an area between the bounds. Raises MediaUnsupported (a ValueError) above 200:1."""
    return fit(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels, enlarge=False)


def extract_vision_info(conversations: Sequence[Any]) -> list[dict[str, Any]]:
    """Every part of one chat or of several that holds a picture or video, in order."""
    if conversations and isinstance(conversations[0], Mapping):
        conversations = [conversations]
    found = []
    for chat in conversations:
        for message in chat:
            for part in message["content"] if isinstance(message["content"], list) else ():
                kind = part.get("type", "")
                if any(key in part for key in ("image", "image_url", "video")) or kind in ("image", "image_url", "video"):
                    found.append(part)
    return found


def split(infos: Sequence[Ele]) -> Iterator[tuple[str, Ele]]:
    """("image" or "video", part) for each; MessageError for one that names a kind and holds nothing."""
    for info in infos:
        if "image" in info or "image_url" in info:
            yield "image", info
        elif "video" in info:
            yield "video", info
        else:
            raise MessageError(f"a part of type {info.get('type')!r} holds no source", "give image, image_url or video")


def with_factor(rule: MediaRule, factor: int) -> MediaRule:
    """``rule`` with sides in multiples of ``factor`` pixels."""
    return rule if factor == rule.grid.factor else replace(rule, grid=GridRule(patch=factor, merge=1))


def fetch_image(ele: Ele, rule: MediaRule) -> pil.Image:
    """The RGB picture of ``ele`` after the utility package's resize. Raises MediaError or SettingsError."""
    source = ele["image"] if "image" in ele else ele["image_url"]
    if isinstance(source, Mapping):
        source = source["url"]
    return resize_first(Image(source, **_settings(Image, ele)), rule)


def fetch_uniform(ele: Ele, rule: MediaRule) -> tuple[torch.Tensor | list[pil.Image], float]:
    """Evenly sampled frames and their rate: float32 tensor [T, C, H, W] in 0..255, or PIL images for a list of frames."""
    part = Video(ele["video"], **_settings(Video, ele))
    if isinstance(part.source, list | tuple):
        listed = FrameList(part, rule, FetchLimits())
        choice = listed.choose(part)
        return [pil.fromarray(frame) for frame in listed.read(choice.indices.tolist())], listed.timeline.rate
    check_settings(part)
    with closing(open_video(part.source)) as reader:
        choice = choose(reader.timeline, part, rule)
        size = video_budget(len(choice.indices), *reader.size, part, rule)
        frames = _stack(
            (resize_bicubic(frame, size) for frame in reader.read(choice.indices.tolist())), len(choice.indices), size
        )
    return frames.float(), choice.fps


def fetch_slow_fast(ele: Ele, rule: MediaRule) -> tuple[torch.Tensor, dict[str, Any]]:
    """Sampled frames at their original size, uint8 [T, C, H, W], and what the Keye-VL-1.5 processor needs to know of them."""
    import torch

    total = ele.get("total_pixels", ele.get("video_total_pixels"))
    part = Video(ele["video"], **{**_settings(Video, ele), "total_pixels": total})
    listed = isinstance(part.source, list | tuple)
    if listed:
        stage = Stage(rule.frame_min_pixels, rule.frame_max_pixels)
        frames = [fetch_image(f, replace(rule, first=stage)) if isinstance(f, Mapping) else f for f in part.source]
        part = replace(part, source=frames)
    check_settings(part if not listed else replace(part, fps=None))
    with closing(FrameList(part, rule, FetchLimits()) if listed else open_video(part.source)) as reader:
        choice = reader.choose(part) if isinstance(reader, FrameList) else choose(reader.timeline, part, rule)
        typist = Typist(rule, rule.min_frame_similarity if part.min_frame_similarity is None else part.min_frame_similarity)
        num = len(choice.indices)

        def typed() -> Iterator[np.ndarray]:
            for frame in reader.read(choice.indices.tolist()):
                typist.is_fast(frame)
                yield frame

        pixels = _stack(typed(), num, (reader.size[0], reader.size[1]))
        num_fast, (high, wide) = sum(typist.fast), reader.size
        free = replace(part, resized_height=None, resized_width=None)  # the original does not know these of a video
        slow, fast = frame_sizes((high, wide), (num - num_fast, num_fast), free, rule)
        kwargs: dict[str, Any] = {"height": slow[0], "width": slow[1], "fast_height": fast[0], "fast_width": fast[1]}
        if not listed or part.fps is not None:
            kwargs["timestamps"] = torch.tensor(reader.timeline.timestamps(choice.indices), dtype=torch.float32)
        kwargs["frame_types"] = torch.tensor(typist.fast, dtype=torch.int32)
    return pixels, kwargs


def process_uniform(
    conversations: Sequence[Any], fetch_image: Callable, fetch_video: Callable, return_video_kwargs: bool
) -> tuple[Any, ...]:
    """(images or None, videos or None), and ``{"fps": [rate of each video]}`` if asked."""
    images, videos, rates = [], [], []
    for kind, info in split(extract_vision_info(conversations)):
        if kind == "image":
            images.append(fetch_image(info))
        else:
            frames, rate = fetch_video(info, return_video_sample_fps=True)
            videos.append(frames)
            rates.append(rate)
    made = (images or None, videos or None)
    return (*made, {"fps": rates}) if return_video_kwargs else made


def total_pixels(default: int) -> int:
    """The budget of one video: the environment variable ``VIDEO_MAX_PIXELS`` (the originals' name for it), or ``default``."""
    value = config.env("VIDEO_MAX_PIXELS")
    if value is None:
        return default
    try:
        return max(1, int(float(value)))
    except ValueError as error:
        raise SettingsError(
            f"VIDEO_MAX_PIXELS={value!r} is not a number", "give the pixels of all frames of a video"
        ) from error


def note_reader(variable: str) -> None:
    """Warn if ``variable`` asks for a video reader: there is one, PyAV, and it is always used."""
    value = config.env(variable)
    if value is not None:
        warnings.warn(f"{variable}={value} has no effect: Mirada always reads videos with PyAV", stacklevel=3)


def _settings(cls: type, ele: Ele) -> dict[str, Any]:
    names = (field.name for field in fields(cls) if field.name != "source")
    return {name: ele[name] for name in names if ele.get(name) is not None}


def _stack(frames: Iterator[np.ndarray], num: int, size: tuple[int, int]) -> torch.Tensor:
    """uint8 [T, C, H, W], filled frame by frame."""
    import torch

    if num * size[0] * size[1] * 3 > MAX_BYTES:
        raise MediaTooLarge(
            f"{num} frames of {size[1]}x{size[0]} take {num * size[0] * size[1] * 3:,} bytes, more than {MAX_BYTES:,}",
            "lower fps or max_frames, or hand the video to VLM, which never holds frames at their full size",
        )
    made = torch.empty((num, 3, *size), dtype=torch.uint8)
    for index, frame in enumerate(frames):
        made[index] = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1)))
    return made
