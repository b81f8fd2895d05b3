"""Options that remove or improve frames of a video before it is cut into patches: numpy and Pillow only.

Every measure is taken on a small copy of the frame, so that it costs little and hardly depends on resolution. Values are
0..255.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image as pil
from PIL import ImageFilter

from mirada.errors import SettingsError
from mirada.media.decode import Reader
from mirada.media.sample import Choice
from mirada.types import Video

THUMB = 64
"""Side of the square copy on which blackness, near-duplicates and scene cuts are judged."""
SHARPNESS_SIDE = 480
"""Longest side of the copy on which sharpness is measured; smaller frames are not enlarged."""
SCENE_MEAN = 30.0
"""Mean difference of two neighbouring frames above which a scene is cut."""
SCENE_FPS, SCENE_FRAMES = 4.0, 4096
"""Frames per second, and most frames in all, that are looked at for scene cuts."""

Read = Callable[[Iterable[int]], Iterator[np.ndarray]]


@dataclass(frozen=True, slots=True)
class VideoClean:
    """What to do to the frames that were sampled; everything is off unless asked. Time stamps of kept frames stay theirs.

    It never drops everything: if no frame is left, the sharpest of the brighter half is kept, and a note says so.
    """

    denoise: int | None = None
    """Side of a median filter over each frame, 3 or 5 pixels."""
    drop_near_duplicates: bool = False
    """Drop a frame that looks like the latest kept one."""
    drop_black: bool = False
    drop_blurred: bool = False
    cut: tuple[float, float] | None = None
    """Only between these seconds; takes the place of the video's own ``video_start`` / ``video_end``."""
    scene: int | None = None
    """Only scene number k, counted from 0 (negative: from the end), as :func:`find_scenes` finds them."""

    duplicate_mean: float = 1.5
    duplicate_max: float = 24.0
    """Near-duplicate: mean difference below the first and no cell's above the second."""
    black_mean: float = 16.0
    black_max: float = 48.0
    """Black: mean below the first and 99 of 100 cells below the second (so that lights in the night are kept)."""
    blur_ratio: float = 0.25
    """Blurred: variance of the Laplacian below this share of the median over the clip's frames that are not black."""
    scene_mean: float = SCENE_MEAN
    """Scene cut: mean difference of two neighbouring frames above this."""

    def __post_init__(self) -> None:
        if self.denoise not in (None, 3, 5):
            raise SettingsError(f"denoise={self.denoise!r} is not a filter", "use 3 or 5 (pixels), or None for off")
        if self.cut is not None and self.scene is not None:
            raise SettingsError("a clean-up has both cut and scene", "give one of them")
        if self.cut is not None and (len(self.cut) != 2 or not 0 <= self.cut[0] < self.cut[1]):
            raise SettingsError(f"cut={self.cut!r} is not a stretch of time", "give (start, end) in seconds, 0 <= start < end")

    @property
    def drops(self) -> bool:
        return self.drop_near_duplicates or self.drop_black or self.drop_blurred

    def within(self, part: Video, reader: Reader) -> Video:
        """``part`` cut as asked. Raises SettingsError if there is no such scene."""
        if self.cut is not None:
            return replace(part, video_start=self.cut[0], video_end=self.cut[1])
        if self.scene is None:
            return part
        scenes = find_scenes(reader, self.scene_mean)
        if not -len(scenes) <= self.scene < len(scenes):
            raise SettingsError(f"{reader.name} has no scene {self.scene}", f"it has {len(scenes)}; count from 0")
        start, end = scenes[self.scene]
        return replace(part, video_start=start, video_end=end)


