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
from mirada.engine.pace import Pace
from mirada.engine.sequence import Sequence
from mirada.engine.turns import Turns
from mirada.engine.vision import Piece
from mirada.media.grid import GridRule, Patches
from mirada.models.slices import Slices, Work, unbound


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
        area = sequence.prompt.spans[0].merge ** 2
        self.counts = [sum(t * h * w for t, h, w in item.grids) // area for item in sequence.media]
        """Features of each whole item."""
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


@dataclass(eq=False)
class Flight:
    """A pass through the tower that may take several steps."""

    chosen: list[tuple[Sequence, Unit]]
    adapters: list[tuple[Any, int]]
    """Whose weights, for how many patches: for the whole pass, whoever ends meanwhile."""
    states: list[Features]
    """Where the features of each unit go, if that is still what its sequence waits with."""
    slices: Slices[Tensor]
    patches: int
    next: Work
    """The slice that comes next."""
    begun: bool = False

    @property
    def wanted(self) -> list[tuple[Sequence, Unit]]:
        """The units that somebody still waits for: not those of sequences that ended or were preempted."""
        return [
            (sequence, unit)
            for (sequence, unit), state in zip(self.chosen, self.states, strict=True)
            if sequence.features is state and unit in state.units
        ]


class Encoder:
    """Encodes the media of running sequences, at most so many patches a pass and one pass at a time; on a CPU in slices, so
    that a step takes no longer than it should."""

    def __init__(
        self,
        model: Any,
        rule: GridRule,
        device: torch.device,
        dtype: torch.dtype,
        most: int,
        cache: FeatureCache | None,
        adapters: Adapters,
        pace: Pace,
    ) -> None:
        self.model, self.rule, self.device, self.dtype, self.most, self.cache = model, rule, device, dtype, most, cache
        self.adapters, self.pace = adapters, pace
        self.sliced = device.type == "cpu" and pace.seconds is not None
        self._patch: Work = model.visual.layers[0].work((1,))
        self.flight: Flight | None = None
        """The pass under way."""
        self.turns = Turns(most)
        self.num_patches = 0
        """Encoded so far."""

    def open(self, sequence: Sequence) -> Features | None:
        """What is to be encoded for a sequence that begins (or begins again) after ``sequence.computed`` tokens."""
        return Features(sequence, self._units(sequence)) if sequence.media else None

    def _units(self, sequence: Sequence) -> Iterable[Unit]:
        area, at = sequence.prompt.spans[0].merge ** 2, 0
        for index, item in enumerate(sequence.media):
            for piece in vision.pieces(self.model, (item,), 1 if self.sliced else self.most):
                t, h, w = piece.grid
                yield Unit(index, piece, at, at := at + t * h * w // area)

    def recall(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Those of ``sequences`` that wait for pictures. What the cache has costs nothing and is taken at once."""
        seeing = [sequence for sequence in sequences if sequence.features is not None and sequence.features.units]
        for sequence in seeing:
            self._recall(sequence)
        return seeing

    def choose(self, seeing: Seq[Sequence], ahead: int) -> list[tuple[Sequence, Unit]]:
        """What to encode in this step: the pass under way, or else of those that ``recall`` gave in turn, as much as fits, and
        no farther than ``ahead`` tokens before it is needed."""
        self.tidy()
        if self.flight is not None:
            return self.flight.wanted
        chosen = self._choose(self.turns.order(seeing), ahead)
        self.turns.note(seeing, [(sequence, len(unit.piece.pixels)) for sequence, unit in chosen])
        return chosen

    def tidy(self) -> None:
        """Let go of a pass that nobody waits for any more."""
        if self.flight is not None and not self.flight.wanted:
            self.flight = None

    def _choose(self, sequences: Seq[Sequence], ahead: int) -> list[tuple[Sequence, Unit]]:
        chosen: list[tuple[Sequence, Unit]] = []
        # Who has begun with an item goes on with it, whoever's turn it is.
        begun = [(sequence, item) for sequence in sequences for item in sequence.features.gathered]
        leaders = {_content(*one): one for one in reversed(begun)}
        room = self.most if not self.sliced else min(self.most, self.pace.patches(self._patch) or self.most)
        for sequence in sequences:
            features = sequence.features
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
        return self.cache is not None and self.cache.takes(sequence.features.counts[unit.item] * size)

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

    def run(self, chosen: list[tuple[Sequence, Unit]], seconds: float | None) -> None:
        """Go on with the pass under way, else begin one of ``chosen``: for about ``seconds``, a slice at least; None: to its
        end. Then each sequence is handed what is its own. A pass that fails is forgotten."""
        flight, self.flight = self.flight or self._begin(chosen), None
        made = self._advance(flight, seconds)
        if made is None:
            self.flight = flight
            return
        self.num_patches += flight.patches
        wanted = {unit: sequence for sequence, unit in flight.wanted}
        parts = made.split([unit.end - unit.first for _, unit in flight.chosen])
        for (_, unit), features in zip(flight.chosen, parts, strict=True):
            if (sequence := wanted.get(unit)) is not None:
                sequence.features.units.remove(unit)
                own = features.clone() if len(parts) > 1 else features  # not a view that keeps the others' alive
                sequence.features.give(unit.first, own)
                self._gather(sequence, unit, own)

    def _begin(self, chosen: list[tuple[Sequence, Unit]]) -> Flight:
        pieces = [unit.piece for _, unit in chosen]
        room = self.pace.room if self.sliced else unbound
        slices = vision.run(self.model, pieces, self.rule, self.device, self.dtype, room)
        return Flight(
            chosen,
            [(sequence.lora, len(unit.piece.pixels)) for sequence, unit in chosen],
            [sequence.features for sequence, _ in chosen],
            slices,
            sum(len(piece.pixels) for piece in pieces),
            next(slices),
        )

    def _advance(self, flight: Flight, seconds: float | None) -> Tensor | None:
        """Slices for ``seconds``; all features [F, D] of the pass, if it has come to its end."""
        clock, left = self.pace.clock, seconds
        while True:
            work, began = flight.next, clock()
            flight.begun = True
            with self.adapters.media(flight.adapters, work.rows):
                try:
                    flight.next = next(flight.slices)
                except StopIteration as end:
                    return end.value
            took = clock() - began
            self.pace.computed_slice(work, took)
            if left is not None:
                left -= took
                if left < self.pace.cost(flight.next):
                    return None

    def _gather(self, sequence: Sequence, unit: Unit, features: Tensor) -> None:
        """Leave items to the cache when they are whole."""
        if self.cache is None or not self._kept(sequence, unit):
            return
        state = sequence.features
        pieces = state.gathered.setdefault(unit.item, [])
        pieces.append(features)
        if not any(other.item == unit.item for other in state.units):
            del state.gathered[unit.item]
            if sum(map(len, pieces)) == state.counts[unit.item]:  # not one whose beginning was skipped
                self.cache.put(sequence.media[unit.item], torch.cat(pieces), sequence.media_scope)


def _content(sequence: Sequence, item: int) -> tuple[bytes, str]:
    """What decides the features of an item."""
    return sequence.media[item].key, sequence.media_scope
