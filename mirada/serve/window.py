"""The rolling window of live video: the last frames of one connection, bounded in seconds, rate, number and bytes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields

from mirada.errors import MediaDecodeError, MediaTooLarge, MessageError, SettingsError
from mirada.media.image import header_pixels

TIME_BYTES = 8
"""Of a binary message: milliseconds, big endian; the rest is the JPEG."""


@dataclass(frozen=True, slots=True)
class LiveLimits:
    """What one live connection may hold, and how many there may be. Raises SettingsError for a value out of range."""

    seconds: float = 60.0
    """How far back the window reaches."""
    frames: int = 240
    bytes: int = 16 << 20
    frame_bytes: int = 1 << 20
    frame_pixels: int = 1920 * 1080
    frames_per_second: float = 4.0
    """Of frames that come closer together, by their times, some are left out."""
    asked_frames: int = 64
    """Most frames that one question looks at; of more, evenly spread ones are taken."""
    turns: int = 8
    """Earlier questions and answers, as text, that a question follows."""
    connections: int = 16
    idle_seconds: float = 60.0
    """Without any message; then the connection is closed."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not value > 0 and not (one.name == "turns" and value == 0):
                raise SettingsError(f"live setting {one.name}={value!r} is out of range", "give a number above 0")
        if self.frame_bytes > self.bytes:
            raise SettingsError(
                f"live setting frame_bytes={self.frame_bytes} is above bytes={self.bytes}", "no frame could be held: swap them"
            )


class Window:
    """Frames with their times in milliseconds; the oldest go first."""

    def __init__(self, limits: LiveLimits) -> None:
        self._limits = limits
        self._frames: deque[tuple[int, bytes]] = deque()
        self._interval = 1000 / limits.frames_per_second
        self._newest: int | None = None
        self._due = 0.0
        self.num_bytes = 0
        self.num_left_out = 0
        """Frames that came faster than they may."""

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def seconds(self) -> float:
        return (self._frames[-1][0] - self._frames[0][0]) / 1000 if self._frames else 0.0

    def add(self, message: bytes) -> bool:
        """Take one binary message; False where the frame was left out, for it came too soon after the one before. Raises
        MediaError: too large, not a JPEG, or not later than the one before."""
        time_ms, jpeg = int.from_bytes(message[:TIME_BYTES], "big"), message[TIME_BYTES:]
        self._check(time_ms, jpeg)
        first, self._newest = self._newest is None, time_ms
        if not first and time_ms < self._due - self._interval / 4:  # a quarter early is the sender's unsteady clock
            self.num_left_out += 1
            return False
        self._due = max(self._due, time_ms - self._interval / 4) + self._interval
        self._frames.append((time_ms, jpeg))
        self.num_bytes += len(jpeg)
        self._forget(time_ms - round(self._limits.seconds * 1000))
        return True

    def _check(self, time_ms: int, jpeg: bytes) -> None:
        limits = self._limits
        if len(jpeg) > limits.frame_bytes:
            raise MediaTooLarge(f"a frame has {len(jpeg)} bytes", f"send at most {limits.frame_bytes}")
        if not jpeg.startswith(b"\xff\xd8\xff"):
            raise MediaDecodeError("a frame is not a JPEG", "send 8 bytes of milliseconds (big endian), then a JPEG")
        if header_pixels(jpeg) > limits.frame_pixels:
            raise MediaTooLarge(f"a frame has {header_pixels(jpeg)} pixels", f"send at most {limits.frame_pixels}")
        if self._newest is not None and time_ms <= self._newest:
            raise MediaDecodeError(
                f"a frame of {time_ms} ms came after one of {self._newest} ms", "send frames in the order of their times"
            )

    def _forget(self, oldest_ms: int) -> None:
        limits = self._limits
        while self._frames and (
            self._frames[0][0] < oldest_ms or len(self._frames) > limits.frames or self.num_bytes > limits.bytes
        ):
            self.num_bytes -= len(self._frames.popleft()[1])

    def last(self, seconds: float) -> tuple[list[bytes], float]:
        """(frames of the last ``seconds``, frames per second), at most ``asked_frames``, the newest among them. Raises
        MessageError where there is none."""
        if not self._frames:
            raise MessageError("no frame has arrived", "send frames before a question")
        since = self._frames[-1][0] - seconds * 1000
        found = [frame for frame in self._frames if frame[0] >= since]
        most = self._limits.asked_frames
        if len(found) > most:
            step = (len(found) - 1) / max(most - 1, 1)
            found = [found[len(found) - 1 - round(i * step)] for i in reversed(range(most))]
        taken = (found[-1][0] - found[0][0]) / 1000
        return [jpeg for _, jpeg in found], (len(found) - 1) / taken if taken else 1.0