def find_scenes(reader: Reader, threshold: float = SCENE_MEAN) -> tuple[tuple[float, float], ...]:
    """(start, end) seconds of each scene, in order: from its first frame to just before the next scene's first.

    Looks at up to SCENE_FPS frames a second, so a cut is known to that precision.
    """
    timeline = reader.timeline
    step = max(1, round(timeline.rate / SCENE_FPS), -(-timeline.num_frames // SCENE_FRAMES))
    indices = range(0, timeline.num_frames, step)
    starts, last = [0.0], None
    for index, frame in zip(indices, reader.read(indices), strict=True):
        seen = _thumb(frame)
        if last is not None and float(np.abs(seen - last).mean()) > threshold:
            starts.append(float(timeline.times[index]))
        last = seen
    # An end excludes the frame at which the next scene starts.
    ends = [start - 0.5 / timeline.rate for start in starts[1:]] + [timeline.seconds]
    return tuple(zip(starts, ends, strict=True))


def kept(reader: Reader, choice: Choice, clean: VideoClean | None) -> tuple[Choice, Read]:
    """What is left of ``choice``, and the function that reads its frames, filtered as asked. Reads all frames once if it
    may drop any. The rate of what is left is lowered by the share that was dropped."""
    if clean is None:
        return choice, reader.read
    read = _denoised(reader.read, clean.denoise) if clean.denoise else reader.read
    if not clean.drops:
        return choice, read
    looks = [_Look.of(frame) for frame in read(choice.indices.tolist())]
    left, counts = _select(looks, clean)
    notes = choice.notes
    if not left:
        order = np.argsort([look.brightness for look in looks])[len(looks) // 2 :]
        left = [int(max(order, key=lambda at: looks[at].sharpness))]
        notes += ("every frame would have been dropped; the best one was kept",)
    if len(left) < len(looks):
        said = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
        notes += (f"dropped {len(looks) - len(left)} of {len(looks)} frames ({said})",)
    return Choice(choice.indices[left], choice.fps * len(left) / len(looks), notes), read


@dataclass(frozen=True, slots=True)
class _Look:
    """What is kept of a frame: float32 [THUMB, THUMB, 3], its mean, variance of the Laplacian."""

    thumb: np.ndarray
    brightness: float
    sharpness: float

    @classmethod
    def of(cls, frame: np.ndarray) -> _Look:
        thumb = _thumb(frame)
        return cls(thumb, float(thumb.mean()), sharpness(frame))


def sharpness(frame: np.ndarray) -> float:
    """Variance of the 4-neighbour Laplacian of the grey frame, scaled down to SHARPNESS_SIDE if it is larger."""
    grey = pil.fromarray(frame).convert("L")
    scale = SHARPNESS_SIDE / max(grey.size)
    if scale < 1:
        grey = grey.resize((max(1, round(grey.width * scale)), max(1, round(grey.height * scale))), pil.Resampling.BOX)
    values = np.pad(np.asarray(grey, np.float32), 1, mode="edge")
    inside = values[1:-1, 1:-1]
    return float((values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:] - 4 * inside).var())


def _thumb(frame: np.ndarray) -> np.ndarray:
    return np.asarray(pil.fromarray(frame).resize((THUMB, THUMB), pil.Resampling.BOX), np.float32)


def _select(looks: list[_Look], clean: VideoClean) -> tuple[list[int], dict[str, int]]:
    black = [look.brightness < clean.black_mean and np.quantile(look.thumb, 0.99) < clean.black_max for look in looks]
    usual = [look.sharpness for look, dark in zip(looks, black, strict=True) if not dark]
    least = clean.blur_ratio * float(np.median(usual)) if usual else 0.0
    left: list[int] = []
    counts = {"black": 0, "blurred": 0, "near-duplicate": 0}
    for at, look in enumerate(looks):
        if clean.drop_black and black[at]:
            counts["black"] += 1
        elif clean.drop_blurred and not black[at] and look.sharpness < least:
            counts["blurred"] += 1
        elif clean.drop_near_duplicates and left and _alike(look, looks[left[-1]], clean):
            counts["near-duplicate"] += 1
        else:
            left.append(at)
    return left, counts


def _alike(one: _Look, other: _Look, clean: VideoClean) -> bool:
    difference = np.abs(one.thumb - other.thumb)
    return bool(difference.mean() < clean.duplicate_mean and difference.max() < clean.duplicate_max)


def _denoised(read: Read, side: int) -> Read:
    median = ImageFilter.MedianFilter(side)

    def filtered(indices: Iterable[int]) -> Iterator[np.ndarray]:
        for frame in read(indices):
            yield np.array(pil.fromarray(frame).filter(median))

    return filtered
