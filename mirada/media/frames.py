"""A video given as a list of pictures, read like any other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mirada.errors import MediaDecodeError, MediaError, MediaTooLarge, MediaUnsupported
from mirada.media.decode import Deadline
from mirada.media.exact import linspace_indices
from mirada.media.grid import fit
from mirada.media.image import open_image, resize
from mirada.media.limits import FetchLimits
from mirada.media.rule import MediaRule
from mirada.media.sample import Choice, Timeline, choose, cut
from mirada.types import Video


class FrameList:
    """Frames are any source of a picture, opened when they are read, and pass the first resize of a picture on the way.

    As in the references that resize is bounded as a picture's for evenly sampled videos (keye-vl-utils 1.0.0) and as a
    frame's for slow-fast (1.5.2). ``part.fps`` is the rate at which they were taken. All frames must come out equally large.
    """

    def __init__(self, part: Video, rule: MediaRule, limits: FetchLimits) -> None:
        self._frames: Sequence[Any] = part.source
        self._part, self._rule, self._limits = part, rule, limits
        num = len(self._frames)
        self.name, self.notes = f"the video of {num} pictures", ()
        if not num:
            raise MediaDecodeError("the video is an empty list", "give at least one picture")
        if num > limits.video_frames:
            raise MediaTooLarge(
                f"{self.name} is too long", f"give at most {limits.video_frames:,}, or raise FetchLimits.video_frames"
            )
        rate = float(part.fps or rule.fps)
        self.timeline = Timeline(np.arange(num) / rate, rate, uniform=True)
        self.original = (0, 0)
        """(height, width) of the first picture before its resize; ``size`` is that after it."""
        self._deadline = Deadline(limits.decode_seconds, self.name)
        self.size = self._open(0).shape[:2]

    def close(self) -> None:
        """Nothing is held open."""

    def choose(self, part: Video) -> Choice:
        """Slow-fast samples a list as it does a file. Else all frames are taken (or ``nframes`` / ``max_frames`` of them),
        and the last is repeated to make their number a multiple of ``rule.frame_multiple``, as keye-vl-utils 1.0.0 does."""
        if self._rule.video == "slowfast":
            return choose(self.timeline, part if part.nframes is None else replace(part, fps=None), self._rule)
        first, last, notes = cut(self.timeline, part.video_start, part.video_end)
        total = last - first + 1
        num = min(int(bound) for bound in (total, part.nframes, part.max_frames) if bound is not None)
        indices = linspace_indices(first, last, num)
        missing = -num % self._rule.frame_multiple
        padded = np.concatenate([indices, np.repeat(indices[-1:], missing)])
        return Choice(padded, self.timeline.rate * num / total, notes)

    def read(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        last, picture = -1, None
        for index in indices:
            if picture is None or index != last:
                last, picture = index, self._open(index)
                if picture.shape[:2] != self.size:
                    raise MediaUnsupported(
                        f"picture {index} of the video is {picture.shape[1]}x{picture.shape[0]} after its resize, "
                        f"picture 0 is {self.size[1]}x{self.size[0]}",
                        "give pictures of one size, or resized_height and resized_width",
                    )
            yield picture

    def _open(self, index: int) -> np.ndarray:
        self._deadline.check()
        try:
            opened = open_image(self._frames[index], self._limits, self._rule.alpha)
            high, wide = self._size(*opened.size)
            self.original = opened.size if index == 0 else self.original
        except MediaError as error:
            raise type(error)(f"picture {index} of the video: {error.problem}", error.fix) from error
        # The references resize list frames with Pillow, bicubic whatever the image processor uses.
        return np.array(resize(opened.rgb, high, wide, replace(self._rule, resample="bicubic")))

    def _size(self, height: int, width: int) -> tuple[int, int]:
        part, rule = self._part, self._rule
        stage = rule.first or rule.grid
        low, high = stage.min_pixels, stage.max_pixels
        if part.resized_height is not None and part.resized_width is not None:
            height, width = part.resized_height, part.resized_width
        else:
            if rule.video == "slowfast":
                low, high = rule.frame_min_pixels, rule.frame_max_pixels
            low = low if part.min_pixels is None else part.min_pixels
            high = high if part.max_pixels is None else part.max_pixels
        size = fit(height, width, factor=rule.grid.factor, min_pixels=low, max_pixels=high, enlarge=False)
        rule.check_resize(size, (height, width))
        return size
