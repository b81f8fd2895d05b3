"""Readers: an opened video whose frames can be read by index, any number of times, one at a time.

A reader has ``name``, ``size`` (height, width after orientation), ``timeline``, ``notes`` and ``read(indices)``, which yields
uint8 [H, W, 3] upright RGB for ascending indices (they may repeat) and holds no more than a few frames at a time.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from av.error import FFmpegError
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from PIL import Image as pil

from mirada.errors import MediaDecodeError, MediaError, MediaTimeout, MediaTooLarge
from mirada.media.limits import FetchLimits, show
from mirada.media.probe import Probe, broken, choose_stream, open_container, open_file, orientation, probe
from mirada.media.sample import Timeline

SEEK_GAP = 16
"""Frames that a seek must skip before it is worth flushing the decoder."""
ANIMATION_PIXELS = 1 << 33
"""Most pixels over all frames of an animated GIF, WebP or PNG."""
_CODED_BY_ITSELF = PictureType.I
_ANIMATED = ("GIF", "WEBP", "PNG")


class Reader(Protocol):
    """See the module's docstring."""

    name: str
    size: tuple[int, int]
    timeline: Timeline
    notes: tuple[str, ...]

    def read(self, indices: Iterable[int]) -> Iterator[np.ndarray]: ...

    def close(self) -> None: ...


@dataclass
class Deadline:
    """Wall-clock limit of one video, all passes together."""

    seconds: float
    name: str
    started: float = field(default_factory=time.monotonic)

    def check(self) -> None:
        if time.monotonic() - self.started > self.seconds:
            raise MediaTimeout(
                f"decoding {self.name} took more than {self.seconds:g} seconds",
                "cut it (video_start, video_end), ask for fewer frames, or raise FetchLimits.decode_seconds",
            )


def open_reader(source: bytes | Path, limits: FetchLimits) -> Reader:
    """A reader of a file's bytes or of a path from ``fetch.locate``. Raises a MediaError."""
    name = f"the video of {show(source)}" if isinstance(source, bytes) else f"the video {show(source)}"
    file = open_file(source, limits)
    try:
        head = file.read(12)
        if head[:4] in (b"GIF8", b"\x89PNG") or (head[:4] == b"RIFF" and head[8:] == b"WEBP"):
            return Animation(file, name, limits)
        return VideoFile(file, name, limits)
    except BaseException:
        file.close()
        raise


