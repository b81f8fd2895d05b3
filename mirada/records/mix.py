"""Mixtures of records by weight."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirada.errors import InputError, SettingsError
from mirada.records.files import Record, read


@dataclass(frozen=True, slots=True)
class Source:
    """A set of records and how often, relative to the others, one is drawn from it."""

    path: str | Path
    weight: float = 1.0


class Mix:
    """An endless, repeatable draw from several sources by weight; each source starts again when it ends.

    ``state()`` is a small JSON value; ``Mix(sources, seed, state)`` goes on at the very next record.
    """

    def __init__(self, sources: Sequence[Source], seed: int = 0, state: Mapping[str, Any] | None = None) -> None:
        if not sources:
            raise SettingsError("a mixture has no sources", "give at least one")
        for source in sources:
            if not source.weight > 0:
                raise SettingsError(
                    f"the weight of {source.path} is {source.weight}", "it must be above 0; leave the source out instead"
                )
        self.sources = tuple(sources)
        self._random = random.Random(seed)
        self._draws = 0
        self._positions = [0] * len(sources)
        if state is not None:
            self._resume(state)
        self._readers = [read(source.path, position) for source, position in zip(self.sources, self._positions, strict=True)]

    def _resume(self, state: Mapping[str, Any]) -> None:
        positions = list(state["positions"])
        if len(positions) != len(self.sources):
            raise SettingsError(
                f"the saved mixture had {len(positions)} sources, this one has {len(self.sources)}",
                "resume with the same sources",
            )
        self._positions = positions
        for _ in range(state["draws"]):
            self._choose()

    def state(self) -> dict[str, Any]:
        return {"draws": self._draws, "positions": list(self._positions)}

    def _choose(self) -> int:
        self._draws += 1
        return self._random.choices(range(len(self.sources)), [source.weight for source in self.sources])[0]

    def __iter__(self) -> Iterator[Record]:
        return self

    def __next__(self) -> Record:
        return self._next_of(self._choose())

    def _next_of(self, index: int) -> Record:
        for _ in range(2):
            record = next(self._readers[index], None)
            if record is not None:
                self._positions[index] += 1
                return record
            self._readers[index], self._positions[index] = read(self.sources[index].path), 0
        raise InputError(f"the source {str(self.sources[index].path)!r} holds no records", "leave it out of the mixture")
