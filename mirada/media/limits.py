"""What a source may cost and where it may lie, and how messages name it."""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mirada.errors import MediaTooLarge, SettingsError


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """What a source may cost and where it may lie. The defaults suit a person at their own machine; a server takes
    :meth:`serving`. Environment proxies are never used: they would connect where no address was checked."""

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
    decode_seconds: float = 1800.0
    """For decoding one video, all passes together."""
    pixels: int = 89_478_485
    """Largest width times height before any resize (the size above which Pillow warns)."""
    seconds: float = 30.0
    """For one whole fetch: names resolved, redirects followed and every byte read."""
    parts: int = 4096
    """Pictures and videos of one request, frames that are given one by one included."""
    request_seconds: float = 300.0
    """For fetching all that one request names by address; its sources are fetched side by side."""
    request_pixels: int = 1 << 33
    """Of all pictures of one request together, before any resize."""
    request_bytes: int = 4 << 30
    """Of all that one request names by address or brings along, before it is decoded."""
    redirects: int = 3
    allow_private: bool = False
    """Whether addresses that are not on the public internet may be fetched (loopback, private, link-local, ...)."""
    allow_files: bool = True
    """Whether paths and ``file://`` are read at all."""
    file_root: Path | None = None
    """Only files under this folder, after symbolic links are resolved."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "float") and not value > (-1 if field.name == "redirects" else 0):
                raise SettingsError(f"limit {field.name}={value!r} lets nothing through", "give a larger number")
        if self.file_root is not None:
            object.__setattr__(self, "file_root", Path(self.file_root))

    @classmethod
    def serving(cls, file_root: Path | None = None) -> FetchLimits:
        """For sources that strangers name: no files, or only those under ``file_root``; and bounds that leave something of a
        machine of two cores, of which one decodes, to everybody else."""
        return cls(**SERVING, allow_files=file_root is not None, file_root=file_root)


SERVING: dict[str, Any] = {
    "parts": 512, "video_bytes": 256 << 20, "video_seconds": 3600.0, "decode_seconds": 120.0, "animation_frames": 2_000,
    "request_seconds": 60.0, "request_pixels": 1 << 30, "request_bytes": 512 << 20,
}  # fmt: skip
"""What a server bounds more tightly than a person does at their own machine."""


class Allowance:
    """What the sources of one request may still take together: seconds from now on, and bytes. Safe between threads."""

    def __init__(self, limits: FetchLimits) -> None:
        self.limits = limits
        self.deadline = time.monotonic() + limits.request_seconds
        self._left = limits.request_bytes
        self._pixels = limits.request_pixels
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        """Count ``size`` bytes. Raises MediaTooLarge if there are no more so many."""
        with self._lock:
            self._left -= size
            over = self._left < 0
        if over:
            most = self.limits.request_bytes
            raise MediaTooLarge(
                f"the pictures and videos of this request have more than {most:,} bytes together",
                "send fewer or smaller ones, or raise FetchLimits.request_bytes",
            )

    def decode(self, pixels: int) -> None:
        """Count ``pixels`` of a picture that is about to be decoded; for the thread that prepares. Raises MediaTooLarge."""
        self._pixels -= pixels
        if self._pixels < 0:
            raise MediaTooLarge(
                f"the pictures of this request have more than {self.limits.request_pixels:,} pixels together",
                "send fewer or smaller ones, or raise FetchLimits.request_pixels",
            )


def show(source: object) -> str:
    """A source as messages name it: short, and without what may be secret (query, user name) or long (base64)."""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source)} bytes"
    if not isinstance(source, str | os.PathLike):
        return f"the {type(source).__name__}"
    text = os.fsdecode(source)
    if text[:5].lower() == "data:":
        return f"{text[:40].partition(',')[0]},… ({len(text)} characters)"
    if re.match(r"https?:", text, re.IGNORECASE):
        text = re.sub(r"//[^/?#]*@", "//", re.split(r"[?#]", text, maxsplit=1)[0])
    text = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return repr(text) if len(text) <= 120 else repr(text[:80] + "…" + text[-30:])


def too_large(name: str, most: int, size: int | None = None) -> MediaTooLarge:
    """The error for more bytes than ``most``."""
    has = f"has {size:,} bytes, more than" if size is not None else "has more than"
    return MediaTooLarge(
        f"{name} {has} the limit of {most:,}", "shrink it, or raise the limit (FetchLimits.bytes or video_bytes)"
    )