class VideoFile:
    """One stream of a container file, decoded with PyAV.

    Between wanted frames that lie far apart it seeks to the key frame before the next one. Frames are told by their times,
    not by counting, and a file in which a seek does not land on a clean key frame is read from its beginning instead: what is
    read equals a sequential decode.
    """

    def __init__(self, file: IO[bytes], name: str, limits: FetchLimits, *, seek_gap: int | None = SEEK_GAP) -> None:
        self.name, self._file, self._limits = name, file, limits
        self._seek_gap = seek_gap
        self._deadline = Deadline(limits.decode_seconds, name)
        self._probe: Probe = probe(file, name, limits)
        self.timeline, self.notes = self._probe.timeline, self._probe.notes
        self.num_decoded = 0
        """Frames decoded so far, wanted or not."""
        self._turn = (False, False, False)
        self._shape: tuple[int, int] = (0, 0)
        self._first_frame()
        high, wide = self._shape
        self.size: tuple[int, int] = (wide, high) if self._turn[0] else (high, wide)

    def close(self) -> None:
        self._file.close()

    def _first_frame(self) -> None:
        with self._container() as container:
            frame = next(self._frames(container), None)
        if frame is None:
            raise MediaDecodeError(f"{self.name} has a video stream but no frame could be decoded", "fetch or export it again")
        self._turn = orientation(frame)
        self._shape = frame.height, frame.width
        if self._turn != (False, False, False):
            self.notes += ("turned upright (display matrix of the file)",)

    def _container(self) -> Any:
        return open_container(self._file, self.name)

    def _stream(self, container: Any) -> Any:
        stream = container.streams[self._probe.index]
        return stream if stream.codec_context.is_open else choose_stream(container, self.name, self._limits)

    def _frames(self, container: Any) -> Iterator[Any]:
        """Frames from where the container stands, in order of showing."""
        stream = self._stream(container)
        begun = not len(self._probe.keys)
        try:
            for packet in container.demux(stream):
                # What comes before a key frame cannot be decoded, and some decoders fail on it.
                begun = begun or packet.is_keyframe or not packet.size
                if not begun:
                    continue
                for frame in packet.decode():
                    self.num_decoded += 1
                    self._deadline.check()
                    yield frame
        except FFmpegError as error:
            raise broken(self.name, error) from error

    def read(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        paint = _Painter(self._shape, self._turn, self.name)
        with closing(self._by_time() if len(self._probe.pts) else self._by_count()) as find:
            next(find)
            last, picture = -1, None
            for index in indices:
                if picture is None or index != last:
                    picture = paint(find.send(index))
                    last = index
                yield picture

    def _by_count(self) -> Generator[Any, int, None]:
        """Coroutine: index -> frame, where the container has no times. A shortfall at the end gives the last frame."""
        frame, at = None, -1
        with self._container() as container:
            frames = self._frames(container)
            index = yield
            while True:
                while at < index and (found := next(frames, None)) is not None:
                    frame, at = found, at + 1
                index = yield frame

    def _by_time(self) -> Generator[Any, int, None]:
        """Coroutine: index -> the last frame that starts no later than the packet of that index (else the first)."""
        with ExitStack() as stack:
            container = stack.enter_context(self._container())
            frames, held, ahead = self._frames(container), None, None
            index = yield
            while True:
                target = int(self._probe.pts[index])
                start = self._key_before(target, held)
                if start is not None:
                    sought, held, ahead = self._seek(container, start), None, None
                    if sought is None:
                        self._seek_gap = None  # seeks in this file cannot be trusted; from its beginning is always right
                        container = stack.enter_context(self._container())
                    frames = sought or self._frames(container)
                held, ahead = _advance(frames, target, held, ahead)
                index = yield held or ahead

    def _key_before(self, target: int, held: Any) -> int | None:
        """Time of the key frame to seek to, or None where decoding on is cheaper."""
        keys, pts = self._probe.keys, self._probe.pts
        if self._seek_gap is None or not len(keys) or keys[0] > target:
            return None
        key = int(keys[np.searchsorted(keys, target, side="right") - 1])
        reached = 0 if held is None or held.pts is None else int(np.searchsorted(pts, held.pts, side="right"))
        return key if int(np.searchsorted(pts, key)) - reached >= self._seek_gap else None

    def _seek(self, container: Any, start: int) -> Iterator[Any] | None:
        """Frames from the key frame at ``start`` on, or None if no clean one is found there.

        Clean means coded by itself: where the picture is refreshed bit by bit (H.264 intra refresh), packets count as key
        frames that are not, and what follows them is not what a sequential decode gives.
        """
        keys = self._probe.keys
        at = int(np.searchsorted(keys, start))
        # Where an index is lacking (transport streams) a seek may land a little late: then aim at an earlier key frame.
        for aim in dict.fromkeys(int(keys[max(0, at - back)]) for back in range(3)):
            try:
                container.seek(aim, stream=self._stream(container), backward=True)
                frames = self._frames(container)
                first = next((frame for frame in frames if frame.pts is None or frame.pts >= start), None)
            except (FFmpegError, MediaDecodeError):
                continue
            if first is not None and first.pts == start and first.pict_type == _CODED_BY_ITSELF:
                return chain((first,), frames)
        return None


def _advance(frames: Iterator[Any], target: int, held: Any, ahead: Any) -> tuple[Any, Any]:
    """Decode on until ``held`` is the last frame with pts <= target; ``ahead`` is one already decoded beyond it."""
    while held is None or held.pts < target:
        following = ahead if ahead is not None else next(frames, None)
        ahead = None
        if following is None or following.pts is None:
            break
        if following.pts > target:
            return held, following
        held = following
    return held, ahead


class _Painter:
    """Decoded frame -> upright uint8 [H, W, 3]; transparency is laid on white, a change of size mid-stream scaled away."""

    def __init__(self, shape: tuple[int, int], turn: tuple[bool, bool, bool], name: str) -> None:
        self._shape, self._turn, self._name = shape, turn, name
        self._reformatter = VideoReformatter()

    def __call__(self, frame: Any) -> np.ndarray:
        if frame is None:
            raise MediaDecodeError(f"{self._name} ends before its last frame", "fetch or export it again")
        if frame.is_corrupt:
            at = "" if frame.time is None else f" at {frame.time:.3f} seconds"
            raise MediaDecodeError(f"{self._name} has a broken frame{at}", "fetch or export it again")
        high, wide = self._shape
        clear = any(component.is_alpha for component in frame.format.components) or frame.format.has_palette
        made = self._reformatter.reformat(frame, width=wide, height=high, format="rgba" if clear else "rgb24")
        picture = made.to_ndarray()
        if clear:
            picture = on_white(picture)
        transpose, flip_rows, flip_columns = self._turn
        if transpose:
            picture = picture.transpose(1, 0, 2)
        picture = picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
        return np.ascontiguousarray(picture)


def on_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 4] -> uint8 [H, W, 3] on a white ground."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + (255 - alpha) * 255 + 127) // 255).astype(np.uint8)


