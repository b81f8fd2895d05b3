"""Pictures and videos of many requests through the vision tower together, in passes of bounded size, each content once.

N patches, F features, D width of the decoder.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirada.layers.batch import MediaBatch
from mirada.media.cache import ByteCache
from mirada.media.grid import GridRule, Patches, normalise
from mirada.models.slices import Room, Slices, Work, unbound, whole
from mirada.types import Grid

PASS_PATCHES = 16384
"""Patches that one pass through the tower takes at most, unless a single grid that cannot be cut has more."""
MOST_ASKED = 1024
"""Items under way whose weights are remembered; one forgotten is encoded and not kept."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A grid, or some frames of one, with its patches."""

    kind: str
    grid: Grid
    pixels: np.ndarray


class EncoderCache:
    """Features [F, D] of whole pictures and videos by what they show; least recently used go first. For one thread.

    ``weights`` says which weights the tower has now; when they change all is dropped, and what was encoded by others in the
    meantime is not kept. ``settings`` are whatever else decides the numbers (type, attention). What it hands out is shared:
    do not write to it.
    """

    def __init__(self, max_bytes: int, weights: Callable[[], bytes], *settings: object) -> None:
        self.entries: ByteCache[Tensor] = ByteCache(max_bytes, lambda features: features.nbytes)
        self._settings = repr(settings).encode()
        self._read_weights = weights
        self._weights = weights()
        self._asked: OrderedDict[bytes, bytes] = OrderedDict()
        """Key of what is not there -> weights when it was first asked for, and so may have begun to be encoded."""

    def key(self, item: Patches, scope: str = "") -> bytes:
        """256 bits over pixels, grids and rule (``item.key``), scope (``Sequence.media_scope``) and settings; weights are one
        for all."""
        digest = hashlib.blake2b(digest_size=32)
        for part in (item.key, scope.encode(), self._settings):
            digest.update(len(part).to_bytes(8, "little"))  # so that one part cannot run into the next
            digest.update(part)
        return digest.digest()

    def get(self, item: Patches, scope: str = "") -> Tensor | None:
        """Features of ``item``, if they are there. A miss is counted by ``put``: the engine asks at every step."""
        self._look()
        key = self.key(item, scope)
        found = self.entries.get(key, count_miss=False)
        if found is None:
            self._note(key)
        return found

    def has(self, item: Patches, scope: str = "") -> bool:
        """Whether they are there; counts nothing. For items that come later than the one that was asked for."""
        key = self.key(item, scope)
        if key in self.entries:
            return True
        self._note(key)
        return False

    def _note(self, key: bytes) -> None:
        self._asked.setdefault(key, self._weights)
        if len(self._asked) > MOST_ASKED:
            self._asked.popitem(last=False)

    def put(self, item: Patches, features: Tensor, scope: str = "") -> None:
        """Keep ``features``, which had to be encoded. A view is copied, or it would keep alive what it is a view of."""
        self._look()
        self.entries.misses += 1
        key = self.key(item, scope)
        if self._asked.pop(key, None) != self._weights or not self.takes(features.nbytes):
            return
        whole = features.untyped_storage().nbytes() == features.nbytes
        self.entries.put(key, features if whole else features.clone())

    def takes(self, size: int) -> bool:
        """Whether features of ``size`` bytes could be kept at all."""
        return size <= self.entries.max_bytes

    def _look(self) -> None:
        weights = self._read_weights()
        if weights != self._weights:
            self.entries.clear()
            self._weights = weights


def encode(model: Any, media: Sequence[Patches], rule: GridRule, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Features [F, D] of all media in order; None for no media."""
    line = pieces(model, media, PASS_PATCHES)
    features = [whole(run(model, group, rule, device, dtype)) for group in passes(line, PASS_PATCHES)]
    return torch.cat(features) if features else None


def run(
    model: Any, group: Sequence[Piece], rule: GridRule, device: torch.device, dtype: torch.dtype, room: Room = unbound
) -> Slices[Tensor]:
    """Features [F, D] of all pieces in order, by one pass through the tower, in slices."""
    yield Work(numbers=sum(piece.pixels.size for piece in group))
    return (yield from model.encoding(_batch(group, rule, device, dtype), room))


def _batch(group: Sequence[Piece], rule: GridRule, device: torch.device, dtype: torch.dtype) -> MediaBatch:
    pixels = np.concatenate([piece.pixels for piece in group])
    return MediaBatch(
        pixels=torch.from_numpy(normalise(pixels, rule)).to(device, dtype),
        grids=tuple(piece.grid for piece in group),
        kinds=tuple(piece.kind for piece in group),  # pyright: ignore[reportArgumentType]
    )


def pieces(model: Any, media: Iterable[Patches], most: int) -> Iterator[Piece]:
    """The grids in order; one whose frames do not see each other is cut where it has more than ``most`` patches."""
    for item in media:
        start = 0
        for t, h, w in item.grids:
            frames = t
            if len(model.segments(((t, h, w),))) == t:
                frames = max(1, most // (h * w))
            for first in range(0, t, frames):
                count = min(frames, t - first)
                end = start + count * h * w
                yield Piece(item.kind, (count, h, w), item.pixels[start:end])
                start = end


def passes(items: Iterator[Piece], most: int) -> Iterator[list[Piece]]:
    """Runs of pieces of at most ``most`` patches together."""
    group: list[Piece] = []
    size = 0
    for piece in items:
        if group and size + len(piece.pixels) > most:
            yield group
            group, size = [], 0
        group.append(piece)
        size += len(piece.pixels)
    if group:
        yield group
