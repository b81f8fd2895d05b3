"""Synthetic pictures of the golden files, and lossless videos of them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest


def synth(height: int, width: int, k: int) -> np.ndarray:
    y, x, c = (axis.astype(np.int64) for axis in np.ogrid[:height, :width, :3])
    return ((7 * y + 13 * x + 61 * c + 29 * k + (x * y) // 5 + 80 * ((x // 9 + y // 7) % 2)) % 256).astype(np.uint8)


@pytest.fixture(scope="session", name="synth")
def synth_fixture():
    return synth


@pytest.fixture
def lossless(tmp_path):
    """``lossless(frames, fps) -> path`` of a video whose frames decode to exactly these."""

    def make(frames: Sequence[np.ndarray], fps: int, name: str = "a.mkv") -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream("ffv1", rate=Fraction(fps))
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = "bgr0"
            for array in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            container.mux(stream.encode())
        return path

    return make
