"""What people hand to ``ask``: sources of any kind become typed parts; a video is told by its bytes, then by its name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mirada.errors import MediaNotFound, MessageError, SettingsError
from mirada.media.fetch import locate
from mirada.media.limits import FetchLimits, show
from mirada.table import nearest
from mirada.types import Image, Message, Part, Prompt, Sampling, Text, Video

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".flv", ".wmv", ".3gp", ".ogv")
)
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".ico"))
# Still pictures live in the same container as MP4; the brand tells them apart.
STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1", b"hevc", b"hevx")
HEAD = 64
"""Bytes of a file that tell what it is."""

_SAMPLING = frozenset(field.name for field in fields(Sampling))
_IMAGE = frozenset(field.name for field in fields(Image)) - {"source"}
_VIDEO = frozenset(field.name for field in fields(Video)) - {"source"}


def question(inputs: tuple[Any, ...], text: str | None, options: Mapping[str, Any], limits: FetchLimits) -> Message:
    """The user's turn for ``ask``: media in the order given, then the text (the last input unless ``text`` is given)."""
    if text is None and inputs and is_source(inputs[-1]):
        raise MessageError(
            f"the question is missing: the last input, {show(inputs[-1])}, is a picture or video",
            'the question comes last: ask("photo.jpg", "What is this?")',
        )
    *media, text = (inputs or (None,)) if text is None else (*inputs, text)
    if not isinstance(text, str):
        raise MessageError("the question is missing", 'it comes last: ask("photo.jpg", "What is this?")')
    if not text.strip():
        raise MessageError("the question is empty", "say what you want to know about the media")
    parts = [as_part(source, limits) for source in _flat(media)]
    return Message("user", (*with_settings(parts, options), Text(text)))


def is_source(given: Any) -> bool:
    """Whether text names a file or has the look of a picture's or video's name or address, as no question has."""
    if not isinstance(given, str):
        return False
    return os.path.isfile(given) or given[:11].lower() in ("data:image/", "data:video/") or (
        _suffix(given) in VIDEO_SUFFIXES | IMAGE_SUFFIXES and not any(letter.isspace() for letter in given)
    )  # fmt: skip


def chats(given: Any) -> list[Any]:
    """What ``generate`` is given, as a list of chats; each of them is looked at later, by itself. MessageError for one chat,
    and for what is no row of chats at all."""
    fix = "give a list of chats, also of one: generate([chat])"
    if isinstance(given, str | bytes | Message | Prompt | Mapping) or not isinstance(given, Iterable):
        raise MessageError(f"chats are given as a {type(given).__name__}", fix)
    made = list(given)
    if made and all(isinstance(one, Message | Mapping) for one in made):
        raise MessageError(
            "generate takes a list of chats, and is given one chat: a list of messages", f"wrap it in a list; {fix}"
        )
    return made


def system_turn(system: str | None) -> list[Message]:
    """The system turn, if one is wanted."""
    return [] if system is None else [Message("system", system)]


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options by name into those of sampling and those of media; SettingsError names an unknown one and the nearest."""
    known = _SAMPLING | _IMAGE | _VIDEO
    for name in options:
        if name not in known:
            raise SettingsError(f"ask has no option {name!r}", nearest(name, known))
    given = {name: value for name, value in options.items() if value is not None}
    return (
        {name: value for name, value in given.items() if name in _SAMPLING},
        {name: value for name, value in given.items() if name not in _SAMPLING},
    )


def with_settings(parts: list[Part], options: Mapping[str, Any]) -> list[Part]:
    """Every picture and video with the ``options`` that its kind knows, unless it has settings of its own."""
    kinds = {type(part) for part in parts}
    for name in options:
        if not (Image in kinds and name in _IMAGE) and not (Video in kinds and name in _VIDEO):
            needs = "a picture or video" if name in _IMAGE else "a video"
            raise SettingsError(f"the option {name} is for {needs}, and none is given", f"leave {name} out")
    made: list[Part] = []
    for part in parts:
        if isinstance(part, Image | Video):
            own = _IMAGE if isinstance(part, Image) else _VIDEO
            part = replace(part, **{n: v for n, v in options.items() if n in own and getattr(part, n) is None})
        made.append(part)
    return made


def as_part(source: Any, limits: FetchLimits) -> Part:
    """One source as a part. Addresses that do not say what they hold are fetched to see; raises MediaError."""
    if isinstance(source, Image | Video | Text):
        return source
    if getattr(source, "ndim", None) == 4:
        return Video(source)
    if not isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        return Image(source)
    suffix = _suffix(source)
    if isinstance(source, str) and source[:4].lower() == "http" and suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        return Video(source) if suffix in VIDEO_SUFFIXES else Image(source)
    found = locate(source, limits, max_bytes=limits.video_bytes)
    told = is_video(_head(found))
    if told is None:
        told = suffix in VIDEO_SUFFIXES
    # What was downloaded is not downloaded again; a file keeps its name for messages.
    kept = source if isinstance(found, Path) else found
    return Video(kept) if told else Image(kept)


def is_video(head: bytes) -> bool | None:
    """Whether a file that begins so is a video; None if it cannot be told."""
    if head[4:8] == b"ftyp":
        return head[8:12] not in STILL_BRANDS
    if head[:4] == b"RIFF":
        return head[8:12] == b"AVI "
    if head.startswith((b"\x1a\x45\xdf\xa3", b"FLV\x01", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3", b"OggS")):
        return True
    if head[:4] == b"\x30\x26\xb2\x75":  # ASF, the container of WMV
        return True
    if head[4:8] in (b"moov", b"mdat", b"wide", b"free"):
        return True
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")):
        return False
    return None


def _flat(media: Iterable[Any]) -> Iterable[Any]:
    for item in media:
        if isinstance(item, list | tuple):
            yield from _flat(item)
        else:
            yield item


def _head(found: bytes | Path) -> bytes:
    if isinstance(found, bytes):
        return found[:HEAD]
    try:
        with found.open("rb") as file:
            return file.read(HEAD)
    except OSError as error:
        raise MediaNotFound(f"{show(found)} cannot be read ({error})", "check its permissions") from error


def _suffix(source: Any) -> str:
    if isinstance(source, str) and source[:5].lower() in ("http:", "https"):
        try:
            source = urlsplit(source).path
        except ValueError:
            return ""
    if isinstance(source, str | os.PathLike):
        return os.path.splitext(os.fsdecode(source)[-200:])[1].lower()
    return ""


def each(what: str, given: Any, count: int, *single: type) -> list[Any]:
    """What each of ``count`` chats has of ``given``: all the same where it is None or one of ``single``. MessageError."""
    if given is None or (single and isinstance(given, single)):
        return [given] * count
    fix = "give one for all, or one per chat" if single else "give a list, one per chat"
    if not isinstance(given, Seq):
        raise MessageError(f"{what} are given as a {type(given).__name__}", fix)
    if len(given) != count:
        raise MessageError(f"{len(given)} {what} for {count} chats", fix)
    return list(given)
