"""A video in, patches out: choose frames, decode only those, resize and cut each as it comes.

Nothing holds all frames at full size: what grows with the video is the patches that are returned, which the pixel budget
bounds. Slow-fast decodes twice, once to type frames and once to cut them, because their sizes depend on how many are slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image as pil

from mirada.errors import MediaTooLarge
from mirada.media import image
from mirada.media.clean import Read, VideoClean, kept
from mirada.media.decode import Reader, open_reader
from mirada.media.exact import resize_bicubic, resize_bilinear
from mirada.media.fetch import locate
from mirada.media.frames import FrameList
from mirada.media.grid import GridRule, Patches, Room, content_key, fit
from mirada.media.limits import FetchLimits
from mirada.media.rule import MediaRule
from mirada.media.sample import Choice, check_settings, choose
from mirada.media.slowfast import Typist, frame_sizes
from mirada.media.times import Times
from mirada.types import Grid, Video


def prepare_video(
    part: Video,
    rule: MediaRule,
    limits: FetchLimits | None = None,
    clean: VideoClean | None = None,
    times: Times | None = None,
    most_tokens: int | None = None,
) -> Patches:
    """Fetch, sample, decode, resize and cut one video. ``timestamps`` are seconds since its first frame.

    ``clean`` removes or improves frames after they were sampled. ``times`` takes the seconds of opening and decoding
    (``decode_media``) and of all the rest (``prepare``). Raises a MediaError, SettingsError for settings that are
    out of range or contradict one another, or ContextOverflow, before there is room made for pixels, where it would become more
    than ``most_tokens`` tokens of a prompt.
    """
    limits, times = limits or FetchLimits(), Times() if times is None else times
    with times.stage("prepare"):
        return _prepare(part, rule, limits, clean, times, most_tokens)


def _prepare(
    part: Video, rule: MediaRule, limits: FetchLimits, clean: VideoClean | None, times: Times, most_tokens: int | None
) -> Patches:
    with times.stage("decode_media"):
        reader = _reader(part, rule, limits)
    with closing(reader):
        asked = clean.within(part, reader) if clean else part
        choice = reader.choose(asked) if isinstance(reader, FrameList) else choose(reader.timeline, asked, rule)
        _check_length(reader, choice, limits)
        choice, read = kept(reader, choice, clean)
        cut = _slow_fast if rule.video == "slowfast" else _uniform
        room = Room(most_tokens)
        room.check(len(choice.indices) // rule.grid.frames, reader.name)  # each has one at least
        made = cut(reader, choice, lambda indices: times.each("decode_media", read(indices)), part, rule, room)
    over = _over_budget(made, part, rule)
    return replace(made, notes=(*reader.notes, *choice.notes, *over))


def open_video(source: Any, limits: FetchLimits | None = None) -> Reader:
    """A reader of a path, ``file://``, ``http(s)://``, ``data:`` or bytes; the caller closes it."""
    limits = limits or FetchLimits()
    return open_reader(locate(source, limits, max_bytes=limits.video_bytes), limits)


def _reader(part: Video, rule: MediaRule, limits: FetchLimits) -> Reader | FrameList:
    if isinstance(part.source, list | tuple) or (isinstance(part.source, np.ndarray) and part.source.ndim == 4):
        # Here fps says how the pictures were taken, and contradicts nothing.
        check_settings(replace(part, fps=None) if part.nframes is not None else part)
        return FrameList(part, rule, limits)
    check_settings(part)
    return open_video(part.source, limits)


def _check_length(reader: Reader | FrameList, choice: Choice, limits: FetchLimits) -> None:
    times = reader.timeline.times
    seconds = float(times[choice.indices[-1]] - times[choice.indices[0]])
    if seconds > limits.video_seconds:
        raise MediaTooLarge(
            f"{reader.name} runs for {seconds:,.1f} seconds, more than {limits.video_seconds:,.1f}",
            "cut it with video_start and video_end, or raise FetchLimits.video_seconds",
        )


def _original(reader: Reader | FrameList) -> tuple[int, int]:
    """(height, width) of the frames as they came."""
    return reader.original if isinstance(reader, FrameList) else reader.size


def _over_budget(made: Patches, part: Video, rule: MediaRule) -> tuple[str, ...]:
    area = len(made.pixels) * rule.grid.patch**2
    if part.total_pixels is None or area <= part.total_pixels:
        return ()
    return (f"{made.num_frames} frames at their least size have {area:,} pixels, more than total_pixels={part.total_pixels:,}",)


