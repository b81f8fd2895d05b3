"""Bad pictures in one table: each is refused by its own error, in words that name the thing and the fix."""

from __future__ import annotations

import base64
import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media.web import PICTURE, Web, serve
from PIL import Image as pil

from mirada.errors import (
    MediaDecodeError,
    MediaError,
    MediaNotFound,
    MediaRefused,
    MediaTimeout,
    MediaTooLarge,
    MediaUnsupported,
    SettingsError,
)
from mirada.media.limits import FetchLimits
from mirada.media.prepare import prepare, prepare_many
from mirada.media.rule import KEYE_PREVIEW
from mirada.types import Image


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG whose header says any size, whatever its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def saved(image: pil.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


FILES = {
    "ok.png": PICTURE,
    "empty.png": b"",
    "words.png": b"these are only words",
    "half.png": PICTURE[: len(PICTURE) // 2],
    "half.jpg": saved(pil.new("RGB", (200, 200), (9, 99, 199)), "JPEG")[:700],
    "bomb.png": png_of(60_000, 60_000),
    "wide.png": png_of(12_000, 12_000),
    "short.png": png_of(64, 64, b"\0" * 99),
    "textbomb.png": PICTURE[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(4_000_000))) + PICTURE[33:],
    "photo.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "clip.mp4": b"\0\0\0\x18ftypisom\0\0\0\0isomavc1",
    "page.png": b"  <!DOCTYPE html><html></html>",
    "drawing.svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "paper.pdf": b"%PDF-1.7 ...",
    "shop.psd": b"8BPS\0\1",
    "new.jxl": b"\xff\x0a\0\0",
    "print.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "archive.zip": b"PK\x03\x04",
    "deep.tiff": saved(pil.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
    "root/in.png": PICTURE,
}


class World:
    """Files in a folder and a server that misbehaves."""

    def __init__(self, folder: Path, web: Web) -> None:
        self.folder, self.web = folder, web
        (folder / "root").mkdir()
        for name, data in FILES.items():
            (folder / name).write_bytes(data)
        os.mkfifo(folder / "pipe")
        (folder / "root" / "link.png").symlink_to(folder / "ok.png")

    def file(self, name: str) -> str:
        return str(self.folder / name)


LOCAL = FetchLimits(allow_private=True, seconds=10, bytes=500_000)
QUICK = FetchLimits(allow_private=True, seconds=0.4)


@dataclass(frozen=True)
class Row:
    """``source`` is what to open, or makes it of a World; ``words`` must stand in the message."""

    name: str
    source: Any
    error: type[Exception]
    words: tuple[str, ...]
    limits: FetchLimits | Callable[[World], FetchLimits] = LOCAL
    settings: dict[str, Any] = field(default_factory=dict)


def file(name: str) -> Callable[[World], str]:
    return lambda world: world.file(name)


def url(path: str) -> Callable[[World], str]:
    return lambda world: world.web.url(path)


class Tensor:
    """As numpy sees one of torch's."""

    def __array__(self, *_: object) -> np.ndarray:
        return np.zeros((3, 8, 8), np.uint8)


def rooted(world: World) -> FetchLimits:
    return FetchLimits.serving(world.folder / "root")


OK = np.zeros((30, 30, 3), np.uint8)
CROSSED = {"min_pixels": 9000, "max_pixels": 800}
ROWS = (
    Row("no file", file("absent.png"), MediaNotFound, ("absent.png", "check the path")),
    Row("a folder", file("root"), MediaUnsupported, ("not a plain file", "folder")),
    Row("a pipe", file("pipe"), MediaUnsupported, ("not a plain file",)),
    Row("a device", "/dev/zero", MediaUnsupported, ("/dev/zero", "device")),
    Row("base64 without its head", base64.b64encode(bytes(9000)).decode(), MediaNotFound, ("data:image/png;base64,",)),
    Row("an empty file", file("empty.png"), MediaDecodeError, ("empty.png", "empty")),
    Row("words", file("words.png"), MediaDecodeError, ("words.png", "PNG")),
    Row("half a PNG", file("half.png"), MediaDecodeError, ("half.png", "broken")),
    Row("half a JPEG", file("half.jpg"), MediaDecodeError, ("half.jpg", "broken")),
    Row("fewer pixels than said", file("short.png"), MediaDecodeError, ("short.png", "broken")),
    Row("a bomb", file("bomb.png"), MediaTooLarge, ("bomb.png", "FetchLimits.pixels")),
    Row("too many pixels", file("wide.png"), MediaTooLarge, ("wide.png", "FetchLimits.pixels")),
    Row("a bomb in a text chunk", file("textbomb.png"), MediaDecodeError, ("textbomb.png", "broken")),
    Row("HEIC", file("photo.heic"), MediaUnsupported, ("photo.heic", "HEIC", "JPEG")),
    Row("a video", file("clip.mp4"), MediaUnsupported, ("MP4", "Video(")),
    Row("a web page", file("page.png"), MediaUnsupported, ("HTML", "address of the picture")),
    Row("SVG", file("drawing.svg"), MediaUnsupported, ("SVG", "PNG")),
    Row("PDF", file("paper.pdf"), MediaUnsupported, ("PDF", "page")),
    Row("Photoshop", file("shop.psd"), MediaUnsupported, ("Photoshop", "export")),
    Row("JPEG XL", file("new.jxl"), MediaUnsupported, ("JPEG XL", "convert")),
    Row("PostScript", file("print.eps"), MediaUnsupported, ("PostScript", "PNG")),
    Row("an archive", file("archive.zip"), MediaUnsupported, ("zip", "extract")),
    Row("32-bit floats", file("deep.tiff"), MediaUnsupported, ("deep.tiff", "mode F", "8-bit")),
    Row("too many bytes", PICTURE, MediaTooLarge, ("limit of 50", "FetchLimits.bytes"), FetchLimits(bytes=50)),
    Row("no bytes", b"", MediaDecodeError, ("empty",)),
    Row("broken base64", "data:image/png;base64,####", MediaDecodeError, ("broken base64", "b64encode")),
    Row("base64 of words", "data:image/png;base64,aGVsbG8=", MediaDecodeError, ("data:image/png", "known format")),
    Row("data that is not base64", "data:image/png,abc", MediaUnsupported, ("not base64", "data:image/png;base64,")),
    Row("404", url("/missing"), MediaNotFound, ("404", "address")),
    Row("a server error", url("/failing"), MediaNotFound, ("500",)),
    Row("a page for a picture", url("/page"), MediaUnsupported, ("/page", "HTML")),
    Row("a body cut short", url("/cut"), MediaDecodeError, ("/cut", "broke off")),
    Row("a body without end", url("/endless"), MediaTooLarge, ("/endless", "500,000")),
    Row("a gzip bomb", url("/bomb"), MediaTooLarge, ("/bomb", "500,000")),
    Row("a loop", url("/loop"), MediaRefused, ("/loop", "3 times", "FetchLimits.redirects")),
    Row("a server that hangs", url("/hang"), MediaTimeout, ("/hang", "0.4 seconds", "FetchLimits.seconds"), QUICK),
    Row("a server that drips", url("/drip"), MediaTimeout, ("/drip", "0.4 seconds"), QUICK),
    Row("a redirect to a file", url("/to?file:///etc/passwd"), MediaRefused, ("'file'", "http")),
    Row("loopback", url("/picture.png"), MediaRefused, ("127.0.0.1", "FetchLimits.allow_private"), FetchLimits()),
    Row("another scheme", "ftp://example.org/a.png", MediaUnsupported, ("ftp", "https")),
    Row("no host", "https://", MediaUnsupported, ("host", "http(s)://")),
    Row("a password", "https://me:secret@example.org/a.png", MediaUnsupported, ("user name",)),
    Row("a file when serving", "file:///etc/passwd", MediaRefused, ("not allowed", "base64"), FetchLimits.serving()),
    Row("a file outside the root", file("ok.png"), MediaRefused, ("outside the allowed folder",), rooted),
    Row("a link out of the root", file("root/link.png"), MediaRefused, ("outside the allowed folder",), rooted),
    Row("None", None, MediaUnsupported, ("NoneType", "path")),
    Row("a mapping", {"url": "a.png"}, MediaUnsupported, ("dict", "address")),
    Row("an open file", io.BufferedReader(io.BytesIO(PICTURE)), MediaUnsupported, ("BufferedReader", "read()")),
    Row("a tensor", Tensor(), MediaUnsupported, ("Tensor", "permute(1, 2, 0)", "numpy")),
    Row("a float array", np.zeros((8, 8, 3), np.float32), MediaUnsupported, ("float32", "255")),
    Row("a 16-bit array", np.zeros((8, 8, 3), np.uint16), MediaUnsupported, ("uint16", "257")),
    Row("channels first", np.zeros((3, 8, 8), np.uint8), MediaUnsupported, ("(3, 8, 8)", "transpose(1, 2, 0)")),
    Row("many in one array", np.zeros((2, 8, 8, 3), np.uint8), MediaUnsupported, ("(2, 8, 8, 3)", "Video(")),
    Row("an empty array", np.zeros((0, 8, 3), np.uint8), MediaUnsupported, ("(0, 8, 3)", "one pixel")),
    Row("a strip", np.zeros((1, 5000), np.uint8), MediaUnsupported, ("5000", "200 times", "crop or pad")),
    Row("a PIL image of floats", pil.new("F", (8, 8)), MediaUnsupported, ("mode F", "8-bit")),
    Row("bounds that cross", OK, SettingsError, ("min_pixels=9000", "max_pixels=800"), settings=CROSSED),
    Row("a bound below one cell", OK, SettingsError, ("max_pixels=100", "784"), settings={"max_pixels": 100}),
    Row("a bound as text", OK, SettingsError, ("min_pixels='many'", "whole number"), settings={"min_pixels": "many"}),
    Row("one side alone", OK, SettingsError, ("resized_height", "give both"), settings={"resized_width": 56}),
    Row("a size of nothing", OK, SettingsError, ("resized_height=0",), settings={"resized_height": 0, "resized_width": 56}),
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with serve() as web:
        yield World(tmp_path_factory.mktemp("bad"), web)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_media(row: Row, world: World) -> None:
    source = row.source(world) if callable(row.source) else row.source
    limits = row.limits(world) if callable(row.limits) else row.limits
    with pytest.raises((MediaError, SettingsError)) as caught:
        prepare(Image(source, **row.settings), KEYE_PREVIEW, limits)
    assert type(caught.value) is row.error
    message = str(caught.value)
    assert [word for word in row.words if word not in message] == [], message
    assert caught.value.problem and caught.value.fix and "secret" not in message and len(message) < 500


def test_what_the_table_is_about_is_fine_otherwise(world: World) -> None:
    good = [Image(PICTURE), Image(world.file("ok.png")), Image(world.web.url("/picture.png")), Image(OK)]
    local = FetchLimits(allow_private=True)
    assert len({made.key for made in prepare_many(good, KEYE_PREVIEW, local)[:3]}) == 1
    assert prepare(Image(world.file("root/in.png")), KEYE_PREVIEW, rooted(world)).size == (30, 40)
    assert len(ROWS) >= 25 and len({row.name for row in ROWS}) == len(ROWS)
