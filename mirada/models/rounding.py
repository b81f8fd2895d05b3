"""What rounding does to each matrix, measured while its rows stream through, and which matrices stay exact because of it.

The error of a stored matrix W that became V is what a product loses when every input weighs the same in it: the root of the
mean over columns c of |V_c - W_c|^2 / |W_c|^2. Normally distributed weights give 0.006 to 0.009 in 8 bits and 0.08 to 0.11 in
4. It is not the ratio of the whole norms: outliers that make the other weights of their groups vanish would make that smaller.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mirada.layers.kernels.matrix import Format, Matrix
from mirada.layers.linear import Linear, MatrixLinear, MatrixStack
from mirada.models.layout import Layout, Rule
from mirada.models.shards import Stored

MOST = {8: 0.05, 4: 0.25}
"""Bits -> the largest error with which a matrix is rounded; beyond it stays exact. About three times that of normal weights."""
_SAID = 5
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rounding:
    """Of one stored matrix."""

    bits: int
    error: float

    @property
    def too_much(self) -> bool:
        """Whether the matrix stays exact because of it."""
        return not self.error <= MOST[self.bits]


class Measure:
    """Sums over the rows of one matrix [R, C]."""

    def __init__(self, bits: int, columns: int) -> None:
        self.bits = bits
        self._lost, self._held = (torch.zeros(columns, dtype=torch.float64) for _ in range(2))

    def add(self, exact: Tensor, made: Tensor) -> None:
        """Rows [n, C] as they were, and, in float32, as they are now; both on one device."""
        exact = exact.float()
        self._held += exact.square().sum(0).cpu()
        self._lost += made.sub_(exact).square_().sum(0).cpu()

    def result(self) -> Rounding:
        """Columns of zeros lose nothing and do not count."""
        there = self._held > 0
        error = (self._lost[there] / self._held[there]).mean().sqrt() if there.any() else torch.zeros(())
        return Rounding(self.bits, float(error))


def of(model: Any) -> dict[str, Rounding]:
    """Stored name -> what rounding did to it; empty where nothing was rounded on load."""
    return getattr(model, "rounding", {})


def exact(model: Any) -> list[str]:
    """Stored names of the matrices that rounding would have changed too much, worst first."""
    found = {name: one.error for name, one in of(model).items() if one.too_much}
    return sorted(found, key=lambda name: -found[name])


def spoilt(layout: Layout, made: Mapping[str, Rounding]) -> list[Rule]:
    """The parameters that hold a matrix of too large an error. What is fused or stacked with it stays exact with it."""
    return [rule for rule in layout.rules if any(name in made and made[name].too_much for name, _ in rule.tensors)]


def restore(
    model: Any, rule: Rule, stored: Mapping[str, Stored], plain: tuple[torch.dtype, torch.device] | None = None
) -> None:
    """Puts matrices to be filled with what is stored where rounded ones stand: bfloat16 where it is that, else float32; with
    ``plain`` parameters of that type and device."""
    owner, _, attribute = rule.parameter.rpartition(".")
    if plain is not None:
        put_plain(model, owner, attribute, *plain)
        return
    narrow = all(stored[name].dtype == "BF16" for name, _ in rule.tensors if name in stored) and rule.tensors[0][0] in stored
    module = model.get_submodule(owner)
    if attribute == "weight":
        parent, _, child = owner.rpartition(".")
        made = MatrixLinear(_floats(module.out_features, module.in_features, narrow), module.bias)
        setattr(model.get_submodule(parent), child, made)
        return
    count, rows, columns = getattr(module, attribute).shape
    delattr(module, attribute)
    setattr(module, attribute, MatrixStack([_floats(rows, columns, narrow) for _ in range(count)]))


def put_plain(model: Any, owner: str, attribute: str, dtype: torch.dtype, device: torch.device) -> None:
    """A Linear, or a stacked parameter, to be filled, where a rounded one stands."""
    module = model.get_submodule(owner)
    if attribute == "weight":
        with torch.device("meta"):
            made = Linear(module.in_features, module.out_features)
        made.weight = nn.Parameter(torch.empty(made.weight.shape, dtype=dtype, device=device))
        made.bias = module.bias
        parent, _, child = owner.rpartition(".")
        setattr(model.get_submodule(parent), child, made)
        return
    shape = getattr(module, attribute).shape
    delattr(module, attribute)
    setattr(module, attribute, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))


def say(model: Any, name: str) -> None:
    """A warning of what stays exact, if anything does."""
    found = exact(model)
    if found:
        more = f" and {len(found) - _SAID} more" if len(found) > _SAID else ""
        said = ", ".join(f"{one} ({of(model)[one].error:.2f} in {of(model)[one].bits} bits)" for one in found[:_SAID])
        counts = f"{len(found)} of {len(of(model))} matrices"
        _log.warning("%s: %s stay exact, since rounding would change them too much: %s%s", name, counts, said, more)


def _floats(rows: int, columns: int, narrow: bool) -> Matrix:
    dtype = torch.bfloat16 if narrow else torch.float32
    return Matrix(Format.BF16 if narrow else Format.F32, rows, columns, 0, torch.empty(rows, columns, dtype=dtype))
