"""What the pool and its workers say to one another: a length, JSON, then bytes; and pixels as a file in memory."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import tempfile
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from mirada import config
from mirada.media.grid import Patches
from mirada.media.limits import FetchLimits
from mirada.media.rule import MediaRule
from mirada.types import Image, Video

_HEAD = struct.Struct("<IQ")  # bytes of JSON, bytes that follow it
MOST_HEAD = 1 << 24


def describe(
    part: Image | Video, content: bytes | Path, rule: MediaRule, limits: FetchLimits, cap: int | None, name: str
) -> dict[str, Any]:
    """A job as JSON can say it. Raises TypeError for settings that it cannot."""
    head = {
        "kind": type(part).__name__,
        "part": {field.name: getattr(part, field.name) for field in fields(part) if field.name != "source"},
        "path": os.fspath(content) if isinstance(content, Path) else None,
        "rule": asdict(rule),
        "limits": asdict(replace(limits, file_root=None)) | {"file_root": limits.file_root and os.fspath(limits.file_root)},
        "cap": cap,
        "name": name,
    }
    json.dumps(head)
    return head


def understand(head: dict[str, Any], body: bytes) -> tuple[Image | Video, MediaRule, FetchLimits, int | None, str]:
    """The other way round: part (its source the path or the bytes), rule, limits, cap and name."""
    source = Path(head["path"]) if head["path"] is not None else body
    part = {"Image": Image, "Video": Video}[head["kind"]](source, **head["part"])
    rule, limits = config.parse(MediaRule, head["rule"]), config.parse(FetchLimits, head["limits"])
    return part, rule, limits, head["cap"], head["name"]


def patches_head(made: Patches) -> dict[str, Any]:
    """All of ``made`` but its pixels."""
    rest = {field.name: getattr(made, field.name) for field in fields(made) if field.name not in ("pixels", "key")}
    return rest | {"key": made.key.hex(), "shape": made.pixels.shape}


def patches(head: dict[str, Any], pixels: np.ndarray) -> Patches:
    """The other way round. Raises ValueError for pixels that are not as ``head`` says."""
    times, fast, resized = head["timestamps"], head["fast"], head["resized"]
    return Patches(
        kind=head["kind"],
        pixels=pixels.reshape(head["shape"]),
        grids=tuple((t, h, w) for t, h, w in head["grids"]),
        size=(head["size"][0], head["size"][1]),
        key=bytes.fromhex(head["key"]),
        timestamps=None if times is None else tuple(times),
        fast=None if fast is None else tuple(fast),
        fps=head["fps"],
        notes=tuple(head["notes"]),
        resized=None if resized is None else (resized[0], resized[1]),
    )


def send(link: socket.socket, head: dict[str, Any], body: bytes = b"", deadline: float | None = None) -> None:
    """Raises OSError (TimeoutError past ``deadline``, of time.monotonic)."""
    text = json.dumps(head).encode()
    link.settimeout(_left(deadline))
    link.sendall(_HEAD.pack(len(text), len(body)) + text)
    if body:
        link.settimeout(_left(deadline))
        link.sendall(body)


def receive(link: socket.socket) -> tuple[dict[str, Any], bytes] | None:
    """The next message; None when the other side is gone."""
    try:
        size, rest = _HEAD.unpack(_exactly(link, _HEAD.size, None))
        head = json.loads(_exactly(link, size, None))
        return head, bytes(_exactly(link, rest, None))
    except (EOFError, OSError):
        return None


def send_pixels(link: socket.socket, head: dict[str, Any], pixels: np.ndarray) -> None:
    """``head`` with ``pixels`` in a file of memory without a name, which the receiver gets a handle of."""
    text = json.dumps(head).encode()
    with _nameless() as file:
        _write(file.fileno(), np.ascontiguousarray(pixels).data.cast("B"))
        socket.send_fds(link, [_HEAD.pack(len(text), pixels.nbytes)], [file.fileno()])
    link.sendall(text)


def receive_pixels(link: socket.socket, deadline: float) -> tuple[dict[str, Any], np.ndarray | None]:
    """What a worker answers: a description, and uint8 pixels [bytes] if it made any.

    Raises TimeoutError, EOFError when the worker is gone, ValueError when it makes no sense, other OSError.
    """
    link.settimeout(_left(deadline))
    first, handles, _, _ = socket.recv_fds(link, _HEAD.size, 1)
    try:
        if not first:
            raise EOFError
        first += _exactly(link, _HEAD.size - len(first), deadline)
        size, num_bytes = _HEAD.unpack(first)
        if size > MOST_HEAD:
            raise ValueError(f"a description of {size} bytes")
        head = json.loads(_exactly(link, size, deadline))
        if not isinstance(head, dict):
            raise ValueError("a description that is none")
        if not handles:
            return head, None
        if os.fstat(handles[0]).st_size != num_bytes or math.prod(head["patches"]["shape"]) != num_bytes:
            raise ValueError("pixels of another size than was said")
        return head, _read(handles[0], num_bytes)
    except (KeyError, TypeError) as error:
        raise ValueError(f"a description without {error}") from error
    finally:
        for handle in handles:
            os.close(handle)


def _nameless() -> Any:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("mirada-pixels"), "wb", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _write(handle: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done : done + (1 << 28)], done)


def _read(handle: int, size: int) -> np.ndarray:
    """A copy, not a map of the file: a map would keep the handle open for as long as the pixels are kept."""
    made = np.empty(size, np.uint8)
    view, done = made.data, 0
    while done < size:
        count = os.preadv(handle, [view[done : done + (1 << 28)]], done)
        if not count:
            raise ValueError("pixels that end early")
        done += count
    return made


def _exactly(link: socket.socket, size: int, deadline: float | None) -> bytearray:
    made = bytearray(size)
    view, done = memoryview(made), 0
    while done < size:
        link.settimeout(_left(deadline))
        count = link.recv_into(view[done:])
        if not count:
            raise EOFError
        done += count
    return made


def _left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds
