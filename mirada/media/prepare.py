"""The front door of media: a picture or video in, patches out.

A picture passes two resizes, as with the references: the one of the family's utility package (``rule.first``; settings of the
one picture override it), then the image processor's, whose bounds (``rule.grid``) always hold.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as pil

from mirada.errors import MediaError, MediaTooLarge, MediaUnsupported, RequestFailed, SettingsError
from mirada.media.cache import PixelCache, source_key
from mirada.media.fetch import Allowance, FetchLimits, is_remote, locate, read_file, show
from mirada.media.grid import GridRule, Patches, Room, content_key, fit
from mirada.media.image import Picture, decode, header_pixels, header_size, open_image, resize
from mirada.media.rule import MediaRule, check_bounds
from mirada.media.times import Times
from mirada.types import LARGEST, Image, Video

if TYPE_CHECKING:
    from mirada.media.pool import Cancel, Job, Pool

SIDE_BY_SIDE = 8
"""Addresses of one request that are fetched at a time."""
LARGE_PIXELS = 1 << 21
"""Pictures of at least so many pixels (by their header) are prepared by a process; smaller ones are done sooner than sent."""

_Sizes = tuple[tuple[int, int], ...]
"""(height, width) after each resize, in order; the last after the border, where the rule gives one."""


def prepare(
    part: Image | Video, rule: MediaRule, limits: FetchLimits | None = None, *, cache: PixelCache | None = None
) -> Patches:
    """Fetch, decode, resize and cut one picture or video. Raises MediaError, or SettingsError for its settings."""
    return prepare_many([part], rule, limits, cache=cache)[0]


def prepare_many(
    parts: Sequence[Image | Video],
    rule: MediaRule,
    limits: FetchLimits | None = None,
    total_pixels: int | None = None,
    *,
    cache: PixelCache | None = None,
    pool: Pool | None = None,
    cancel: Cancel | None = None,
    times: Times | None = None,
    salt: str = "",
    most_tokens: int | None = None,
) -> list[Patches]:
    """Prepare all of one chat, in order; errors say which one.

    Addresses are fetched side by side, each once, within what ``limits`` has for one request. Before the first pixel is decoded
    the headers of all pictures are read, and before room is made for a video its size is known: what would become more than
    ``most_tokens`` tokens of a prompt raises ContextOverflow.

    ``total_pixels`` bounds the resized area of all pictures together (videos have a budget of their own). When it is
    exceeded the largest pictures shrink to one common area, the others stay, and ``notes`` of each that shrank say so; nothing
    is dropped. Raises MediaTooLarge if the budget does not hold them at their least sizes.

    What ``cache`` holds is found by calls with the same ``salt`` alone.
    ``pool`` takes over what is large, several at a time; ``cancel`` ends that. ``times`` takes the seconds of ``fetch``,
    ``decode_media`` and ``prepare`` (resize and cut). Also raises RequestFailed: a worker died, or ``cancel``.
    """
    times = Times() if times is None else times
    kept = cache if cache is not None and cache.max_bytes else None
    limits = limits or FetchLimits()
    _check_count(parts, limits)
    allowance = Allowance(limits)
    means = _Means(rule, limits, kept, pool, cancel, times, salt, Room(most_tokens), allowance)
    if total_pixels is not None and (isinstance(total_pixels, bool) or not isinstance(total_pixels, int) or total_pixels < 1):
        raise SettingsError(f"total_pixels={total_pixels!r} is not a positive whole number", "give an area in pixels, or None")
    tasks = [_Task(part, means, keep=total_pixels is not None) for part in parts]
    _fetch(tasks, means)
    for step in (_Task.load, _Task.measure):
        for i, task in enumerate(tasks):
            _named(partial(step, task), i, len(tasks))
    made = _all(tasks)
    # Fetched once (compressed bytes are small); only what must shrink is decoded a second time.
    pictures = {i: task.item for i, task in enumerate(tasks) if isinstance(task.item, _Loaded)}
    area = {i: _area(made[i], rule.grid) for i in pictures}
    if total_pixels is None or sum(area.values()) <= total_pixels:
        return made
    plans = {i: _Plan(item.part, rule, made[i].size) for i, item in pictures.items()}
    cap = _common_cap(plans, total_pixels, max(area.values()))
    shrinking = [i for i in pictures if plans[i].area(cap) < area[i]]
    for i, small in zip(shrinking, _all([tasks[i].capped(cap) for i in shrinking]), strict=True):
        note = f"shrunk from {area[i]:,} to {_area(small, rule.grid):,} pixels to share total_pixels={total_pixels:,}"
        made[i] = replace(small, notes=(*small.notes, note))
    return made


def prepare_here(
    part: Image | Video, rule: MediaRule, limits: FetchLimits, cap: int | None, name: str, times: Times
) -> Patches:
    """What a worker does: ``part`` with bytes or a checked path as its source, and nothing kept. ``cap``: of a picture its most
    pixels, of a video its most tokens."""
    if isinstance(part, Image):
        return _cut(_Loaded(replace(part, source=None), part.source, name), rule, limits, cap, times)
    return _film(part, rule, limits, times, cap)


def resize_first(part: Image, rule: MediaRule, limits: FetchLimits | None = None) -> pil.Image:
    """The upright RGB picture after the first resize alone: what ``fetch_image`` of the utility packages returns.

    Raises as :func:`prepare`, and SettingsError for a rule without a first stage.
    """
    if rule.first is None:
        raise SettingsError("this media rule has no first stage", "use prepare")
    limits = limits or FetchLimits()
    item = _load(part, rule, limits, None, Times(), show(part.source))
    if not isinstance(item, _Loaded):
        raise MediaUnsupported("a Video is not a picture", "give an Image")
    picture = item.open(limits, rule)
    high, wide = _sizes(picture, item.part, rule, None)[0]
    return resize(picture.rgb, high, wide, rule)


def check_item(part: Image | Video, grid: GridRule) -> None:
    """Raise SettingsError if a picture's or video's size settings are malformed or contradict one another."""
    names = ("min_pixels", "max_pixels", "resized_height", "resized_width")
    for name in names:
        value = getattr(part, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST):
            raise SettingsError(
                f"{name}={value!r} is not a positive whole number, or too large",
                "give pixels, or None for the model's default",
            )
    if (part.resized_height is None) != (part.resized_width is None):
        raise SettingsError(
            "only one of resized_height and resized_width is given", "give both, or max_pixels to keep the ratio"
        )
    if part.min_pixels is not None or part.max_pixels is not None:
        low = 1 if part.min_pixels is None else int(part.min_pixels)
        high = max(low, grid.factor**2) if part.max_pixels is None else int(part.max_pixels)
        check_bounds(low, high, grid.factor)


@dataclass(frozen=True, slots=True)
class _Plan:
    """The resizes that one picture of ``size`` (height, width) goes through."""

    part: Image
    rule: MediaRule
    size: tuple[int, int]

    def sizes(self, cap: int | None = None) -> _Sizes:
        """Sizes after each resize; ``cap`` lowers the last bound, but for whole cells not below the least area that the rule
        or the picture asks for."""
        part, grid = self.part, self.rule.grid
        low, high = grid.min_pixels, grid.max_pixels
        stages: list[tuple[int, int]] = []
        if self.rule.first is not None:
            stages.append(self._first(self.rule.first.min_pixels, self.rule.first.max_pixels))
        elif part.resized_height is not None:
            stages.append(self._first(low, high))
        else:
            low, high = _bounds(part, low, high)
        if cap is not None:
            high = max(min(high, cap), low)
        last = replace(grid, min_pixels=low, max_pixels=high)
        size = stages[-1] if stages else self.size
        if grid.border != "stretch":
            stages.append(last.shrink(*size))
        stages.append(last.fit(*size))
        if self.rule.first is not None:  # the last resize will not hold what the first was asked to enlarge
            self.rule.check_resize(stages[0], self.size)
        return tuple(stages)

    def _first(self, low: int, high: int) -> tuple[int, int]:
        part, factor = self.part, self.rule.grid.factor
        if part.resized_height is not None and part.resized_width is not None:
            size = part.resized_height, part.resized_width
        else:
            size = self.size
            low, high = _bounds(part, low, high)
        return fit(*size, factor=factor, min_pixels=low, max_pixels=high, enlarge=False)

    def area(self, cap: int | None = None) -> int:
        high, wide = self.sizes(cap)[-1]
        return high * wide

    def notes(self) -> tuple[str, ...]:
        """What the model's bounds changed about what the caller asked for."""
        sizes = self.sizes()
        part, final = self.part, sizes[-1]
        area = final[0] * final[1]
        last = "the bounds of the model's image processor hold last (min_pixels, max_pixels of the model change them)"
        if part.resized_height is not None:
            asked = part.resized_height, part.resized_width
            if asked != final:
                return (f"asked for {asked[1]}x{asked[0]}, resized to {final[1]}x{final[0]}: sides are multiples of "
                        f"{self.rule.grid.factor}, and {last}",)  # fmt: skip
        elif self.rule.first is not None and sizes[0] != final and (part.max_pixels is not None or part.min_pixels is not None):
            return (f"the settings of this picture gave {sizes[0][1]}x{sizes[0][0]}, it became {final[1]}x{final[0]}: {last}",)
        elif part.max_pixels is not None and area > part.max_pixels:
            grid = self.rule.grid
            why = "no side is cut below" if grid.border == "stretch" else "sides are filled up to multiples of"
            return (f"{final[1]}x{final[0]} exceeds max_pixels={part.max_pixels}: {why} {grid.factor}",)
        return ()


