"""One picture or video on its way to patches: loaded, measured by its header, looked up, then prepared here or by the pool.

``Task`` is what one chat does with it; ``prepare_here`` is what a worker of the pool does.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as pil

from mirada.errors import MediaUnsupported
from mirada.media.cache import PixelCache, source_key
from mirada.media.fetch import is_remote, locate, read_file
from mirada.media.grid import Patches, Room, content_key
from mirada.media.image import Picture, decode, header_pixels, header_size, open_image, resize
from mirada.media.limits import Allowance, FetchLimits, show
from mirada.media.plan import Plan, Sizes, check_item
from mirada.media.rule import MediaRule
from mirada.media.times import Times
from mirada.types import Image, Video

if TYPE_CHECKING:
    from mirada.media.pool import Cancel, Job, Pool

LARGE_PIXELS = 1 << 21
"""Pictures of at least so many pixels (by their header) are prepared by a process; smaller ones are done sooner than sent."""


@dataclass(slots=True)
class Loaded:
    """A picture whose source was fetched: bytes, a PIL image or an array; ``name`` is what messages call it."""

    part: Image
    source: bytes | pil.Image | np.ndarray
    name: str
    picture: Picture | None = None
    """Where it was opened already."""

    @property
    def source_size(self) -> tuple[int, int] | None:
        """(height, width) of what was given decoded."""
        if isinstance(self.source, pil.Image):
            return self.source.height, self.source.width
        shape = getattr(self.source, "shape", ())
        return (int(shape[0]), int(shape[1])) if len(shape) >= 2 and min(shape[:2]) > 0 else None

    def open(self, limits: FetchLimits, rule: MediaRule) -> Picture:
        if self.picture is not None:
            return self.picture
        if isinstance(self.source, bytes):
            return decode(self.source, limits, rule.alpha, self.name)
        return open_image(self.source, limits, rule.alpha)


def load(
    part: Image | Video, rule: MediaRule, limits: FetchLimits, allowance: Allowance | None, times: Times, name: str
) -> Loaded | Video:
    if not isinstance(part, Image | Video):
        raise MediaUnsupported(f"a {type(part).__name__} is neither picture nor video", "wrap it in Image(...) or Video(...)")
    check_item(part, rule.grid)
    if isinstance(part, Video):
        if rule.video is None:
            raise MediaUnsupported(
                "this model takes pictures, no videos", "give frames of the video as pictures: Image(frame), Image(frame), ..."
            )
        return part
    source = part.source
    if not isinstance(source, pil.Image | np.ndarray):
        with times.stage("fetch"):
            found = locate(source, limits, allowance=allowance)
            source = read_file(found, limits) if isinstance(found, Path) else found
            if allowance is not None and not is_remote(part.source):  # what came from elsewhere was counted as it came
                allowance.take(len(source))
    return Loaded(replace(part, source=None), source, name)


@dataclass(frozen=True, slots=True)
class Means:
    """With what the media of one chat are prepared."""

    rule: MediaRule
    limits: FetchLimits
    cache: PixelCache | None
    pool: Pool | None
    cancel: Cancel | None
    times: Times
    salt: str
    room: Room
    allowance: Allowance


class Task:
    """One picture or video: ``load``, ``measure``, ``start`` (look into the cache, prepare or hand to the pool), ``finish``."""

    def __init__(self, part: Image | Video, means: Means, keep: bool = False, cap: int | None = None) -> None:
        self.part, self.means, self.cap = part, means, cap
        self.name = show(part.source) if isinstance(part, Image | Video) else ""
        self.fetched = False
        """Its source was an address, whose bytes are here by now."""
        self.item: Loaded | Video | None = None
        self.made: Patches | None = None
        self._keep = keep
        self._key: bytes | None = None
        self._job: Job | None = None
        self._file: Path | None = None
        self._stamp: object = None
        self._counted = False
        """The bytes that it brought along were taken from what the request may have."""
        self._other: threading.Event | None = None
        """Somebody else prepares the same."""

    def capped(self, cap: int) -> Task:
        """The same picture, which is not fetched again, in at most ``cap`` pixels."""
        made = Task(self.part, self.means, cap=cap)
        made.item, made.name = self.item, self.name
        return made

    @property
    def waits(self) -> bool:
        return self._other is not None

    def load(self) -> None:
        means = self.means
        if means.cancel is not None:
            means.cancel.check()
        allowance = None if self.fetched else means.allowance
        self.item = load(self.part, means.rule, means.limits, allowance, means.times, self.name)

    def measure(self) -> None:
        """Take room for a picture by what its header says of its size; a video's is known once it is open."""
        means, item = self.means, self.item
        if not isinstance(item, Loaded):
            return
        size = header_size(item.source) if isinstance(item.source, bytes) else item.source_size
        if size is None:  # nobody can say: opening it will
            return
        means.allowance.decode(size[0] * size[1])
        try:
            high, wide = Plan(item.part, means.rule, size).sizes(self.cap)[-1]
        except MediaUnsupported:  # a form that is not taken: opening it says so with a better name
            return
        means.room.take(high * wide // means.rule.grid.factor**2, f"the picture {self.name}")

    def start(self) -> None:
        if self.item is None:
            self.load()
        if self.means.cancel is not None:
            self.means.cancel.check()
        item = self.item
        assert item is not None
        if isinstance(item, Video):
            self._start_video(item)
        else:
            self._start_image(item)

    def finish(self) -> Patches:
        while self._other is not None:  # what somebody else prepares, or, should that fail, this one after all
            self._other.wait()
            self._other = None
            self.start()
        if self._job is not None:
            self.made = self._job.result()
            for name, seconds in self._job.times.items():
                self.means.times.add(name, seconds)
            self._done()
        assert self.made is not None
        if self.made.kind == "video":
            self.means.room.take(self.made.num_tokens(self.means.rule.grid.merge), f"the video {self.name}")
        if not self._keep:
            self.item = None
        return self.made

    def abandon(self) -> None:
        """Leave nothing behind; harmless for what is finished."""
        if self._job is not None:
            self._job.cancel()
        self._release()

    def _start_image(self, item: Loaded) -> None:
        means = self.means
        if means.cache is not None:
            # What was given decoded saves only its resize; its key is the pixels that the resize starts from.
            facts = None
            if not isinstance(item.source, bytes):
                with means.times.stage("decode_media"):
                    item.picture = item.open(means.limits, means.rule)
                facts = item.picture.size, item.picture.notes
            content = item.source if isinstance(item.source, bytes) else item.picture.rgb.tobytes()  # type: ignore[union-attr]
            if self._known(
                source_key(content, "image", item.part, means.rule, means.limits.pixels, self.cap, facts, means.salt)
            ):
                return
        if means.pool is not None and isinstance(item.source, bytes) and header_pixels(item.source) >= LARGE_PIXELS:
            self._send(item.part, item.source, item.name)
        if self._job is None:
            self.made = _cut(item, means.rule, means.limits, self.cap, means.times)
            self._done()

    def _start_video(self, part: Video) -> None:
        means = self.means
        content = None
        if isinstance(part.source, str | bytes | os.PathLike):
            with means.times.stage("fetch"):
                content = locate(part.source, means.limits, max_bytes=means.limits.video_bytes, allowance=means.allowance)
                if isinstance(content, bytes) and not self.fetched and not self._counted:
                    self._counted = True  # it may start again, after another that prepared the same
                    means.allowance.take(len(content))
        if content is not None and means.cache is not None:
            with means.times.stage("fetch"):
                if isinstance(content, Path):
                    self._file, self._stamp = content, _stamp(content)
                key = source_key(content, "video", replace(part, source=None), means.rule, means.limits, means.salt)
            if self._known(key):
                return
        if content is not None and means.pool is not None:
            from mirada.media.sample import check_settings

            check_settings(part)
            self._send(part, content, f"the video {self.name}")
        if self._job is None:
            source = part.source if content is None else content
            self.made = _film(replace(part, source=source), means.rule, means.limits, means.times, means.room.left)
            self._done()

    def _known(self, key: bytes) -> bool:
        """Whether nothing is to be done: it is there, or somebody is at it. Else it is this task's to prepare."""
        cache = self.means.cache
        assert cache is not None
        if self._key is None and (event := cache.claim(key)) is not None:
            self._other = event
            return True
        self._key = key
        if (found := cache.get(key)) is None:
            return False
        self.made = found
        self._release()
        return True

    def _send(self, part: Image | Video, content: bytes | Path, name: str) -> None:
        means = self.means
        assert means.pool is not None
        cap = means.room.left if isinstance(part, Video) else self.cap
        self._job = means.pool.submit(part, content, means.rule, means.limits, cap, name)
        if self._job is not None and means.cancel is not None:
            means.cancel.add(self._job)

    def _done(self) -> None:
        cache = self.means.cache
        if self._key is not None and cache is not None and self.made is not None:
            # A file that changed while it was read may have given pixels that are not of the content in the key.
            if self._file is None or self._stamp == _stamp(self._file):
                cache.put(self._key, self.made)
            self._release()

    def _release(self) -> None:
        if self._key is not None and self.means.cache is not None:
            self.means.cache.release(self._key)
            self._key = None


def prepare_here(
    part: Image | Video, rule: MediaRule, limits: FetchLimits, cap: int | None, name: str, times: Times
) -> Patches:
    """What a worker does: ``part`` with bytes or a checked path as its source, and nothing kept. ``cap``: of a picture its most
    pixels, of a video its most tokens."""
    if isinstance(part, Image):
        return _cut(Loaded(replace(part, source=None), part.source, name), rule, limits, cap, times)
    return _film(part, rule, limits, times, cap)


def _cut(item: Loaded, rule: MediaRule, limits: FetchLimits, cap: int | None, times: Times) -> Patches:
    with times.stage("decode_media"):
        picture = item.open(limits, rule)
    with times.stage("prepare"):
        return _patches(picture, item.part, rule, cap)


def _patches(picture: Picture, part: Image, rule: MediaRule, cap: int | None) -> Patches:
    sizes = sizes_of(picture, part, rule, cap)
    resized = picture.rgb
    bordered = rule.grid.border != "stretch"
    for high, wide in sizes[:-1] if bordered else sizes:
        resized = resize(resized, high, wide, rule)
    high, wide = sizes[-1]
    frame = np.asarray(resized)
    pixels = rule.grid.patchify((rule.grid.frame(frame, high, wide) if bordered else frame)[None])
    grids = ((1, high // rule.grid.patch, wide // rule.grid.patch),)
    key = content_key(pixels, "image", grids, rule.grid)
    notes = (*picture.notes, *Plan(part, rule, picture.size).notes())
    return Patches("image", pixels, grids, picture.size, key, notes=notes, resized=sizes[-2] if bordered else None)


def _film(part: Video, rule: MediaRule, limits: FetchLimits, times: Times, most_tokens: int | None) -> Patches:
    from mirada.media.video import prepare_video  # PyAV takes long to load, and pictures do not need it

    return prepare_video(part, rule, limits, times=times, most_tokens=most_tokens)


def sizes_of(picture: Picture, part: Image, rule: MediaRule, cap: int | None) -> Sizes:
    try:
        return Plan(part, rule, picture.size).sizes(cap)
    except MediaUnsupported as error:
        raise MediaUnsupported(f"{picture.name}: {error.problem}", error.fix) from error


def _stamp(path: Path) -> object:
    """Changes when a file does."""
    try:
        facts = path.stat()
    except OSError:
        return object()  # equal to nothing
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns
