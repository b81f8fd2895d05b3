"""Which frames of a video to use: pure arithmetic on times, no decoding.

Times are seconds since the first frame of the chosen stream. T frames in the file, n frames chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mirada.errors import SettingsError
from mirada.media.exact import linspace_indices
from mirada.media.rule import MediaRule
from mirada.types import LARGEST, Video, is_number


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each frame is shown: ``times`` float64 [T], ascending, from 0. ``rate``: T over the whole duration."""

    times: np.ndarray
    rate: float
    uniform: bool
    """Constant frame rate: frame i is shown at i / rate, as exactly as the container can say."""

    @property
    def num_frames(self) -> int:
        return len(self.times)

    @property
    def seconds(self) -> float:
        return self.num_frames / self.rate

    def timestamps(self, indices: np.ndarray) -> tuple[float, ...]:
        """Seconds of the given frames. At a constant rate they are float32((1/rate) * i), as keye-vl-utils 1.5.2 has them."""
        if self.uniform:
            return tuple(float(np.float32((1 / self.rate) * int(index))) for index in indices)
        return tuple(float(self.times[index]) for index in indices)


@dataclass(frozen=True, slots=True)
class Choice:
    """``indices`` int64 [n], ascending (may repeat); ``fps`` the rate of what was chosen; ``notes`` what was clamped."""

    indices: np.ndarray
    fps: float
    notes: tuple[str, ...] = ()


def choose(timeline: Timeline, part: Video, rule: MediaRule) -> Choice:
    """The frames of ``timeline`` that ``part`` asks for under ``rule``.

    At a constant rate by index, as the references do: ``round(linspace(first, last, n))``. At a variable rate by time: n
    evenly spaced moments, for each the frame on show (one counts as on show from half a median interval before its start,
    and no earlier than half-way from the frame before it). A picture that stays on show over several moments is repeated
    where the model takes frames to be evenly spaced ("uniform"), and taken once where each frame carries its own time
    ("slowfast").

    Never crashes on short clips: at least one frame, at most all, with a note. Raises SettingsError for settings that
    contradict one another or a cut outside the video.
    """
    check_settings(part)
    first, last, notes = cut(timeline, part.video_start, part.video_end)
    total = last - first + 1
    num, more = count_frames(total, timeline.rate, part, rule)
    if timeline.uniform:
        indices = linspace_indices(first, last, num)
        fps = num / total * timeline.rate
    else:
        indices = _by_time(timeline, first, last, num)
        fps = num / _seconds(timeline, first, last)
        if rule.video == "slowfast":
            indices = np.unique(indices)
    return Choice(indices, fps, notes + more)


def check_settings(part: Video) -> None:
    """Raise SettingsError unless every sampling setting is usable by itself and with the others."""
    if part.fps is not None and part.nframes is not None:
        raise SettingsError("a video has both fps and nframes", "give one of them")
    for name in ("fps", "min_frame_similarity", "video_start", "video_end"):
        value = getattr(part, name)
        if value is not None and not is_number(value):
            raise SettingsError(f"video setting {name}={value!r} is not a finite number", f"leave {name} out or give a number")
    if part.fps is not None and part.fps <= 0:
        raise SettingsError(f"video setting fps={part.fps} is not above 0", "give frames per second, e.g. 2.0")
    for name in ("nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels"):
        value: Any = getattr(part, name)
        if value is not None and (not is_number(value) or value < 1):
            raise SettingsError(
                f"video setting {name}={value!r} is not between 1 and {LARGEST}", f"leave {name} out or give a whole number"
            )
    if part.min_frames is not None and part.max_frames is not None and part.min_frames > part.max_frames:
        raise SettingsError(f"min_frames={part.min_frames} is above max_frames={part.max_frames}", "swap or drop one of them")
    if (part.resized_height is None) != (part.resized_width is None):
        raise SettingsError("a video has only one of resized_height and resized_width", "give both or neither")
    if part.resized_height is not None and min(part.resized_height, part.resized_width or 0) < 1:
        raise SettingsError(
            f"resized size {part.resized_width}x{part.resized_height} is empty", "give sides of at least one pixel"
        )


