"""What a video file holds, found without decoding more than its first frame: stream, times, orientation, wholeness.

Files are handed to FFmpeg as open file objects, with its own protocols shut and only container formats allowed: a playlist
or a concat script can therefore never make it read another file or address.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition

from mirada.errors import MediaDecodeError, MediaTooLarge, MediaUnsupported
from mirada.media.limits import FetchLimits, show, too_large
from mirada.media.sample import Timeline

DEMUXERS = (
    "mov,matroska,avi,flv,mpegts,mpeg,ogg,asf,h264,hevc,m4v,mpegvideo,ivf,obu,mxf,nut,dv,"  # pictures
    "mp3,wav,flac,aac"  # sound: opened to say that there is no video in it
)
_NO_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
_MAX_THREADS = 4  # each frame thread holds a picture: no more than this many, however many cores there are


@dataclass(frozen=True, slots=True)
class Probe:
    """The chosen stream of one file. ``pts`` int64 [T] in units of ``time_base`` seconds, ascending, or empty if the
    container has no times (then frames are counted). ``keys`` int64: those of ``pts`` where decoding can start."""

    index: int
    timeline: Timeline
    pts: np.ndarray
    keys: np.ndarray
    notes: tuple[str, ...]


def open_file(source: bytes | Path, limits: FetchLimits) -> IO[bytes]:
    """A readable, seekable file of at most ``limits.video_bytes``. A path comes resolved from ``fetch.locate``."""
    if isinstance(source, bytes):
        return BytesIO(source)
    try:
        # O_NONBLOCK: opening a pipe must not wait for a writer. O_NOFOLLOW: the path was resolved before.
        handle = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
    except OSError as error:
        raise MediaDecodeError(
            f"{show(source)} cannot be opened ({error.strerror})", "check the file and its permissions"
        ) from error
    facts = os.fstat(handle)
    file = os.fdopen(handle, "rb")
    if not stat.S_ISREG(facts.st_mode):
        file.close()
        raise MediaUnsupported(f"{show(source)} is not a plain file", "give the path of a file, not of a pipe or device")
    if facts.st_size > limits.video_bytes:
        file.close()
        raise too_large(show(source), limits.video_bytes, facts.st_size)
    return file


def open_container(file: IO[bytes], name: str) -> Any:
    """PyAV container on ``file``. Raises MediaDecodeError if it is no video that FFmpeg can open."""
    file.seek(0)
    options = {"format_whitelist": DEMUXERS, "protocol_whitelist": "none"}
    try:
        return av.open(file, mode="r", options=options, metadata_errors="replace")
    except FFmpegError as error:
        raise _not_opened(file, name, error) from error


def _not_opened(file: IO[bytes], name: str, error: Exception) -> Exception:
    file.seek(0)
    head = file.read(16)
    if head[:3] == b"\xff\xd8\xff":
        return MediaUnsupported(f"{name} is a JPEG picture", "pass it as Image(...)")
    if not head:
        return MediaDecodeError(f"{name} is empty", "give a whole video")
    if head.startswith((b"#EXTM3U", b"ffconcat")):
        return MediaUnsupported(f"{name} is a playlist, which is not followed", "give the video file itself")
    if isinstance(error, EOFError):
        return MediaDecodeError(f"{name} ends before its first frame", "fetch or export it again")
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide"):
        return MediaDecodeError(f"{name} is a broken or truncated MP4 (its index is missing)", "fetch or export it again")
    return MediaDecodeError(
        f"{name} is not a video that can be opened ({error.__class__.__name__})", "give MP4, WebM, MKV, MOV, AVI, TS or GIF"
    )


def choose_stream(container: Any, name: str, limits: FetchLimits) -> Any:
    """The video stream to use: flagged "default", else (or among several of those) the largest area, then the first.

    Cover art, thumbnails and still pictures attached to sound do not count.
    """
    streams = [stream for stream in container.streams.video if not stream.disposition & _NO_PICTURES]
    if not streams:
        found = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise MediaUnsupported(f"{name} has no video stream (it holds {found})", "give a file with moving pictures")
    stream = min(streams, key=lambda s: (not s.disposition & Disposition.default, -_area(s), s.index))
    if stream.codec_context is None:
        raise MediaUnsupported(f"{name} uses a video codec that this FFmpeg cannot decode", "convert it to H.264 in MP4")
    if _area(stream) > limits.pixels:
        shape = f"{stream.codec_context.width}x{stream.codec_context.height}"
        raise MediaTooLarge(
            f"{name} has frames of {shape}, more than {limits.pixels:,} pixels", "scale it down, or raise FetchLimits.pixels"
        )
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = min(_MAX_THREADS, os.cpu_count() or 1)
    stream.codec_context.options = {"max_pixels": str(limits.pixels)}
    return stream


def _area(stream: Any) -> int:
    context = stream.codec_context
    return context.width * context.height if context is not None else 0


def probe(file: IO[bytes], name: str, limits: FetchLimits) -> Probe:
    """Read every packet of the file once, decode none, and say what the chosen stream holds.

    Raises MediaUnsupported (no video stream), MediaDecodeError (broken, truncated, no frames), MediaTooLarge.
    """
    check_whole(file, name)
    with open_container(file, name) as container:
        stream = choose_stream(container, name, limits)
        pts, keys, counted = _packets(container, stream, name, limits)
        rate = stream.guessed_rate or stream.average_rate or stream.base_rate
        if counted:
            timeline, notes = _counted(counted, float(rate or 25)), ("the container has no times; frames were counted",)
        else:
            timeline, notes = _timeline(pts, float(stream.time_base), stream), ()
        return Probe(stream.index, timeline, pts, keys, notes)


def _packets(container: Any, stream: Any, name: str, limits: FetchLimits) -> tuple[np.ndarray, np.ndarray, int]:
    """(sorted pts, sorted pts of key frames, 0), or (empty, empty, number of frames) where some packet has no pts."""
    pts: list[int] = []
    keys: list[int] = []
    untimed = corrupt = 0
    try:
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            corrupt += packet.is_corrupt and container.format.name != "mpegts"  # recordings from the air lose packets
            if packet.pts is None:
                untimed += 1
            else:
                pts.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
            if len(pts) + untimed > limits.video_frames:
                raise MediaTooLarge(
                    f"{name} holds more than {limits.video_frames:,} frames", "cut it, or raise FetchLimits.video_frames"
                )
    except FFmpegError as error:
        raise broken(name, error) from error
    if corrupt:
        raise MediaDecodeError(f"{name} is truncated or broken (an incomplete packet)", "fetch or export it again")
    if not pts and not untimed:
        raise MediaDecodeError(f"{name} has a video stream without any frame", "fetch or export it again")
    if untimed:
        return np.empty(0, np.int64), np.empty(0, np.int64), len(pts) + untimed
    # Frames shown before the first key frame refer to what the file does not hold: no decoder gives them.
    shown = np.unique(np.array(pts, np.int64))
    return shown[shown >= keys[0]] if keys else shown, np.unique(np.array(keys, np.int64)), 0


def broken(name: str, error: Exception, seconds: float | None = None) -> MediaDecodeError:
    """The error for a file that FFmpeg stumbled over."""
    where = "" if seconds is None else f" after {seconds:.3f} seconds"
    return MediaDecodeError(f"{name} is broken or truncated{where} ({error})", "fetch or export it again")


def _counted(num: int, rate: float) -> Timeline:
    return Timeline(np.arange(num) / rate, rate, uniform=True)


def _timeline(pts: np.ndarray, tick: float, stream: Any) -> Timeline:
    """Times from 0. A constant rate is recognised where every frame lies within a tick of i / rate."""
    num = len(pts)
    times = (pts - pts[0]) * tick
    declared = float(stream.average_rate or stream.guessed_rate or 0)
    if num == 1:
        return Timeline(times, declared or 25.0, uniform=True)
    for rate in (declared, (num - 1) / times[-1]):
        # One tick each for the rounding of the first and of this time.
        if rate > 0 and np.abs(times - np.arange(num) / rate).max() <= tick + 1e-9:
            return Timeline(times, rate, uniform=True)
    last = float(np.median(np.diff(times)))
    return Timeline(times, num / (float(times[-1]) + last), uniform=False)


def orientation(frame: Any) -> tuple[bool, bool, bool]:
    """(transpose, flip rows, flip columns, in that order) that make a decoded frame upright, from its display matrix.

    The matrix ((a, b), (c, d)) in 16.16 fixed point sends column p and row q to column ap + cq, row bp + dq
    (FFmpeg ``libavutil/display.h``); angles are rounded to quarter turns.
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
            if abs(a) + abs(d) >= abs(b) + abs(c):
                return False, d < 0, a < 0
            return True, b < 0, c < 0
    return False, False, False