def video_budget(num_frames: int, height: int, width: int, part: Video, rule: MediaRule) -> tuple[int, int]:
    """Size (H, W) of each of ``num_frames`` evenly sampled frames: keye-vl-utils 1.0.0 ``fetch_video``."""
    factor = rule.grid.factor
    if part.resized_height is not None and part.resized_width is not None:
        stage = rule.first or rule.grid
        height, width, low, high = part.resized_height, part.resized_width, stage.min_pixels, stage.max_pixels
    else:
        low = rule.frame_min_pixels if part.min_pixels is None else part.min_pixels
        total = rule.total_pixels if part.total_pixels is None else part.total_pixels
        high = max(min(rule.frame_max_pixels, total / num_frames * rule.frame_multiple), int(low * 1.05))
        if part.max_pixels is not None:
            high = part.max_pixels if rule.max_pixels_wins else min(part.max_pixels, high)
        if part.min_pixels is None and high < low:
            # The reference enlarges small frames past a max_pixels below its own least size; here what was asked wins.
            low = min(high, rule.grid.min_pixels)
    return fit(height, width, factor=factor, min_pixels=low, max_pixels=high, enlarge=False)  # type: ignore[arg-type]


@dataclass
class _Cutter:
    """Cuts frames into one array that is made at its final size: uint8 [N, C, P, P], or [N, C, f, P, P]."""

    pixels: np.ndarray
    grid: GridRule
    left: int
    """Frames still to come."""
    at: int = 0
    held: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def of(cls, sizes: Sequence[tuple[int, int]], grid: GridRule, room: Room, name: str) -> _Cutter:
        patch, depth = grid.patch, (grid.frames,) if grid.frames > 1 else ()
        num = sum((high // patch) * (wide // patch) for high, wide in sizes[:: grid.frames])
        room.check(num // grid.merge**2, name)
        return cls(np.empty((num, 3, *depth, patch, patch), np.uint8), grid, len(sizes))

    def add(self, frame: np.ndarray) -> None:
        self.held.append(frame)
        self.left -= 1
        if self.left and len(self.held) < self.grid.frames:
            return
        cut = self.grid.patchify(np.stack(self.held))
        self.pixels[self.at : self.at + len(cut)] = cut
        self.at += len(cut)
        self.held.clear()


def _uniform(reader: Reader | FrameList, choice: Choice, read: Read, part: Video, rule: MediaRule, room: Room) -> Patches:
    """Torch bicubic to the budget's size (files only; list frames had theirs), then the image processor's resize."""
    num, grid = len(choice.indices), rule.grid
    size = reader.size if isinstance(reader, FrameList) else video_budget(num, *reader.size, part, rule)
    rule.check_resize(size, reader.size)
    last = grid.fit(*size)
    cutter = _Cutter.of([last] * num, grid, room, reader.name)
    for frame in read(choice.indices.tolist()):
        cutter.add(resize(resize_bicubic(frame, size), last, rule))
    grids = ((-(-num // grid.frames), last[0] // grid.patch, last[1] // grid.patch),)
    return Patches(
        "video",
        cutter.pixels,
        grids,
        _original(reader),
        content_key(cutter.pixels, "video", grids, grid),
        timestamps=reader.timeline.timestamps(choice.indices),
        fps=choice.fps,
    )


def resize(frame: np.ndarray, size: tuple[int, int], rule: MediaRule) -> np.ndarray:
    """The image processor's own resize of one frame (Pillow), nothing if it has that size already."""
    if frame.shape[:2] == size:
        return frame
    return np.asarray(image.resize(pil.fromarray(frame), *size, rule))


def _slow_fast(reader: Reader | FrameList, choice: Choice, read: Read, part: Video, rule: MediaRule, room: Room) -> Patches:
    """Keye-VL-1.5: type all frames, then read them again and resize each (torch bilinear on uint8) to its type's size."""
    is_list = isinstance(reader, FrameList)
    threshold = rule.min_frame_similarity if part.min_frame_similarity is None else part.min_frame_similarity
    indices = choice.indices.tolist()
    typist = Typist(rule, threshold)
    for frame in read(indices):
        typist.is_fast(frame)
    fast = tuple(typist.fast)
    asked = replace(part, resized_height=None, resized_width=None) if is_list else part
    slow_size, fast_size = frame_sizes(reader.size, (len(fast) - sum(fast), sum(fast)), asked, rule)
    sizes = [fast_size if one else slow_size for one in fast]
    cutter = _Cutter.of(sizes, rule.grid, room, reader.name)
    for frame, size in zip(read(indices), sizes, strict=True):
        cutter.add(resize_bilinear(frame, size))
    grids = merged(sizes, rule.grid.patch)
    timed = not is_list or part.fps is not None
    return Patches(
        "video",
        cutter.pixels,
        grids,
        _original(reader),
        content_key(cutter.pixels, "video", grids, rule.grid),
        timestamps=reader.timeline.timestamps(choice.indices) if timed else None,
        fast=fast,
        fps=choice.fps,
    )


def merged(sizes: Sequence[tuple[int, int]], patch: int) -> tuple[Grid, ...]:
    """One grid per run of equally large frames, in order."""
    grids: list[Grid] = []
    for high, wide in sizes:
        h, w = high // patch, wide // patch
        if grids and grids[-1][1:] == (h, w):
            grids[-1] = (grids[-1][0] + 1, h, w)
        else:
            grids.append((1, h, w))
    return tuple(grids)
