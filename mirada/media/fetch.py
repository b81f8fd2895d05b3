"""From a source to bytes, under limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """What a source may cost and where it may lie. The defaults suit a person at their own machine; a server sets
    ``file_root`` or ``allow_files=False`` (:meth:`serving`)."""

    bytes: int = 64 << 20
    """Largest file, download or decoded base64 of one picture."""
    video_bytes: int = 2 << 30
    """The same of one video."""
    video_seconds: float = 4 * 3600.0
    """Longest video, after a cut by ``video_start`` / ``video_end``."""
    video_frames: int = 1_000_000
    """Most frames that a video file may hold."""
    animation_frames: int = 5_000
    """The same of an animated GIF, WebP or PNG, which can only be decoded from its first frame on."""
    pixels: int = 89_478_485
    """Largest width times height before any resize (Pillow's own default warning level)."""
    seconds: float = 30.0
    """For one whole fetch, redirects and every byte included."""
    redirects: int = 3
    allow_private: bool = False
    """Whether addresses that are not on the public internet may be fetched (loopback, private, link-local, ...)."""
    allow_files: bool = True
    """Whether paths and ``file://`` are read at all."""
    file_root: Path | None = None
    """Only files under this folder, after symbolic links are resolved."""