def check_whole(file: IO[bytes], name: str) -> None:
    """Raise MediaDecodeError if the container itself declares more bytes than the file has (MP4, Matroska, AVI)."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(64)
    end = 0
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        end = _mp4_end(file, size)
    elif head[:4] == b"\x1a\x45\xdf\xa3":
        end = _matroska_end(file)
    elif head[:4] == b"RIFF":
        end = int.from_bytes(head[4:8], "little") + 8
    if end > size:
        raise MediaDecodeError(f"{name} is truncated: {size:,} of {end:,} bytes are there", "fetch or export it again")


def _mp4_end(file: IO[bytes], size: int) -> int:
    at = 0
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        # 0 means "to the end of the file"; whatever else is too short is rubbish behind the last box.
        if length < 8:
            return 0
        if at + length > size:
            return at + length if kind in (b"mdat", b"moov", b"moof") else 0
        at += length
    return 0


def _matroska_end(file: IO[bytes]) -> int:
    """End of the first segment, 0 if it is of unknown size (live recordings)."""

    def number(keep_marker: bool) -> tuple[int, bool]:
        first = file.read(1)
        if not first or not first[0]:
            return 0, True
        length = 9 - first[0].bit_length()
        rest = file.read(length - 1)
        value = int.from_bytes(first + rest, "big")
        mask = (1 << (7 * length)) - 1
        return (value, False) if keep_marker else (value & mask, value & mask == mask)

    file.seek(4)
    length, unknown = number(keep_marker=False)
    file.seek(length, os.SEEK_CUR)
    kind, _ = number(keep_marker=True)
    length, endless = number(keep_marker=False)
    return 0 if unknown or endless or kind != 0x18538067 else file.tell() + length
