"""What of a sequence's media is encoded, and which of its tokens wait for that.

F features of a sequence, one per placeholder token, in the order of both; D width of the decoder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mirada.engine import vision
from mirada.engine.adapters import Adapters
from mirada.engine.sequence import Sequence
from mirada.engine.turns import Turns
from mirada.engine.vision import Piece
from mirada.media.grid import GridRule, Patches


class FeatureCache(Protocol):
    """Features of whole pictures and videos that earlier requests left."""

    def get(self, item: Patches, scope: str = "") -> Tensor | None:
        """[n, D] of ``item`` within ``scope`` (``Sequence.media_scope``), if they are there."""
        ...

    def has(self, item: Patches, scope: str = "") -> bool:
        """Whether ``get`` would find them. To be asked before an item is encoded, if ``get`` was not."""
        ...

    def put(self, item: Patches, features: Tensor, scope: str = "") -> None: ...

    def takes(self, size: int) -> bool:
        """Whether features of ``size`` bytes could be kept at all."""
        ...


@dataclass(eq=False)
class Unit:
    """A piece of a picture or video that is encoded at once, and the features [first, end) of the sequence it gives."""

    item: int
    piece: Piece
    first: int
    end: int


class Features:
    """Of one running sequence: units yet to encode, and features that wait for their tokens to be computed."""

    def __init__(self, sequence: Sequence, units: Iterable[Unit]) -> None:
        spans = [np.arange(span.start, span.end) for span in sequence.prompt.spans]
        self.rows = np.concatenate(spans) if spans else np.empty(0, np.int64)
        """int64 [F]: the token of each feature."""
        self.units = deque(units)
        self.gathered: dict[int, list[Tensor]] = {}
        """Of items that are encoded in part, where a cache will keep them whole."""
        self._held: deque[tuple[int, Tensor]] = deque()
        self.skip(sequence.computed)

    def skip(self, computed: int) -> None:
        """Nothing before token ``computed`` will be asked for: units and features for that alone are let go."""
        done = int(np.searchsorted(self.rows, computed))
        while self.units and self.units[0].end <= done:
            self.units.popleft()
        while self._held and self._held[0][0] + len(self._held[0][1]) <= done:
            self._held.popleft()

    @property
    def waits(self) -> int | None:
        """The first token whose feature is not there; None: none waits."""
        return None if not self.units else int(self.rows[self.units[0].first])

    def give(self, first: int, features: Tensor) -> None:
        """Keep ``features``, of which the first is number ``first``, until their tokens have been computed."""
        self._held.append((first, features))

    def take(self, start: int, end: int) -> tuple[np.ndarray, list[Tensor]]:
        """Tokens in [start, end) that features replace, and those features, in order."""
        a, b = (int(at) for at in np.searchsorted(self.rows, (start, end)))
        found = [x[max(a - first, 0) : b - first] for first, x in self._held if first < b and first + len(x) > a]
        return self.rows[a:b], found


class Encoder:
    """Encodes the media of running sequences, at most so many patches a step."""

    def __init__(
        self,
        model: Any,
        rule: GridRule,
        device: torch.device,
        dtype: torch.dtype,
        most: int,
        cache: FeatureCache | None,
        adapters: Adapters,
    ) -> None:
        self.model, self.rule, self.device, self.dtype, self.most, self.cache = model, rule, device, dtype, most, cache
        self.adapters = adapters
        self.turns = Turns(most)
        self.num_patches = 0
        """Encoded so far."""

    def open(self, sequence: Sequence) -> Features | None:
        """What is to be encoded for a sequence that begins (or begins again) after ``sequence.computed`` tokens."""
        return Features(sequence, self._units(sequence)) if sequence.media else None

    def _units(self, sequence: Sequence) -> Iterable[Unit]:
        area, at = sequence.prompt.spans[0].merge ** 2, 0
        for index, item in enumerate(sequence.media):
            for piece in vision.pieces(self.model, (item,), self.most):
                t, h, w = piece.grid
                yield Unit(index, piece, at, at := at + t * h * w // area)

    def choose(self, sequences: Iterable[Sequence], ahead: int) -> list[tuple[Sequence, Unit]]:
        """What to encode in this step: of ``sequences`` in turn, as much as fits, and no farther than ``ahead`` tokens before
        it is needed. What the cache has costs nothing and is taken at once."""
        seeing = [sequence for sequence in sequences if sequence.features is not None and sequence.features.units]
        chosen = self._choose(self.turns.order(seeing), ahead)
        self.turns.note(seeing, [(sequence, len(unit.piece.pixels)) for sequence, unit in chosen])
        return chosen

    def _choose(self, sequences: Seq[Sequence], ahead: int) -> list[tuple[Sequence, Unit]]:
        chosen: list[tuple[Sequence, Unit]] = []
        # Who has begun with an item goes on with it, whoever's turn it is.
        begun = [(sequence, item) for sequence in sequences for item in sequence.features.gathered]
        leaders = {_content(*one): one for one in reversed(begun)}
        room = self.most
        for sequence in sequences:
            features = sequence.features
            self._recall(sequence)
            for unit in features.units:
                size = len(unit.piece.pixels)
                if features.rows[unit.first] >= sequence.computed + ahead or self._follows(sequence, unit, leaders):
                    break
                if unit is not features.units[0] and self._there(sequence, unit):
                    break  # the cache gives it, once it comes next
                if size > room and chosen:
                    return chosen
                chosen.append((sequence, unit))
                room -= size
        return chosen

    def _follows(self, sequence: Sequence, unit: Unit, leaders: dict[tuple[bytes, str], tuple[Sequence, int]]) -> bool:
        """Whether another is at work on the same item, so that the cache will have it."""
        if not self._kept(sequence, unit):
            return False
        this = (sequence, unit.item)
        return leaders.setdefault(_content(*this), this) != this

    def _there(self, sequence: Sequence, unit: Unit) -> bool:
        """Whether the cache has the item of ``unit``, of which nothing is encoded yet."""
        if self.cache is None or unit.item in sequence.features.gathered:
            return False
        return self.cache.has(sequence.media[unit.item], sequence.media_scope)

    def _kept(self, sequence: Sequence, unit: Unit) -> bool:
        """Whether the cache will take the item of ``unit`` when it is whole."""
        size = self.model.config.text.hidden_size * self.dtype.itemsize
        return self.cache is not None and self.cache.takes(_count(sequence, unit) * size)

    def _recall(self, sequence: Sequence) -> None:
        """Take whole items from the cache, as far as they come next."""
        features = sequence.features
        while self.cache is not None and features.units:
            unit = features.units[0]
            item = sequence.media[unit.item]
            found = None if unit.item in features.gathered else self.cache.get(item, sequence.media_scope)
            if found is None:
                return
            first = unit.first
            while features.units and features.units[0].item == unit.item:
                last = features.units.popleft()
            # Units that were skipped before it have their features at the front.
            features.give(first, found[len(found) - (last.end - first) :])

    def run(self, chosen: list[tuple[Sequence, Unit]]) -> None:
        """Encode units by one pass, and hand each sequence what is its own."""
        with self.adapters.media([(sequence.lora, len(unit.piece.pixels)) for sequence, unit in chosen]):
            made = vision.run(self.model, [unit.piece for _, unit in chosen], self.rule, self.device, self.dtype)
        self.num_patches += sum(len(unit.piece.pixels) for _, unit in chosen)
        for (sequence, unit), features in zip(chosen, made.split([u.end - u.first for _, u in chosen]), strict=True):
            sequence.features.units.remove(unit)
            own = features.clone() if len(chosen) > 1 else features  # not a view that keeps the others' alive
            sequence.features.give(unit.first, own)
            self._gather(sequence, unit, own)

    def _gather(self, sequence: Sequence, unit: Unit, features: Tensor) -> None:
        """Leave items to the cache when they are whole."""
        if self.cache is None or not self._kept(sequence, unit):
            return
        state = sequence.features
        pieces = state.gathered.setdefault(unit.item, [])
        pieces.append(features)
        if not any(other.item == unit.item for other in state.units):
            del state.gathered[unit.item]
            if sum(map(len, pieces)) == _count(sequence, unit):  # not one whose beginning was skipped
                self.cache.put(sequence.media[unit.item], torch.cat(pieces), sequence.media_scope)


def _content(sequence: Sequence, item: int) -> tuple[bytes, str]:
    """What decides the features of an item."""
    return sequence.media[item].key, sequence.media_scope


def _count(sequence: Sequence, unit: Unit) -> int:
    """Features of the whole item of ``unit``."""
    area = sequence.prompt.spans[0].merge ** 2
    return sum(t * h * w for t, h, w in sequence.media[unit.item].grids) // area
