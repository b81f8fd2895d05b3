"""The front door of media: a picture or video in, patches out.

A picture passes two resizes, as with the references: the one of the family's utility package (``rule.first``; settings of the
one picture override it), then the image processor's, whose bounds (``rule.grid``) always hold.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image as pil

from mirada.errors import MediaError, MediaTooLarge, MediaUnsupported, RequestFailed, SettingsError
from mirada.media.cache import PixelCache
from mirada.media.fetch import is_remote, locate
from mirada.media.grid import GridRule, Patches, Room
from mirada.media.image import resize
from mirada.media.limits import Allowance, FetchLimits, show
from mirada.media.plan import Plan, common_cap
from mirada.media.rule import MediaRule
from mirada.media.task import Loaded, Means, Task, load, sizes_of
from mirada.media.times import Times
from mirada.types import Image, Video

if TYPE_CHECKING:
    from mirada.media.pool import Cancel, Pool

SIDE_BY_SIDE = 8
"""Addresses of one request that are fetched at a time."""


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
    check_count(parts, limits)
    allowance = Allowance(limits)
    means = Means(rule, limits, kept, pool, cancel, times, salt, Room(most_tokens), allowance)
    if total_pixels is not None and (isinstance(total_pixels, bool) or not isinstance(total_pixels, int) or total_pixels < 1):
        raise SettingsError(f"total_pixels={total_pixels!r} is not a positive whole number", "give an area in pixels, or None")
    tasks = [Task(part, means, keep=total_pixels is not None) for part in parts]
    _fetch(tasks, means)
    for step in (Task.load, Task.measure):
        for i, task in enumerate(tasks):
            _named(partial(step, task), i, len(tasks))
    made = _all(tasks)
    # Fetched once (compressed bytes are small); only what must shrink is decoded a second time.
    pictures = {i: task.item for i, task in enumerate(tasks) if isinstance(task.item, Loaded)}
    area = {i: _area(made[i], rule.grid) for i in pictures}
    if total_pixels is None or sum(area.values()) <= total_pixels:
        return made
    plans = {i: Plan(item.part, rule, made[i].size) for i, item in pictures.items()}
    cap = common_cap(plans, total_pixels, max(area.values()))
    shrinking = [i for i in pictures if plans[i].area(cap) < area[i]]
    for i, small in zip(shrinking, _all([tasks[i].capped(cap) for i in shrinking]), strict=True):
        note = f"shrunk from {area[i]:,} to {_area(small, rule.grid):,} pixels to share total_pixels={total_pixels:,}"
        made[i] = replace(small, notes=(*small.notes, note))
    return made


def resize_first(part: Image, rule: MediaRule, limits: FetchLimits | None = None) -> pil.Image:
    """The upright RGB picture after the first resize alone: what ``fetch_image`` of the utility packages returns.

    Raises as :func:`prepare`, and SettingsError for a rule without a first stage.
    """
    if rule.first is None:
        raise SettingsError("this media rule has no first stage", "use prepare")
    limits = limits or FetchLimits()
    item = load(part, rule, limits, None, Times(), show(part.source))
    if not isinstance(item, Loaded):
        raise MediaUnsupported("a Video is not a picture", "give an Image")
    picture = item.open(limits, rule)
    high, wide = sizes_of(picture, item.part, rule, None)[0]
    return resize(picture.rgb, high, wide, rule)


def _all(tasks: Sequence[Task]) -> list[Patches]:
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


def _sources(part: Image | Video) -> list[Any]:
    """What a part is made of: itself, or the frames of a list."""
    return list(part.source) if isinstance(part.source, list | tuple) else [part.source]


def check_count(parts: Sequence[Image | Video], limits: FetchLimits) -> None:
    """Raise MediaTooLarge for more pictures and videos than one request may have."""
    count = sum(len(part.source) if isinstance(part.source, list | tuple) else 1 for part in parts if hasattr(part, "source"))
    if count > limits.parts:
        raise MediaTooLarge(
            f"the request has {count:,} pictures and videos (frames that are given one by one included), more than"
            f" {limits.parts:,}", "send several requests, or raise FetchLimits.parts",
        )  # fmt: skip


def _fetch(tasks: Sequence[Task], means: Means) -> None:
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
                job = todo.popleft()
            except IndexError:  # another thread took the last
                return
            try:
                job()
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
