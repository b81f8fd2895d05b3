"""From a source (path, address, base64, bytes) to bytes, under limits. ``download`` holds the network half."""

from __future__ import annotations

import base64
import binascii
import errno
import os
import re
import stat
from pathlib import Path
from urllib.parse import unquote

from mirada.errors import (
    MediaDecodeError,
    MediaError,
    MediaNotFound,
    MediaRefused,
    MediaUnsupported,
)
from mirada.media.limits import Allowance, FetchLimits, show, too_large

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):", re.IGNORECASE)  # two letters or more: C:\ is a drive


def is_remote(source: object) -> bool:
    """Whether a source lies on another machine."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def fetch(source: object, limits: FetchLimits, *, max_bytes: int | None = None) -> bytes:
    """The bytes behind a path (str or Path), ``file://``, ``http(s)://``, ``data:`` URI or bytes.

    ``max_bytes`` overrides ``limits.bytes``. Raises a MediaError: MediaNotFound, MediaRefused, MediaTooLarge, MediaTimeout,
    MediaDecodeError (base64, connection cut short), MediaUnsupported (scheme, type).
    """
    found = locate(source, limits, max_bytes=max_bytes)
    return read_file(found, limits, max_bytes=max_bytes) if isinstance(found, Path) else found


def locate(
    source: object, limits: FetchLimits, *, max_bytes: int | None = None, allowance: Allowance | None = None
) -> bytes | Path:
    """As :func:`fetch`, but a local file is only checked and returned as its resolved path, unread. ``allowance`` bounds a
    download further; its bytes are counted as they come."""
    most = limits.bytes if max_bytes is None else max_bytes
    if isinstance(source, bytes | bytearray | memoryview):
        return _bytes(source, most)
    if isinstance(source, os.PathLike):
        return _path(os.fspath(source), limits)
    if not isinstance(source, str):
        raise MediaUnsupported(f"a media source is a {type(source).__name__}", _instead(source))
    scheme = match[1].lower() if (match := _SCHEME.match(source)) else ""
    if scheme in ("http", "https"):
        from mirada.media.download import download  # httpx takes 0.1 s to load

        return download(source, limits, most, allowance)
    if scheme == "data":
        return _data(source, most)
    if scheme == "file":
        return _path(_file_url(source), limits)
    if "://" in source[:40]:
        raise MediaUnsupported(
            f"{show(source)}: the scheme {scheme or 'before ://'} is not handled", "use http, https, file or data"
        )
    return _path(source, limits)


def _instead(source: object) -> str:
    """What to give in the place of an object that is no source."""
    if hasattr(source, "read"):
        return "give the bytes that its read() returns"
    if hasattr(source, "__array__"):
        return (
            "give a numpy array of uint8, [H, W, 3]; of a tensor [3, H, W] of that type: tensor.permute(1, 2, 0).cpu().numpy()"
        )
    return "give a path, an http(s), file or data address, bytes, or a picture"


def _bytes(data: bytes | bytearray | memoryview, most: int) -> bytes:
    size = memoryview(data).nbytes
    if size > most:
        raise too_large("the data", most, size)
    if not size:
        raise MediaDecodeError("the data is empty", "give the bytes of a whole picture or video")
    return bytes(data)


def _data(uri: str, most: int) -> bytes:
    """RFC 2397 with base64. The subtype may be missing, white space, URL-safe letters and absent padding are accepted."""
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise MediaUnsupported(
            f"{show(uri)} is not base64", "write data:image/png;base64,… with the encoded bytes after the comma"
        )
    if len(body) * 3 // 4 > most + most // 16:  # before anything is copied; some room for line breaks
        raise too_large(show(uri), most)
    if "%" in body:
        body = unquote(body)
    body = "".join(body.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        data = base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: letters beyond ASCII
        raise MediaDecodeError(
            f"{show(uri)} holds broken base64 ({error})", "encode the bytes with base64.b64encode"
        ) from error
    if len(data) > most:
        raise too_large(show(uri), most, len(data))
    if not data:
        raise MediaDecodeError(f"{show(uri)} is empty", "put the encoded bytes after the comma")
    return data


def _file_url(url: str) -> str:
    rest = url[5:]
    if rest.startswith("//"):
        host, slash, tail = rest[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise MediaUnsupported(f"{show(url)} names the host {host!r}", "write file:///absolute/path, with three slashes")
        rest = slash + tail
    return unquote(rest)


def _path(name: str | bytes, limits: FetchLimits) -> Path:
    """The resolved path of a file that may be read. What lies outside the root is refused whether or not it exists."""
    shown = show(os.fsdecode(name))
    if not limits.allow_files:
        raise MediaRefused(
            f"{shown}: reading files is not allowed here", "send the picture as base64 data or as an http(s) address"
        )
    try:
        path = Path(os.fsdecode(name)).resolve()
        if limits.file_root is not None and not path.is_relative_to(limits.file_root.resolve()):
            raise MediaRefused(f"{shown} lies outside the allowed folder", "put the file under the folder that may be read")
        mode = path.stat().st_mode
    except MediaError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: NUL in the name; RuntimeError: a loop of links
        raise _no_file(shown, error) from error
    if not stat.S_ISREG(mode):
        raise MediaUnsupported(f"{shown} is not a plain file", "give the path of a file, not of a folder, pipe or device")
    return path


def _no_file(shown: str, error: Exception) -> MediaNotFound:
    if isinstance(error, PermissionError):
        return MediaNotFound(f"{shown} may not be read", "change its permissions or copy it")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return MediaNotFound(f"{shown} is too long for a path", "put data:image/png;base64, before base64 text")
    return MediaNotFound(f"there is no file {shown}", "check the path; base64 text needs data:image/png;base64, before it")


def read_file(path: Path, limits: FetchLimits, *, max_bytes: int | None = None) -> bytes:
    """The bytes of a path from :func:`locate`. A link put there since, a pipe or a device is refused, never followed."""
    most = limits.bytes if max_bytes is None else max_bytes
    try:
        # O_NONBLOCK: opening a pipe must not wait for a writer. O_NOFOLLOW: the path was resolved before.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
    except OSError as error:
        raise _no_file(show(path), error) from error
    with os.fdopen(handle, "rb") as file:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise MediaUnsupported(f"{show(path)} is not a plain file", "give the path of a file, not of a pipe or device")
        if facts.st_size > most:
            raise too_large(show(path), most, facts.st_size)
        data = file.read(most + 1)
    if len(data) > most:
        raise too_large(show(path), most)
    if not data:
        raise MediaDecodeError(f"{show(path)} is empty", "give a whole picture or video")
    return data
