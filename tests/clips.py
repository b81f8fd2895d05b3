"""Tiny videos, encoded with PyAV, whose frames carry their own number as black and white bars; and the golden drawings."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np

WIDTH, HEIGHT, BITS = 64, 48, 16


def numbered(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 [H, W, 3]: the top rows hold ``number`` in 16 bars, the rest changes with it."""
    frame = np.full((height, width, 3), number * 37 % 200, np.uint8)
    frame[:, : 1 + number % width] = 255 - number * 11 % 200
    edges = [round(bit * width / BITS) for bit in range(BITS + 1)]
    for bit in range(BITS):
        frame[: height // 6, edges[bit] : edges[bit + 1]] = 255 if number >> bit & 1 else 0
    return frame


def number_of(frame: np.ndarray) -> int:
    """The number that :func:`numbered` drew, from a decoded (perhaps resized) frame."""
    row = frame[frame.shape[0] // 12, :, 1]
    bar = len(row) / BITS
    return sum(1 << bit for bit in range(BITS) if row[int((bit + 0.5) * bar)] > 128)


def encode(
    frames: int | Sequence[np.ndarray] = 10,
    *,
    form: str = "mp4",
    codec: str = "libx264",
    rate: int = 10,
    seconds: Sequence[float] | None = None,
    codec_options: dict[str, str] | None = None,
    mux: dict[str, str] | None = None,
    path: Path | None = None,
    prepare: Callable[[Any], None] = lambda stream: None,
) -> bytes:
    """A file of one video stream. ``frames``: pictures, or how many numbered ones. ``seconds``: time of each, if not even.
    ``path``: write there first, for what needs a real file."""
    pictures = [numbered(i) for i in range(frames)] if isinstance(frames, int) else frames
    buffer = io.BytesIO()
    with av.open(str(path) if path else buffer, "w", format=form, options=mux or {}) as container:
        stream = add_stream(container, pictures[0] if len(pictures) else numbered(0), codec, rate, codec_options)
        prepare(stream)
        mux_frames(container, stream, pictures, seconds)
    return path.read_bytes() if path else buffer.getvalue()


def add_stream(container: Any, like: np.ndarray, codec: str = "libx264", rate: int = 10, options: Any = None) -> Any:
    fast = {"preset": "ultrafast"} if codec in ("libx264", "libx265") else {}
    stream: Any = container.add_stream(codec, rate=rate, options={**fast, **(options or {})})
    stream.height, stream.width = like.shape[:2]
    stream.pix_fmt = "yuv420p"
    stream.codec_context.thread_count = 1
    return stream


def mux_frames(container: Any, stream: Any, pictures: Sequence[np.ndarray], seconds: Sequence[float] | None = None) -> None:
    for index, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        if seconds is not None:
            frame.pts, frame.time_base = round(seconds[index] * 1000), Fraction(1, 1000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


@lru_cache(maxsize=64)
def scene(height: int, width: int, number: int, step: int) -> np.ndarray:
    """The golden drawing ``scene(h, w, s, t)``: a plain ground over which another colour is wiped from the left."""
    palette = [(250, 250, 250), (250, 10, 10), (10, 10, 60), (200, 10, 150), (10, 200, 20), (0, 0, 0)]
    grain = (np.arange(height, dtype=np.int16)[:, None] + np.arange(width, dtype=np.int16)) % 7
    drawn = np.zeros((height, width, 3), np.int16) + np.array(palette[number % 6], np.int16)
    drawn[:, : step * width // 20] = palette[(number + 2) % 6]
    return np.clip(drawn + grain[..., None], 0, 255).astype(np.uint8)


def synth(height: int, width: int, number: int) -> np.ndarray:
    """The golden drawing ``synth(h, w, k)``."""
    y, x, c = np.mgrid[0:height, 0:width, 0:3].astype(np.int64)
    return ((7 * y + 13 * x + 61 * c + 29 * number + (x * y) // 5 + 80 * ((x // 9 + y // 7) % 2)) % 256).astype(np.uint8)