def cut(timeline: Timeline, start: float | None, end: float | None) -> tuple[int, int, tuple[str, ...]]:
    """First and last frame (inclusive) shown within [start, end] seconds, and notes.

    An end past the video is clamped with a note (keye-vl-utils 1.0.0 clamps it silently), and a cut between two frames
    keeps the one on show at its start. Raises SettingsError if start is negative, not before end, or past the last frame.
    """
    last = timeline.num_frames - 1
    if start is None and end is None:
        return 0, last, ()
    notes: tuple[str, ...] = ()
    begin = 0.0 if start is None else start
    finish = math.inf if end is None else end
    if begin < 0 or finish <= begin:
        raise SettingsError(
            f"the cut from {begin:g} to {finish:g} seconds is empty or starts before 0", "give 0 <= video_start < video_end"
        )
    if begin >= timeline.seconds:
        raise SettingsError(
            f"video_start={begin:g} lies past the end of the video ({timeline.seconds:.3f} seconds)", "start within the video"
        )
    if end is not None and end > timeline.seconds:
        notes = (f"video_end={end:g} clamped to the video's {timeline.seconds:.3f} seconds",)
        finish = timeline.seconds
    if timeline.uniform:
        low, high = math.ceil(begin * timeline.rate), min(last, math.floor(min(finish, timeline.seconds) * timeline.rate))
    else:
        low = int(np.searchsorted(timeline.times, begin, side="left"))
        high = int(np.searchsorted(timeline.times, finish, side="right")) - 1
    if low > high:
        low = high = max(0, min(high, last))
        notes += (f"no frame starts between {begin:g} and {finish:g} seconds; took the one on show",)
    return low, high, notes


def count_frames(total: int, rate: float, part: Video, rule: MediaRule) -> tuple[int, tuple[str, ...]]:
    """How many of ``total`` frames to take, at least 1 and at most ``total``, and a note where that clamped.

    Slow-fast ignores ``nframes`` and ``min_frames`` in its reference; here they are kept, within the budget.
    """
    if rule.video == "slowfast":
        cap = slowfast_cap(part, rule)
        if part.nframes is not None:
            wanted = min(int(part.nframes), cap)
        else:
            wanted = max(slowfast_nframes(total, rate, part, rule), min(int(part.min_frames or 0), cap))
        num = min(max(wanted, 1), total)
        asked = part.nframes if part.nframes is not None else wanted
    else:
        wanted = asked = uniform_nframes(total, rate, part, rule)
        if part.nframes is None:
            asked = max(wanted, min(int(part.min_frames or rule.min_frames), int(part.max_frames or rule.min_frames)))
        least = min(rule.frame_multiple, total, int(part.max_frames or rule.frame_multiple))
        most = total - total % rule.frame_multiple or total
        num = min(max(wanted, least), most)
    return num, () if num == asked else (
        f"number of frames clamped from {asked} to {num} ({total} frames at {rate:g} a second)",
    )


def uniform_nframes(total: int, rate: float, part: Video, rule: MediaRule) -> int:
    """``smart_nframes`` of keye-vl-utils 1.0.0 or qwen-vl-utils 0.0.8 before its check against [2, total]."""
    step = rule.frame_multiple
    if part.nframes is not None:
        return round(part.nframes / step) * step
    fps = rule.fps if part.fps is None else part.fps
    least = math.ceil((rule.min_frames if part.min_frames is None else part.min_frames) / step) * step
    most = min(rule.max_frames or total, total) if part.max_frames is None else part.max_frames
    most = math.floor(most / step) * step
    num = min(max(total / rate * fps, least), most)
    if rule.frame_rounding == "nearest":
        return round(num / step) * step
    return math.floor(min(num, total) / step) * step


def strict_nframes(total: int, rate: float, part: Video, rule: MediaRule) -> int:
    """:func:`uniform_nframes`, raising SettingsError outside [frame_multiple, total] as the reference does."""
    check_settings(part)
    num = uniform_nframes(total, rate, part, rule)
    if not rule.frame_multiple <= num <= total:
        raise SettingsError(f"nframes={num} is not between {rule.frame_multiple} and {total}", "ask for fewer frames")
    return num


def slowfast_cap(part: Video, rule: MediaRule) -> int:
    """Most frames that the pixel budget holds at the least size of a frame, or ``max_frames`` if that is less."""
    budget = rule.total_pixels if part.total_pixels is None else part.total_pixels
    least = rule.frame_min_pixels if part.min_pixels is None else part.min_pixels
    caps = (int(budget / least), rule.max_frames, part.max_frames)
    return min(int(cap) for cap in caps if cap is not None)


def slowfast_nframes(total: int, rate: float, part: Video, rule: MediaRule) -> int:
    """keye-vl-utils 1.5.2 ``smart_nframes``; 0 for clips shorter than one interval (the reference then crashes)."""
    fps = min(rule.fps if part.fps is None else part.fps, rate)
    return min(int(total / rate * fps), slowfast_cap(part, rule))


def _seconds(timeline: Timeline, first: int, last: int) -> float:
    end = timeline.times[last + 1] if last + 1 < timeline.num_frames else max(timeline.seconds, timeline.times[last])
    seconds = float(end - timeline.times[first])
    return seconds if seconds > 0 else (last - first + 1) / timeline.rate


def _by_time(timeline: Timeline, first: int, last: int, num: int) -> np.ndarray:
    times = timeline.times[first : last + 1]
    gaps = np.diff(times)
    begins = times.copy()
    begins[1:] -= np.minimum(gaps, np.median(gaps) if len(gaps) else 0) / 2
    moments = np.linspace(times[0], times[-1], num)
    return first + np.searchsorted(begins, moments, side="right").astype(np.int64) - 1
