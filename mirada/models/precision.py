"""Where a layout and a precision mode meet: which matrices take which form, and what takes their rows while they are read.

A matrix is rounded row by row, so a checkpoint streams through: no matrix ever lies in memory as floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mirada.adapt.fbgemm import Int8Linear
from mirada.adapt.mode import HEAD, Mode, quantise
from mirada.adapt.packed import Packed, PackedLinear, PackedRows, PackedStack
from mirada.layers.kernels import library
from mirada.layers.kernels.matrix import BLOCK, Format, Matrix
from mirada.layers.linear import Linear, MatrixLinear, MatrixStack
from mirada.models import rounding
from mirada.models.layout import Layout, Rule
from mirada.models.rounding import Measure
from mirada.models.shards import Stored, Views

Make = Callable[[str, Format, int, int, int], Matrix]
"""(name, format, rows, columns, group) -> the matrix, to be filled or filled already."""
HEAD_NAME = "lm_head"
_CHUNK_ROWS = 4096
_MEASURED_BYTES = 512 << 10
"""Of rows that are compared at once: they stay in a core's own cache."""


@dataclass
class Rows:
    """What takes the rows of one stored matrix, which begin at row ``begin`` of what holds it."""

    holder: Any
    begin: int
    shape: tuple[int, ...]
    measure: Measure | None = None
    """What keeps account of the rounding, where it is wanted."""

    def fill(self, begin: int, rows: Tensor) -> None:
        begin += self.begin
        self.holder.fill(begin, rows)
        if self.measure is None:
            return
        step = max(1, _MEASURED_BYTES // (4 * self.shape[1]))
        for start in range(0, len(rows), step):
            piece = rows[start : start + step]
            self.measure.add(piece, self.holder.widen(begin + start, begin + start + len(piece)))


def made(name: str, format: Format, rows: int, columns: int, group: int) -> Matrix:
    """A matrix in memory, to be filled."""
    if format == Format.BF16:
        return Matrix(format, rows, columns, 0, torch.empty(rows, columns, dtype=torch.bfloat16))
    return Matrix.empty(format, rows, columns, group)


class Filed:
    """Makes matrices in memory like ``made``, except bfloat16 ones that lie in the checkpoint's files as products read them:
    these are views of the files. ``names``: the stored tensors of which nothing is to be read any more."""

    def __init__(self, layout: Layout, stored: Mapping[str, Stored]) -> None:
        self._stored, self._views, self.names = stored, Views(), set[str]()
        self._rules = {rule.parameter: rule for rule in layout.rules}

    @property
    def nbytes(self) -> int:
        """Of all views."""
        return sum(math.prod(one.shape) * one.torch_dtype.itemsize for one in map(self._stored.__getitem__, self.names))

    def make(self, name: str, format: Format, rows: int, columns: int, group: int) -> Matrix:
        """See ``Make``."""
        view = self._view(self._parts(name, rows), (rows, columns)) if format == Format.BF16 else None
        return made(name, format, rows, columns, group) if view is None else Matrix.of(view)

    def install(self, model: Any) -> None:
        """The table of embeddings, as it is the one large parameter that is no matrix of a Linear."""
        table = model.decoder.embed
        view = self._view([name for name, _ in self._rules["decoder.embed.weight"].tensors], table.weight.shape)
        if view is not None:
            table.weight = nn.Parameter(view, table.weight.requires_grad)

    def _parts(self, name: str, rows: int) -> list[str]:
        """The stored tensors that are matrix ``name``: of a Linear, or, with a number at its end, of a stack."""
        rule = self._rules.get(f"{name}.weight")
        if rule is not None:
            return [tensor for tensor, _ in rule.tensors]
        owner, _, index = name.rpartition(".")
        tensors = self._rules[owner].tensors
        each = rows // tensors[0][1][0]
        return [tensor for tensor, _ in tensors[int(index) * each : (int(index) + 1) * each]]

    def _view(self, names: list[str], shape: tuple[int, ...]) -> Tensor | None:
        parts = [self._stored[name] for name in names]
        view = self._views.of(parts) if all(part.dtype == "BF16" for part in parts) else None
        if view is None or view.shape != shape:
            return None
        self.names.update(names)
        return view


def replace(model: Any, layout: Layout, mode: Mode, stored: Mapping[str, Stored], make: Make = made) -> None:
    """Puts modules that hold the forms of ``mode`` where plain Linears and stacks stand, before these take memory.

    Without compiled kernels int8 is torch's (``adapt.fbgemm``), int4 and stacks of int8 are widened tile by tile.
    What is rounded from now on is measured, see ``measured``.
    """
    model.measures = {}
    table = model.decoder.embed
    if stored[_first(layout, "decoder.embed.weight")].dtype == "BF16":
        table.to(torch.bfloat16)
    for rule in layout.rules:
        kind = _mode_of(rule, mode, stored)
        owner, _, attribute = rule.parameter.rpartition(".")
        module = model.get_submodule(owner)
        if kind is None:
            continue
        if isinstance(module, nn.Linear) and attribute == "weight" and not getattr(module, "stays_float", False):
            _put(model, owner, _linear(owner, kind, module, make))
        elif rule.how == "stack" and getattr(module, attribute).ndim == 3 and _by_rows(rule, getattr(module, attribute)):
            held = getattr(module, attribute)
            delattr(module, attribute)
            setattr(module, attribute, _stack(rule, kind, held, make))
    if model.config.text.tie_word_embeddings and mode.rounds:
        _put(model, HEAD_NAME, _linear(HEAD_NAME, HEAD, model.lm_head, make))


def measured(model: Any) -> None:
    """Closes the account of what was rounded: it is ``rounding.of(model)`` then."""
    model.rounding = rounding.of(model) | {name: measure.result() for name, measure in model.measures.items()}
    model.measures = {}


def finish(model: Any, fill: bool = True) -> None:
    """What comes after all else is loaded: integers to the modules that widen them, and a head that is the table of embeddings
    in another form, or the same as it lies."""
    for module in model.modules():
        if isinstance(module, RoundedLinear | RoundedStack):
            module.finish()
    if not model.config.text.tie_word_embeddings:
        return
    table = model.decoder.embed.weight
    if isinstance(model.lm_head, Linear):
        if table.dtype == torch.bfloat16:
            model.lm_head = MatrixLinear(Matrix.of(table))
    elif fill:
        holder = model.lm_head.matrix if isinstance(model.lm_head, MatrixLinear) else model.lm_head
        rows = _rows(model, f"{HEAD_NAME}.weight", holder, 0, tuple(table.shape))
        for begin in range(0, len(table), _CHUNK_ROWS):  # (a RoundedLinear is never a head: that takes 8 bits)
            rows.fill(begin, table.detach()[begin : begin + _CHUNK_ROWS])
        measured(model)
        if rounding.of(model)[f"{HEAD_NAME}.weight"].too_much:
            model.lm_head = MatrixLinear(Matrix.of(table))


def bits(model: nn.Module) -> set[int]:
    """How many bits the rounded matrices of ``model`` take; nothing if none is rounded."""
    found: set[int] = set()
    for module in model.modules():
        held = getattr(module, "matrices", [])
        if isinstance(module, MatrixLinear | PackedRows) and module.matrix is not None:
            held = [module.matrix]
        found |= {{Format.INT8: 8, Format.INT4: 4}[m.format] for m in held if m.format in (Format.INT8, Format.INT4)}
        if isinstance(module, Int8Linear):
            found.add(8)
        elif isinstance(module, PackedRows) and module.matrix is None and not module.packed.values.is_floating_point():
            found.add(module.packed.bits)
    return found


def target(model: nn.Module, rule: Rule, index: int) -> Rows | None:
    """What takes stored tensor ``index`` of ``rule``, if it is held in a form of a mode."""
    owner, _, attribute = rule.parameter.rpartition(".")
    module = model.get_submodule(owner)
    name, shape = rule.tensors[index]
    if attribute != "weight":  # a stack, or a table of something
        module = getattr(module, attribute)
    if isinstance(module, MatrixLinear):
        return _rows(model, name, module.matrix, _before(rule, 0, index), shape)
    if isinstance(module, Int8Linear | RoundedLinear):
        holder = module if isinstance(module, Int8Linear) else module.holder
        return _rows(model, name, holder, _before(rule, 0, index), shape)
    if isinstance(module, MatrixStack | RoundedStack):
        each = len(rule.tensors) // len(module)
        holder = module[index // each] if isinstance(module, MatrixStack) else module.holders[index // each]
        return _rows(model, name, holder, _before(rule, index // each * each, index), shape)
    return None


def _rows(model: Any, name: str, holder: Any, begin: int, shape: tuple[int, ...]) -> Rows:
    """With an account, if ``holder`` rounds and the model is one whose rounding is measured."""
    bits = {Format.INT8: 8, Format.INT4: 4}.get(holder.format, 0) if isinstance(holder, Matrix) else holder.bits
    measures = getattr(model, "measures", None)
    if not bits or measures is None:
        return Rows(holder, begin, shape)
    return Rows(holder, begin, shape, measures.setdefault(name, Measure(bits, shape[1])))


def resident_bytes(layout: Layout, mode: Mode, stored: Mapping[str, Stored], dtype: torch.dtype) -> int:
    """Bytes of the weights once loaded, about: the head of a tied table is counted beside it."""
    total = 0
    for rule in layout.rules:
        kind = _mode_of(rule, mode, stored)
        count = sum(math.prod(shape) for _, shape in rule.tensors)
        total += int(count * (dtype.itemsize if kind is None else _bytes(kind)))
    table = layout.stored()[_first(layout, "decoder.embed.weight")][2]
    tied = all(rule.parameter != f"{HEAD_NAME}.weight" for rule in layout.rules)
    return total + (int(math.prod(table) * _bytes(HEAD)) if tied and mode.rounds else 0)


class RoundedLinear(PackedLinear):
    """Integers of one matrix that are widened tile by tile: 4 bits without compiled kernels."""

    def __init__(self, rows: int, columns: int, bits: int, group: int, bias: nn.Parameter | None) -> None:
        super().__init__([PackedRows(rows, columns)], bias, columns)
        self.holder = _Rounded(rows, columns, bits, group)

    def fill(self, begin: int, rows: Tensor) -> None:
        self.holder.fill(begin, rows)

    def finish(self) -> None:
        self.parts[0].fill(self.holder.packed, "cpu")  # pyright: ignore[reportCallIssue]


class RoundedStack(PackedStack):
    """The same for a stack."""

    def __init__(self, shape: torch.Size, bits: int, group: int, dtype: torch.dtype) -> None:
        super().__init__([PackedRows(shape[1], shape[2]) for _ in range(shape[0])], shape, dtype)
        self.holders = [_Rounded(shape[1], shape[2], bits, group) for _ in self.parts]

    def finish(self) -> None:
        for part, holder in zip(self.parts, self.holders, strict=True):
            part.fill(holder.packed, "cpu")  # pyright: ignore[reportCallIssue]


class _Rounded:
    """Canonical integers that are filled row by row."""

    def __init__(self, rows: int, columns: int, bits: int, group: int) -> None:
        groups = -(-columns // group) if group else 1
        values = torch.zeros(rows, columns if bits == 8 else -(-columns // 2), dtype=torch.uint8)
        self.bits = bits
        self.packed = Packed(values, torch.zeros(rows, groups, dtype=torch.float16), columns, bits, group)

    def widen(self, begin: int, end: int) -> Tensor:
        """Rows [begin, end) as float32."""
        return self.packed.widen(begin, end)

    def fill(self, begin: int, rows: Tensor) -> None:
        made = quantise(rows, self.packed.bits, self.packed.group_size)
        self.packed.values[begin : begin + len(rows)] = made.values
        self.packed.scales[begin : begin + len(rows)] = made.scales


def _first(layout: Layout, parameter: str) -> str:
    return next(rule.tensors[0][0] for rule in layout.rules if rule.parameter == parameter)


def _mode_of(rule: Rule, mode: Mode, stored: Mapping[str, Stored]) -> Mode | None:
    """The mode that a parameter is kept in, or None: as a plain float tensor."""
    matrix = all(len(shape) == 2 for _, shape in rule.tensors)
    if not matrix or "patches" in rule.parameter or rule.parameter == "decoder.embed.weight":
        return None
    if mode.rounds and rule.parameter.startswith("decoder."):
        return mode
    if mode.rounds and rule.parameter == f"{HEAD_NAME}.weight":
        return HEAD
    # What is not rounded stays as it is stored; other types than bfloat16 would be rounded by it, so they are widened.
    return Mode("exact") if all(stored[name].dtype == "BF16" for name, _ in rule.tensors) else None


def _group(kind: Mode, columns: int) -> int:
    """The mode's group, or the least where the columns are no multiple of it."""
    return kind.group if columns % (kind.group or 1) == 0 else BLOCK


def _linear(name: str, kind: Mode, plain: nn.Linear, make: Make) -> nn.Module:
    rows, columns = plain.weight.shape
    if not kind.rounds or library.library() is not None:
        return MatrixLinear(make(name, kind.format, rows, columns, _group(kind, columns) if kind.rounds else 0), plain.bias)
    if kind.name == "int8":
        return Int8Linear(rows, columns, plain.bias)
    return RoundedLinear(rows, columns, 4, _group(kind, columns), plain.bias)


def _stack(rule: Rule, kind: Mode, held: Tensor, make: Make) -> nn.Module:
    count, rows, columns = held.shape
    group = _group(kind, columns) if kind.rounds else 0
    if not kind.rounds or library.library() is not None:
        return MatrixStack([make(f"{rule.parameter}.{e}", kind.format, rows, columns, group) for e in range(count)])
    return RoundedStack(held.shape, 8 if kind.name == "int8" else 4, group, held.dtype)


def _by_rows(rule: Rule, held: Tensor) -> bool:
    return all(len(shape) == 2 and shape[1] == held.shape[2] for _, shape in rule.tensors)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _before(rule: Rule, begin: int, index: int) -> int:
    return sum(shape[0] for _, shape in rule.tensors[begin:index])


def _bytes(kind: Mode) -> float:
    """Of one weight."""
    if not kind.rounds:
        return 2
    return (1 if kind.name == "int8" else 0.5) + (2 / kind.group if kind.group else 0)
