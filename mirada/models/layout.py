"""How a family's checkpoint names lie in its modules: declared once, read in both directions.

A ``Rule`` says which stored tensors make one parameter: renamed, fused (rows of several one after another), stacked (equal
parts along a new first axis, one or several to each of its places) or reshaped (same elements, other shape). Loading copies
each stored tensor into its place; saving reads the same places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeVar

from torch import Tensor

from mirada.errors import TensorError

Shape = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """One parameter and the stored tensors (name, shape) that make it, in order."""

    parameter: str
    tensors: tuple[tuple[str, Shape], ...]
    how: Literal["rows", "stack"] = "rows"

    def place(self, parameter: Tensor, index: int) -> Tensor:
        """The part of ``parameter`` that stored tensor ``index`` fills, as a view of its stored shape."""
        if self.how == "stack":
            return parameter.view(len(self.tensors), -1)[index].view(self.tensors[index][1])
        begin = sum(shape[0] for _, shape in self.tensors[:index])
        shape = self.tensors[index][1]
        return parameter[begin : begin + shape[0]].view(shape)

    def fits(self, shape: Shape) -> bool:
        """Whether the stored tensors fill a parameter of ``shape`` exactly."""
        stored = [s for _, s in self.tensors]
        if self.how == "stack":
            return len(stored) % shape[0] == 0 and all(math.prod(s) * len(stored) == math.prod(shape) for s in stored)
        rows = sum(s[0] for s in stored)
        return rows == shape[0] and all(math.prod(s[1:]) == math.prod(shape[1:]) for s in stored)


def affine(parameter: str, stored: str, rows: int, *columns: int) -> Iterator[Rule]:
    """Weight [rows, *columns] and bias [rows] of one module under another name."""
    yield Rule(f"{parameter}.weight", ((f"{stored}.weight", (rows, *columns)),))
    yield Rule(f"{parameter}.bias", ((f"{stored}.bias", (rows,)),))


@dataclass(frozen=True)
class Layout:
    """All rules of a family, and the names that may lie in a checkpoint without being used (``*`` matches anything)."""

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    prefixes: tuple[tuple[str, str], ...] = ()
    """(prefix that other software saves under, the released one); the first that a name begins with is replaced."""

    def released(self, stored: Mapping[str, T]) -> dict[str, T]:
        """``stored`` under released names. TensorError if two tensors come to one name."""
        made: dict[str, T] = {}
        for name, found in stored.items():
            prefix, other = next((pair for pair in self.prefixes if name.startswith(pair[0])), ("", ""))
            known = other + name.removeprefix(prefix)
            if known in made:
                raise TensorError(f"the checkpoint holds {known!r} twice, once as {name!r}", "keep the tensors of one save")
            made[known] = found
        return made

    def stored(self) -> dict[str, tuple[Rule, int, Shape]]:
        """Stored name -> its rule, its index there, its shape."""
        return {name: (rule, i, shape) for rule in self.rules for i, (name, shape) in enumerate(rule.tensors)}

    def ignores(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.ignored)

    def check_parameters(self, shapes: Mapping[str, Shape]) -> None:
        """Every parameter has exactly one rule, which fills it; otherwise TensorError."""
        ruled = [rule.parameter for rule in self.rules]
        for name in sorted(set(shapes) ^ set(ruled)):
            raise TensorError(
                f"parameter {name!r} {'has no rule' if name in shapes else 'does not exist'}", "correct the layout"
            )
        for rule in self.rules:
            if ruled.count(rule.parameter) > 1 or not rule.fits(shapes[rule.parameter]):
                raise TensorError(
                    f"parameter {rule.parameter!r} of shape {list(shapes[rule.parameter])} is not filled once",
                    f"correct the layout: {rule.tensors}",
                )

    def check_stored(self, shapes: Mapping[str, Shape]) -> None:
        """A checkpoint holds exactly what the rules name (and may hold what is ignored); otherwise TensorError."""
        wanted = self.stored()
        missing = [name for name in wanted if name not in shapes]
        extra = sorted(name for name in shapes if name not in wanted and not self.ignores(name))
        if missing:
            raise TensorError(
                f"the checkpoint lacks tensor {missing[0]!r} of shape {list(wanted[missing[0]][2])}{_more(missing)}",
                _hint(missing[0], extra),
            )
        if extra:
            shape = list(shapes[extra[0]])
            raise TensorError(
                f"the checkpoint holds tensor {extra[0]!r} of shape {shape}, which is not in the model{_more(extra)}",
                "take the config.json that belongs to these weights",
            )
        for name, (_, _, shape) in wanted.items():
            if shapes[name] != shape:
                raise TensorError(
                    f"tensor {name!r} has shape {list(shapes[name])}, expected {list(shape)}",
                    "take the config.json that belongs to these weights",
                )

    def read(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(stored name, view of the parameter) for everything that a save writes."""
        for rule in self.rules:
            for i, (name, _) in enumerate(rule.tensors):
                yield name, rule.place(parameters[rule.parameter], i)


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _hint(name: str, extra: list[str]) -> str:
    if extra:
        return f"it holds {extra[0]!r} instead, so it may be another family or release than its config.json says"
    return "the files are incomplete or belong to another config.json"
