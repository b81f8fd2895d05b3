"""Pictures that a caller gave a name: sent once with its content, one may come again by its name alone.

A name is never believed over content: what comes with its pixels is prepared by its pixels. Names are of one salt (one tenant),
one rule and one set of sizes, and live in the pixel cache, whose bytes bound them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mirada.errors import MediaNotFound
from mirada.media.cache import PixelCache, source_key
from mirada.media.grid import Patches, Room
from mirada.media.limits import FetchLimits
from mirada.media.prepare import check_count
from mirada.media.rule import MediaRule
from mirada.types import Image, Video

Prepare = Callable[[list[Image | Video], int | None], list[Patches]]
"""(parts, most tokens that they may become) -> what is made of them."""


def prepare_named(
    parts: Sequence[Image | Video],
    prepare: Prepare,
    rule: MediaRule,
    cache: PixelCache | None,
    salt: str,
    limits: FetchLimits,
    most_tokens: int | None = None,
) -> list[Patches]:
    """``prepare`` of all ``parts`` that bring their content, and what is kept of those that come by their ids alone, in order.

    Raises MediaNotFound for an id that is not known (any more), before anything is prepared, MediaTooLarge for more parts than
    ``limits`` allow, ContextOverflow where all together would become more than ``most_tokens``; else what ``prepare`` raises.
    """
    if not any(isinstance(part, Image) and part.id is not None for part in parts):
        return prepare(list(parts), most_tokens)
    check_count(parts, limits)
    room = Room(most_tokens)
    known: dict[int, Patches] = {}
    for index, part in enumerate(parts):
        if isinstance(part, Image) and part.id is not None and part.source is None:
            known[index] = _find(part, rule, cache, salt)
            room.take(known[index].num_tokens(rule.grid.merge), f"the picture {part.id!r}")
    fresh = [index for index in range(len(parts)) if index not in known]
    # Without the id, so that what lies under other names, or none, is found by its content.
    plain = [replace(part, id=None) if isinstance(part, Image) else part for part in (parts[index] for index in fresh)]
    made = known | dict(zip(fresh, prepare(plain, room.left) if plain else [], strict=True))
    for index in fresh:
        part = parts[index]
        if cache is not None and isinstance(part, Image) and part.id is not None:
            cache.put(_key(part, rule, salt), made[index])
    return [made[index] for index in range(len(parts))]


def _find(part: Image, rule: MediaRule, cache: PixelCache | None, salt: str) -> Patches:
    found = None if cache is None else cache.get(_key(part, rule, salt))
    if found is None:
        raise MediaNotFound(
            f"no picture is kept under the id {part.id!r} with these sizes",
            "send the picture itself again, with its id" + ("" if cache and cache.max_bytes else " (pixel_cache_bytes is 0)"),
        )
    return found


def _key(part: Image, rule: MediaRule, salt: str) -> bytes:
    return source_key(b"", "named", replace(part, source=None), rule, salt)
