"""A pass through a vision tower in slices: it stops where it may be taken up again, so that who drives it may do other things
meanwhile.

Before each slice a pass says what that will compute (``Work``), and how much one may hold it asks whoever drives it (``Room``).
What fits is one slice, up to a whole layer; what does not is cut: products by rows, attention by segments, heads and queries.
Every row and query is computed from the same numbers by the same sums either way.

N patches, W width of the tower, H heads, d head size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from mirada.layers.rope import Rotation
from mirada.types import Grid

T = TypeVar("T")

LEAST_ROWS = 128
"""Of a product that is cut: with fewer, reading the matrix begins to count (64 rows: a fifth more)."""
MOST_ROWS = 512
"""Likewise: with more, what comes out of one product has left the caches before the next reads it."""
LEAST_QUERIES = 192
"""Of a head that is cut: every cut brings the head's keys into form for itself."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a slice computes, in multiplications: each kind has a price of its own."""

    products: int = 0
    """With matrices."""
    pairs: int = 0
    """Of queries with keys and of shares with values."""
    numbers: int = 0
    """Not multiplications, but numbers that are made one by one: of pixels, of positions."""
    rows: tuple[int, int] | None = None
    """The patches whose rows go through matrices; None: all, or none do."""

    def times(self, count: int, rows: tuple[int, int] | None = None) -> Work:
        return Work(self.products * count, self.pairs * count, self.numbers * count, rows)


Room = Callable[[Work], float]
"""How many slices ``work`` would fill: what is at most 1 is not cut. Asked anew for every slice."""
Slices = Generator[Work, None, T]
"""Says what it will compute, does so up to its next ``yield``, and in the end returns a ``T``. What it holds in between is all
that a pass needs."""


def unbound(work: Work) -> float:
    """The room of a pass that is not to stop within a layer."""
    return 0.0


def whole(slices: Slices[T]) -> T:
    """All slices one after the other."""
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return end.value


def by_rows(
    make: Callable[[int, int], Tensor], count: int, each: Work, room: Room, *, area: int = 1, into: Tensor | None = None
) -> Slices[Tensor]:
    """[count, ..]: rows [a, b) are ``make(a, b)``, and one of them is ``each``. ``area``: patches of a row. ``into``: where
    they are written; it may be what ``make`` reads of the same rows."""
    made, at = into, 0
    while at < count:
        fits = at == 0 and room(each.times(count)) <= 1
        end = count if fits else at + _part(count - at, room(each), LEAST_ROWS, MOST_ROWS)
        yield each.times(end - at, (at * area, end * area))
        rows = make(at, end)
        if end - at == count and into is None:
            return rows
        made = rows.new_empty(count, *rows.shape[1:]) if made is None else made
        made[at:end] = rows
        at = end
    return make(0, 0) if made is None else made


def _part(left: int, fill: float, least: int, most: int) -> int:
    """How many of ``left`` are next, where one fills so much of a slice: parts that differ little."""
    most = min(max(least, int(1 / fill)), most) if fill else most
    return math.ceil(left / math.ceil(left / most))


@dataclass(frozen=True, slots=True)
class Cut:
    """Some of the attention of a layer: whole segments, or of one segment some heads or some queries of one head."""

    tokens: slice
    lengths: tuple[int, ...]
    heads: slice
    queries: slice
    """Within ``tokens``."""


def cuts(lengths: Sequence[int], heads: int, dim: int, room: Room) -> Iterator[tuple[Cut, Work]]:
    """All queries of every head of the segments ``lengths``, once; ``dim``: d."""
    start = index = 0
    while index < len(lengths):
        end, taken, work = start, index, Work()
        while taken < len(lengths):
            more = Work(pairs=work.pairs + seen((lengths[taken],), heads * dim).pairs)
            if room(more) > 1:
                break
            end, taken, work = end + lengths[taken], taken + 1, more
        if taken == index:
            yield from _within(start, lengths[index], heads, dim, room)
            start, index = start + lengths[index], index + 1
        else:
            yield Cut(slice(start, end), tuple(lengths[index:taken]), slice(0, heads), slice(0, end - start)), work
            start, index = end, taken


def _within(start: int, length: int, heads: int, dim: int, room: Room) -> Iterator[tuple[Cut, Work]]:
    """The same of one segment that does not fit."""
    tokens, head = slice(start, start + length), 0
    query = Work(pairs=2 * length * dim)
    while head < heads:
        last, at = head + _part(heads - head, room(query.times(length)), 1, heads), 0
        while at < length:
            count = _part(length - at, room(query.times(last - head)), LEAST_QUERIES, length)
            yield Cut(tokens, (length,), slice(head, last), slice(at, at + count)), query.times(count * (last - head))
            at += count
        head = last


def seen(lengths: Iterable[int], width: int) -> Work:
    """Of attention in which all of each segment see each other, ``width`` numbers each (H d)."""
    return Work(pairs=2 * width * sum(n * n for n in lengths))


def through(layers: Iterable[Any], x: Tensor, turn: Rotation, segments: Sequence[int], room: Room) -> Slices[Tensor]:
    """``x`` [N, W] through ``layers``, which say their pass as ``vit.VisionLayer`` does."""
    for layer in layers:
        x = yield from layer.slices(x, turn, segments, room)
    return x


class SlicedTower(nn.Module, ABC):
    """A tower says its pass as ``slices``; ``forward`` is these run to their end."""

    @abstractmethod
    def slices(self, pixels: Tensor, grids: Sequence[Grid], segments: Sequence[int], room: Room = unbound) -> Slices[Tensor]:
        """[N, ..] patches of all pictures -> [N, W]. ``grids``: (t, h, w) per picture or video; ``segments``: runs of patches
        that see each other, summing to N."""

    def forward(self, pixels: Tensor, grids: Sequence[Grid], segments: Sequence[int]) -> Tensor:
        """As ``slices``, all at once."""
        return whole(self.slices(pixels, grids, segments))