def _bounds(part: Image, low: int, high: int) -> tuple[int, int]:
    """The bounds of one picture over the defaults; a default gives way where it contradicts what was asked."""
    asked_low, asked_high = part.min_pixels, part.max_pixels
    new_low = low if asked_low is None else int(asked_low)
    new_high = high if asked_high is None else int(asked_high)
    if asked_low is None:
        new_low = min(new_low, new_high)
    if asked_high is None:
        new_high = max(new_low, new_high)
    return new_low, new_high


@dataclass(slots=True)
class _Loaded:
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


def _load(
    part: Image | Video, rule: MediaRule, limits: FetchLimits, allowance: Allowance | None, times: Times, name: str
) -> _Loaded | Video:
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
    return _Loaded(replace(part, source=None), source, name)


@dataclass(frozen=True, slots=True)
class _Means:
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


class _Task:
    """One picture or video: ``load``, ``measure``, ``start`` (look into the cache, prepare or hand to the pool), ``finish``."""

    def __init__(self, part: Image | Video, means: _Means, keep: bool = False, cap: int | None = None) -> None:
        self.part, self.means, self.cap = part, means, cap
        self.name = show(part.source) if isinstance(part, Image | Video) else ""
        self.fetched = False
        """Its source was an address, whose bytes are here by now."""
        self.item: _Loaded | Video | None = None
        self.made: Patches | None = None
        self._keep = keep
        self._key: bytes | None = None
        self._job: Job | None = None
        self._file: Path | None = None
        self._stamp: object = None
        self._other: threading.Event | None = None
        """Somebody else prepares the same."""

    def capped(self, cap: int) -> _Task:
        """The same picture, which is not fetched again, in at most ``cap`` pixels."""
        made = _Task(self.part, self.means, cap=cap)
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
        self.item = _load(self.part, means.rule, means.limits, allowance, means.times, self.name)

    def measure(self) -> None:
        """Take room for a picture by what its header says of its size; a video's is known once it is open."""
        means, item = self.means, self.item
        if not isinstance(item, _Loaded):
            return
        size = header_size(item.source) if isinstance(item.source, bytes) else item.source_size
        if size is None:  # nobody can say: opening it will
            return
        means.allowance.decode(size[0] * size[1])
        try:
            high, wide = _Plan(item.part, means.rule, size).sizes(self.cap)[-1]
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
            grid = self.means.rule.grid
            tokens = sum(t * h * w for t, h, w in self.made.grids) // grid.merge**2
            self.means.room.take(tokens, f"the video {self.name}")
        if not self._keep:
            self.item = None
        return self.made

    def abandon(self) -> None:
        """Leave nothing behind; harmless for what is finished."""
        if self._job is not None:
            self._job.cancel()
        self._release()

    def _start_image(self, item: _Loaded) -> None:
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
                if isinstance(content, bytes) and not self.fetched:
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


