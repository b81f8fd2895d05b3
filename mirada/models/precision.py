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
_MEASURED_BYTES = {"cpu": 512 << 10}
"""Of rows that are compared at once: on a CPU they stay in a core's own cache, elsewhere each piece costs calls."""


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
        rows = rows.to(getattr(self.holder, "device", rows.device))  # rounded where they will stay
        self.holder.fill(begin, rows)
        if self.measure is None:
            return
        step = max(1, _MEASURED_BYTES.get(rows.device.type, 64 << 20) // (4 * self.shape[1]))
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


def replace(
    model: Any,
    layout: Layout,
    mode: Mode,
    stored: Mapping[str, Stored],
    make: Make = made,
    packed: torch.device | None = None,
) -> None:
    """Puts modules that hold the forms of ``mode`` where plain Linears and stacks stand, before these take memory.

    On a CPU: without compiled kernels int8 is torch's (``adapt.fbgemm``), int4 and stacks of int8 are widened tile by tile.
    ``packed``: the device where all that is rounded becomes canonical integers instead (see ``fused.packs``); the rest stays
    plain there. What is rounded from now on is measured, see ``measured``.
    """
    model.measures = {}
    table = model.decoder.embed
    if packed is None and stored[_first(layout, "decoder.embed.weight")].dtype == "BF16":
        table.to(torch.bfloat16)
    for rule in layout.rules:
        kind = _mode_of(rule, mode, stored, packed is not None)
        owner, _, attribute = rule.parameter.rpartition(".")
        module = model.get_submodule(owner)
        if kind is None:
            continue
        if isinstance(module, nn.Linear) and attribute == "weight" and not getattr(module, "stays_float", False):
            _put(model, owner, _linear(owner, kind, module, make, packed))
        elif rule.how == "stack" and getattr(module, attribute).ndim == 3 and _by_rows(rule, getattr(module, attribute)):
            held = getattr(module, attribute)
            delattr(module, attribute)
            setattr(module, attribute, _stack(rule, kind, held, make, packed))
    if model.config.text.tie_word_embeddings and mode.rounds:
        _put(model, HEAD_NAME, _linear(HEAD_NAME, HEAD, model.lm_head, make, packed))


def measured(model: Any) -> None:
    """Closes the account of what was rounded: it is ``rounding.of(model)`` then."""
    model.rounding = rounding.of(model) | {name: measure.result() for name, measure in model.measures.items()}
    model.measures = {}


def finish(model: Any, fill: bool = True) -> None:
    """What comes after all else is loaded: a head that is the table of embeddings in another form, or the same as it lies, and
    integers to the modules that widen them."""
    finish_head(model, fill)
    hand_over(model)


def hand_over(model: nn.Module) -> None:
    """Integers to the modules that compute with them."""
    for module in list(model.modules()):
        if isinstance(module, RoundedLinear | RoundedStack):
            module.finish()


def finish_head(model: Any, fill: bool = True) -> None:
    """The rows of a head that is the table of embeddings in another form."""
    if not model.config.text.tie_word_embeddings:
        return
    table = model.decoder.embed.weight
    if isinstance(model.lm_head, Linear):
        if table.dtype == torch.bfloat16:
            model.lm_head = MatrixLinear(Matrix.of(table))
    elif fill:
        rows = _rows(model, f"{HEAD_NAME}.weight", _holder(model.lm_head), 0, tuple(table.shape))
        for begin in range(0, len(table), _CHUNK_ROWS):
            rows.fill(begin, table.detach()[begin : begin + _CHUNK_ROWS])
        measured(model)
        if rounding.of(model)[f"{HEAD_NAME}.weight"].too_much and isinstance(model.lm_head, RoundedLinear):
            rounding.put_plain(model, HEAD_NAME, "weight", table.dtype, torch.device("meta"))
            model.tie_weights()
        elif rounding.of(model)[f"{HEAD_NAME}.weight"].too_much:
            model.lm_head = MatrixLinear(Matrix.of(table))


def _holder(module: Any) -> Any:
    """What takes the rows of a Linear in another form."""
    if isinstance(module, MatrixLinear):
        return module.matrix
    return module.holder if isinstance(module, RoundedLinear) else module


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
    if isinstance(module, MatrixLinear | Int8Linear | RoundedLinear):
        return _rows(model, name, _holder(module), _before(rule, 0, index), shape)
    if isinstance(module, MatrixStack):
        each = len(rule.tensors) // len(module)
        return _rows(model, name, module[index // each], _before(rule, index // each * each, index), shape)
    if isinstance(module, RoundedStack):
        return _rows(model, name, module.holder, _before(rule, 0, index), shape)
    return None


def _rows(model: Any, name: str, holder: Any, begin: int, shape: tuple[int, ...]) -> Rows:
    """With an account, if ``holder`` rounds and the model is one whose rounding is measured."""
    bits = {Format.INT8: 8, Format.INT4: 4}.get(holder.format, 0) if isinstance(holder, Matrix) else holder.bits
    measures = getattr(model, "measures", None)
    if not bits or measures is None:
        return Rows(holder, begin, shape)
    return Rows(holder, begin, shape, measures.setdefault(name, Measure(bits, shape[1])))


def resident_bytes(layout: Layout, mode: Mode, stored: Mapping[str, Stored], dtype: torch.dtype, packed: bool = False) -> int:
    """Bytes of the weights once loaded, about: the head of a tied table is counted beside it. ``packed``: see ``replace``."""
    total = 0
    for rule in layout.rules:
        kind = _mode_of(rule, mode, stored, packed)
        count = sum(math.prod(shape) for _, shape in rule.tensors)
        total += int(count * (dtype.itemsize if kind is None else _bytes(kind)))
    table = layout.stored()[_first(layout, "decoder.embed.weight")][2]
    tied = all(rule.parameter != f"{HEAD_NAME}.weight" for rule in layout.rules)
    return total + (int(math.prod(table) * _bytes(HEAD)) if tied and mode.rounds else 0)


class RoundedLinear(PackedLinear):
    """Canonical integers of one matrix: what Triton's kernels multiply by, and, in 4 bits, a CPU without compiled ones, where
    they are widened tile by tile."""

    def __init__(
        self, rows: int, columns: int, bits: int, group: int, bias: nn.Parameter | None, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__([PackedRows(rows, columns)], bias, columns)
        self.holder: _Rounded | None = _Rounded.empty(rows, columns, bits, group, device)
        """Takes the rows, until ``finish``."""

    def finish(self) -> None:
        """All rows are there."""
        if self.holder is not None:
            self.parts[0].fill(self.holder.packed, self.holder.device)  # pyright: ignore[reportCallIssue]
        self.holder = None


class RoundedStack(PackedStack):
    """The same for a stack [E, R, C]."""

    def __init__(
        self, shape: torch.Size, bits: int, group: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__([], shape, dtype)
        self.holder: _Rounded | None = _Rounded.empty(shape[0] * shape[1], shape[2], bits, group, device)
        """Takes the rows of all matrices, one below another, until ``finish``."""

    def finish(self) -> None:
        """All rows are there."""
        if self.holder is not None:
            self._take(self.holder.packed)
        self.holder = None


@dataclass
class _Rounded:
    """Canonical integers that are filled row by row."""

    packed: Packed

    @classmethod
    def empty(cls, rows: int, columns: int, bits: int, group: int, device: torch.device | str) -> _Rounded:
        groups = -(-columns // group) if group else 1
        values = torch.zeros(rows, columns if bits == 8 else -(-columns // 2), dtype=torch.uint8, device=device)
        return cls(Packed(values, torch.zeros(rows, groups, dtype=torch.float16, device=device), columns, bits, group))

    @property
    def bits(self) -> int:
        return self.packed.bits

    @property
    def device(self) -> torch.device:
        return self.packed.values.device

    def widen(self, begin: int, end: int) -> Tensor:
        """Rows [begin, end) as float32."""
        return self.packed.widen(begin, end)

    def fill(self, begin: int, rows: Tensor) -> None:
        made = quantise(rows, self.packed.bits, self.packed.group_size)
        self.packed.values[begin : begin + len(rows)] = made.values
        self.packed.scales[begin : begin + len(rows)] = made.scales


def _first(layout: Layout, parameter: str) -> str:
    return next(rule.tensors[0][0] for rule in layout.rules if rule.parameter == parameter)


def _mode_of(rule: Rule, mode: Mode, stored: Mapping[str, Stored], packed: bool) -> Mode | None:
    """The mode that a parameter is kept in, or None: as a plain float tensor."""
    matrix = all(len(shape) == 2 for _, shape in rule.tensors)
    if not matrix or "patches" in rule.parameter or rule.parameter == "decoder.embed.weight":
        return None
    if mode.rounds and rule.parameter.startswith("decoder."):
        return mode
    if mode.rounds and rule.parameter == f"{HEAD_NAME}.weight":
        return HEAD
    # What is not rounded stays as it is stored; other types than bfloat16 would be rounded by it, so they are widened.
    return Mode("exact") if not packed and all(stored[name].dtype == "BF16" for name, _ in rule.tensors) else None


def _group(kind: Mode, columns: int) -> int:
    """The mode's group, or the least where the columns are no multiple of it."""
    return kind.group if columns % (kind.group or 1) == 0 else BLOCK


def _linear(name: str, kind: Mode, plain: nn.Linear, make: Make, packed: torch.device | None) -> nn.Module:
    rows, columns = plain.weight.shape
    if packed is not None:
        bits = 8 if kind.name == "int8" else 4
        return RoundedLinear(rows, columns, bits, _group(kind, columns), plain.bias, packed)
    if not kind.rounds or library.library() is not None:
        return MatrixLinear(make(name, kind.format, rows, columns, _group(kind, columns) if kind.rounds else 0), plain.bias)
    if kind.name == "int8":
        return Int8Linear(rows, columns, plain.bias)
    return RoundedLinear(rows, columns, 4, _group(kind, columns), plain.bias)


def _stack(rule: Rule, kind: Mode, held: Tensor, make: Make, packed: torch.device | None) -> nn.Module:
    count, rows, columns = held.shape
    group = _group(kind, columns) if kind.rounds else 0
    if packed is None and (not kind.rounds or library.library() is not None):
        return MatrixStack([make(f"{rule.parameter}.{e}", kind.format, rows, columns, group) for e in range(count)])
    return RoundedStack(held.shape, 8 if kind.name == "int8" else 4, group, held.dtype, packed or "cpu")


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
