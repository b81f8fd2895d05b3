"""What each rank holds of every parameter: a family declares it beside its layout, and loading cuts by it.

A ``Plan`` maps patterns of parameter names to ``Column`` (outputs are divided), ``Row`` (inputs are divided), ``Experts``
(whole matrices of a stack), ``FIRST`` (the first rank alone) or ``WHOLE`` (every rank).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from mirada.errors import SettingsError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Share:
    """Rank ``rank`` of ``ranks``."""

    rank: int
    ranks: int

    @property
    def leads(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Units:
    """How many equal parts (heads, channels) an axis has, which are never cut. ``copied``: where there are fewer than ranks,
    neighbours hold the same one; ``ragged``: ranks may hold one more or one fewer."""

    count: int
    what: str
    copied: bool = False
    ragged: bool = False

    def of(self, share: Share) -> tuple[int, int]:
        """First and end of the parts of a rank. SettingsError if they cannot be divided so."""
        count, ranks = self.count, share.ranks
        if self.ragged or count % ranks == 0:
            return share.rank * count // ranks, (share.rank + 1) * count // ranks
        if self.copied and ranks % count == 0:
            at = share.rank * count // ranks
            return at, at + 1
        raise SettingsError(
            f"tensor_parallel={ranks}: {count} {self.what} cannot be divided among {ranks} ranks",
            "use a number of ranks that divides them",
        )


@dataclass(frozen=True)
class Column:
    """Outputs are divided: of every stored matrix (one entry each, in order) its own units of rows."""

    units: tuple[Units, ...]


@dataclass(frozen=True)
class Row:
    """Inputs are divided: units of columns; results are partial sums."""

    units: Units


@dataclass(frozen=True)
class Experts:
    """Matrices of a stack are divided."""

    units: Units


WHOLE: Literal["whole"] = "whole"
FIRST: Literal["first"] = "first"
Split = Column | Row | Experts | Literal["whole", "first"]


@dataclass(frozen=True)
class Cut:
    """Elements [begin, end) along axis ``dim`` of a stored tensor."""

    dim: int
    begin: int
    end: int

    def shape(self, whole: Shape) -> Shape:
        return (*whole[: self.dim], self.end - self.begin, *whole[self.dim + 1 :])


@dataclass(frozen=True)
class Plan:
    splits: Mapping[str, Split]
    """Pattern of parameter names -> how they are divided; the first that matches holds, and some must."""
    sums: tuple[str, ...]
    """Patterns of modules whose outputs must be summed over all ranks."""
    apply: Callable[[Any, Share], None]
    """Tells the modules of a decoder which of its heads and experts are theirs."""

    def split(self, parameter: str) -> Split:
        for pattern, made in self.splits.items():
            if fnmatchcase(parameter, pattern):
                return made
        raise SettingsError(f"the plan does not say how {parameter!r} is divided", "add it to the family's plan")

    def is_sum(self, module: str) -> bool:
        return any(fnmatchcase(module, pattern) for pattern in self.sums)


def cuts(split: Split, shapes: tuple[Shape, ...], stacked: int, share: Share) -> list[tuple[int, Cut | None]]:
    """(index of a stored tensor, what is taken of it) for one parameter, made of stored tensors of ``shapes``, of which a stack
    has ``stacked``. None: all of it. SettingsError for sizes that cannot be divided."""
    if split == WHOLE or (split == FIRST and share.leads):
        return [(index, None) for index in range(len(shapes))]
    if split == FIRST:
        return []
    if isinstance(split, Experts):
        begin, end = split.units.of(share)
        each = len(shapes) // stacked
        return [(index, None) for index in range(begin * each, end * each)]
    if isinstance(split, Row):
        return [(index, _cut(split.units, shape, 1, share)) for index, shape in enumerate(shapes)]
    assert isinstance(split, Column)
    if len(split.units) != len(shapes):
        raise SettingsError(
            f"a plan names {len(split.units)} matrices where there are {len(shapes)}", "correct the family's plan"
        )
    return [(i, _cut(units, shape, 0, share)) for i, (units, shape) in enumerate(zip(split.units, shapes, strict=True))]


def _cut(units: Units, shape: Shape, dim: int, share: Share) -> Cut:
    begin, end = units.of(share)
    size = shape[dim] // units.count
    return Cut(dim, begin * size, end * size)