def _all(tasks: Sequence[_Task]) -> list[Patches]:
    """Start all, then finish them: what is this chat's own first, so that two chats never wait for one another."""
    try:
        for i, task in enumerate(tasks):
            _named(task.start, i, len(tasks))
        for i, task in sorted(enumerate(tasks), key=lambda pair: pair[1].waits):
            _named(task.finish, i, len(tasks))
    except BaseException:
        for task in tasks:
            task.abandon()
        raise
    return [task.made for task in tasks if task.made is not None]


def _cut(item: _Loaded, rule: MediaRule, limits: FetchLimits, cap: int | None, times: Times) -> Patches:
    with times.stage("decode_media"):
        picture = item.open(limits, rule)
    with times.stage("prepare"):
        return _patches(picture, item.part, rule, cap)


def _patches(picture: Picture, part: Image, rule: MediaRule, cap: int | None) -> Patches:
    sizes = _sizes(picture, part, rule, cap)
    resized = picture.rgb
    bordered = rule.grid.border != "stretch"
    for high, wide in sizes[:-1] if bordered else sizes:
        resized = resize(resized, high, wide, rule)
    high, wide = sizes[-1]
    frame = np.asarray(resized)
    pixels = rule.grid.patchify((rule.grid.frame(frame, high, wide) if bordered else frame)[None])
    grids = ((1, high // rule.grid.patch, wide // rule.grid.patch),)
    key = content_key(pixels, "image", grids, rule.grid)
    notes = (*picture.notes, *_Plan(part, rule, picture.size).notes())
    return Patches("image", pixels, grids, picture.size, key, notes=notes, resized=sizes[-2] if bordered else None)


def _film(part: Video, rule: MediaRule, limits: FetchLimits, times: Times, most_tokens: int | None) -> Patches:
    from mirada.media.video import prepare_video  # PyAV takes long to load, and pictures do not need it

    return prepare_video(part, rule, limits, times=times, most_tokens=most_tokens)


def _stamp(path: Path) -> object:
    """Changes when a file does."""
    try:
        facts = path.stat()
    except OSError:
        return object()  # equal to nothing
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _sizes(picture: Picture, part: Image, rule: MediaRule, cap: int | None) -> _Sizes:
    try:
        return _Plan(part, rule, picture.size).sizes(cap)
    except MediaUnsupported as error:
        raise MediaUnsupported(f"{picture.name}: {error.problem}", error.fix) from error


def _sources(part: Image | Video) -> list[Any]:
    """What a part is made of: itself, or the frames of a list."""
    return list(part.source) if isinstance(part.source, list | tuple) else [part.source]


def _check_count(parts: Sequence[Image | Video], limits: FetchLimits) -> None:
    count = sum(len(part.source) if isinstance(part.source, list | tuple) else 1 for part in parts if hasattr(part, "source"))
    if count > limits.parts:
        raise MediaTooLarge(
            f"the request has {count:,} pictures and videos (frames that are given one by one included), more than"
            f" {limits.parts:,}", "send several requests, or raise FetchLimits.parts",
        )  # fmt: skip


def _fetch(tasks: Sequence[_Task], means: _Means) -> None:
    """Put bytes into the place of every address, each fetched once and several at a time."""
    wanted: dict[tuple[str, int], int] = {}
    for i, task in enumerate(tasks):
        if isinstance(task.part, Image | Video):
            whole = isinstance(task.part, Video) and not isinstance(task.part.source, list | tuple)
            most = means.limits.video_bytes if whole else means.limits.bytes
            wanted |= {(one, most): i for one in _sources(task.part) if is_remote(one) and (one, most) not in wanted}
    if not wanted:
        return
    found: dict[tuple[str, int], bytes] = {}

    def get(key: tuple[str, int], index: int) -> None:
        if means.cancel is not None:
            means.cancel.check()
        got = _named(lambda: locate(key[0], means.limits, max_bytes=key[1], allowance=means.allowance), index, len(tasks))
        assert isinstance(got, bytes)
        found[key] = got

    with means.times.stage("fetch"):
        side_by_side([partial(get, key, index) for key, index in wanted.items()])
    by_address = {address: data for (address, _), data in found.items()}
    for task in tasks:
        if isinstance(task.part, Image | Video) and any(map(is_remote, _sources(task.part))):
            got = [by_address.get(one, one) if isinstance(one, str) else one for one in _sources(task.part)]
            task.part = replace(task.part, source=got if isinstance(task.part.source, list | tuple) else got[0])
            task.fetched = True


def side_by_side(jobs: Sequence[Callable[[], None]]) -> None:
    """Do ``jobs``, up to ``SIDE_BY_SIDE`` at a time. The first error is raised at once: what has begun by then is left to end
    by itself, and nothing more begins."""
    todo, outcomes = deque(jobs), queue.SimpleQueue[BaseException | None]()

    def work() -> None:
        while todo:
            try:
                todo.popleft()()
            except IndexError:  # another thread took the last
                return
            except BaseException as error:
                outcomes.put(error)
            else:
                outcomes.put(None)

    if len(jobs) == 1:
        return jobs[0]()
    for _ in range(min(SIDE_BY_SIDE, len(jobs))):
        threading.Thread(target=work, name="mirada-fetch", daemon=True).start()
    for _ in jobs:
        if (error := outcomes.get()) is not None:
            todo.clear()
            raise error


def _common_cap(plans: dict[int, _Plan], budget: int, largest: int) -> int:
    """The largest area c with sum(area of each under c) <= budget: water-filling, so small pictures keep their size."""
    low, high = 1, largest  # the sum at ``high`` exceeds the budget; areas do not fall as c grows
    least = sum(plan.area(low) for plan in plans.values())
    if least > budget:
        raise MediaTooLarge(
            f"{len(plans)} pictures need at least {least:,} pixels together, more than total_pixels={budget:,}",
            "give fewer pictures, raise total_pixels, or lower min_pixels",
        )
    while high - low > 1:
        middle = (low + high) // 2
        if sum(plan.area(middle) for plan in plans.values()) <= budget:
            low = middle
        else:
            high = middle
    return low


def _area(patches: Patches, grid: GridRule) -> int:
    return len(patches.pixels) * grid.patch**2


def _named(step: Callable[[], Any], index: int, count: int) -> Any:
    """Run ``step`` on one of several parts; its error says which."""
    try:
        return step()
    except (MediaError, SettingsError, RequestFailed) as error:
        if count == 1:
            raise
        raise type(error)(f"picture or video {index + 1} of {count}: {error.problem}", error.fix) from error
