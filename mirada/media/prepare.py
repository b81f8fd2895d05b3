"""The front door of media: a picture or video in, patches out.

A picture passes two resizes, as with the references: the one of the family's utility package (``rule.first``; settings of the
one picture override it), then the image processor's, whose bounds (``rule.grid``) always hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as pil

from mirada.errors import MediaError, MediaTooLarge, MediaUnsupported, SettingsError
from mirada.media.cache import PixelCache, source_key
from mirada.media.fetch import FetchLimits, fetch, locate, show
from mirada.media.grid import GridRule, Patches, content_key, fit
from mirada.media.image import Picture, decode, open_image, resize
from mirada.media.rule import MediaRule, check_bounds
from mirada.types import Image, Video

_Sizes = tuple[tuple[int, int], ...]
"""(height, width) after each resize, in order; the last after the border, where the rule gives one."""


def prepare(
    part: Image | Video, rule: MediaRule, limits: FetchLimits | None = None, *, cache: PixelCache | None = None
) -> Patches:
    """Fetch, decode, resize and cut one picture or video. Raises MediaError, or SettingsError for its settings."""
    limits = limits or FetchLimits()
    return _prepare_loaded(_load(part, rule, limits), rule, limits, cache)


def prepare_many(
    parts: Sequence[Image | Video],
    rule: MediaRule,
    limits: FetchLimits | None = None,
    total_pixels: int | None = None,
    *,
    cache: PixelCache | None = None,
) -> list[Patches]:
    """Prepare all of one chat, in order; errors say which one.

    ``total_pixels`` bounds the resized area of all pictures together (videos have a budget of their own). When it is
    exceeded the largest pictures shrink to one common area, the others stay, and ``notes`` of each that shrank say so; nothing
    is dropped. Raises MediaTooLarge if the budget does not hold them at their least sizes.
    """
    limits = limits or FetchLimits()
    if total_pixels is None:
        return [_named(prepare, i, parts, rule, limits, cache=cache) for i in range(len(parts))]
    if isinstance(total_pixels, bool) or not isinstance(total_pixels, int) or total_pixels < 1:
        raise SettingsError(f"total_pixels={total_pixels!r} is not a positive whole number", "give an area in pixels, or None")
    # Fetched once (compressed bytes are small); only what must shrink is decoded a second time.
    items = [_named(_load, i, parts, rule, limits) for i in range(len(parts))]
    made = [_named(_prepare_loaded, i, items, rule, limits, cache) for i in range(len(parts))]
    pictures = {i: item for i, item in enumerate(items) if isinstance(item, _Loaded)}
    area = {i: _area(made[i], rule.grid) for i in pictures}
    if sum(area.values()) <= total_pixels:
        return made
    plans = {i: _Plan(item.part, rule, made[i].size) for i, item in pictures.items()}
    cap = _common_cap(plans, total_pixels, max(area.values()))
    for i, item in pictures.items():
        if plans[i].area(cap) < area[i]:
            small = _prepare_image(item, rule, limits, cache, cap)
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
    item = _load(part, rule, limits)
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
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise SettingsError(
                f"{name}={value!r} is not a positive whole number", "give pixels, or None for the model's default"
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


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A picture whose source was fetched: bytes, a PIL image or an array; ``name`` is what messages call it."""

    part: Image
    source: bytes | pil.Image | np.ndarray
    name: str

    def open(self, limits: FetchLimits, rule: MediaRule) -> Picture:
        if isinstance(self.source, bytes):
            return decode(self.source, limits, rule.alpha, self.name)
        return open_image(self.source, limits, rule.alpha)


def _load(part: Image | Video, rule: MediaRule, limits: FetchLimits) -> _Loaded | Video:
    if not isinstance(part, Image | Video):
        raise MediaUnsupported(f"a {type(part).__name__} is neither picture nor video", "wrap it in Image(...) or Video(...)")
    check_item(part, rule.grid)
    if isinstance(part, Video):
        if rule.video is None:
            raise MediaUnsupported(
                "this model takes pictures, no videos", "give frames of the video as pictures: Image(frame), Image(frame), ..."
            )
        return part
    source = part.source if isinstance(part.source, pil.Image | np.ndarray) else fetch(part.source, limits)
    return _Loaded(replace(part, source=None), source, show(part.source))


def _prepare_loaded(item: _Loaded | Video, rule: MediaRule, limits: FetchLimits, cache: PixelCache | None) -> Patches:
    prepare_one = _prepare_video if isinstance(item, Video) else _prepare_image
    return prepare_one(item, rule, limits, cache)  # type: ignore[arg-type]


def _prepare_image(
    item: _Loaded, rule: MediaRule, limits: FetchLimits, cache: PixelCache | None, cap: int | None = None
) -> Patches:
    if cache is None:
        return _cut(item.open(limits, rule), item.part, rule, cap)
    # What was given decoded saves only its resize; its key is the pixels that the resize starts from.
    picture = None if isinstance(item.source, bytes) else item.open(limits, rule)
    content = item.source if isinstance(item.source, bytes) else picture.rgb.tobytes()  # type: ignore[union-attr]
    key = source_key(content, "image", item.part, rule, limits.pixels, cap, picture and (picture.size, picture.notes))
    if (found := cache.get(key)) is not None:
        return found
    patches = _cut(picture or item.open(limits, rule), item.part, rule, cap)
    cache.put(key, patches)
    return patches


def _cut(picture: Picture, part: Image, rule: MediaRule, cap: int | None) -> Patches:
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
    return Patches("image", pixels, grids, picture.size, key, notes=(*picture.notes, *_Plan(part, rule, picture.size).notes()))


def _sizes(picture: Picture, part: Image, rule: MediaRule, cap: int | None) -> _Sizes:
    try:
        return _Plan(part, rule, picture.size).sizes(cap)
    except MediaUnsupported as error:
        raise MediaUnsupported(f"{picture.name}: {error.problem}", error.fix) from error


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


def _named(step, index: int, parts: Sequence[Any], *rest, **more):
    """Run ``step`` on one of several parts; its error says which."""
    try:
        return step(parts[index], *rest, **more)
    except (MediaError, SettingsError) as error:
        if len(parts) == 1:
            raise
        raise type(error)(f"picture or video {index + 1} of {len(parts)}: {error.problem}", error.fix) from error


def _prepare_video(part: Video, rule: MediaRule, limits: FetchLimits, cache: PixelCache | None) -> Patches:
    from mirada.media.video import prepare_video  # PyAV takes long to load, and pictures do not need it

    if cache is None or not isinstance(part.source, str | bytes | Path):
        return prepare_video(part, rule, limits)
    content = locate(part.source, limits, max_bytes=limits.video_bytes)
    key = source_key(content, "video", replace(part, source=None), rule, limits)
    if (found := cache.get(key)) is not None:
        return found
    patches = prepare_video(replace(part, source=content), rule, limits)
    cache.put(key, patches)
    return patches