class Animation:
    """An animated GIF, WebP or PNG (or a still one: one frame), decoded with Pillow from its first frame on."""

    def __init__(self, file: IO[bytes], name: str, limits: FetchLimits) -> None:
        self.name, self._file = name, file
        self.notes: tuple[str, ...] = ()
        self._deadline = Deadline(limits.decode_seconds, name)
        with self._open() as image:
            self.size = image.height, image.width
            area = image.height * image.width
            if area > limits.pixels:
                raise MediaTooLarge(
                    f"{name} has frames of {image.width}x{image.height}, more than {limits.pixels:,} pixels",
                    "scale it down, or raise FetchLimits.pixels",
                )
            seconds = self._durations(image, min(limits.animation_frames, max(1, ANIMATION_PIXELS // area)))
        ends = np.cumsum(seconds)
        uniform = len(set(seconds)) == 1
        self.timeline = Timeline(ends - seconds[0] if uniform else ends - seconds, len(seconds) / float(ends[-1]), uniform)

    def close(self) -> None:
        self._file.close()

    def _open(self) -> pil.Image:
        self._file.seek(0)
        try:
            return pil.open(self._file, formats=_ANIMATED)
        except (pil.DecompressionBombError, pil.DecompressionBombWarning, OSError, SyntaxError) as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> MediaDecodeError:
        return MediaDecodeError(f"{self.name} is broken or truncated ({error})", "open and save it again, or fetch it again")

    def _durations(self, image: pil.Image, most: int) -> np.ndarray:
        seconds: list[float] = []
        for _ in self._each(image):
            # Browsers show frames of less than 20 ms for 100 ms, and so does FFmpeg.
            shown = float(image.info.get("duration") or 0)
            seconds.append(shown / 1000 if shown >= 20 else 0.1)
            if len(seconds) > most:
                raise MediaTooLarge(
                    f"{self.name} has more than {most:,} frames of {image.width}x{image.height}",
                    "convert it to MP4, or raise FetchLimits.animation_frames",
                )
        return np.array(seconds)

    def _each(self, image: pil.Image) -> Iterator[int]:
        index = 0
        while True:
            try:
                image.seek(index)
                image.load()
            except EOFError:
                if index:
                    return
                raise self._broken(EOFError("no frame")) from None
            except MediaError:
                raise
            except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
                raise self._broken(error) from error
            self._deadline.check()
            yield index
            index += 1

    def read(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        wanted = iter(indices)
        target = next(wanted, None)
        with self._open() as image:
            for index in self._each(image):
                if target is None:
                    return
                if index == target:
                    picture = on_white(np.asarray(image.convert("RGBA")))
                    while target == index:
                        yield picture
                        target = next(wanted, None)
