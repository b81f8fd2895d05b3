"""The canonical form of a quantised matrix, and the modules that compute with it.

R rows (outputs), C columns (inputs), G groups of columns that share a scale. The integers stay packed in memory; a forward
widens them tile by tile, so that no more than ``TILE_BYTES`` of a matrix exist in float32 at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from mirada.layers import fused
from mirada.layers.kernels import library
from mirada.layers.kernels.matrix import BLOCK, Format, Matrix
from mirada.layers.linear import TILE_BYTES, linear, refuse_moves


@dataclass(frozen=True)
class Packed:
    """value[r, c] = (integer - zero) * scale, each scale serving ``row_block`` rows and one group of columns.

    ``values``: uint8 [R, C] (8 bits) or [R, ceil(C/2)] (4 bits, the even column in the low half), unsigned; or float8 [R, C],
    which has no zero. ``scales`` [ceil(R/row_block), G] as stored. ``zeros`` uint8 [R, G], or None: the middle of the range.
    ``groups`` int32 [C], the group of each column, or None: column // group_size.
    """

    values: Tensor
    scales: Tensor
    columns: int
    bits: int = 8
    group_size: int = 0
    """Columns of a group; 0: all."""
    zeros: Tensor | None = None
    groups: Tensor | None = None
    row_block: int = 1

    @property
    def rows(self) -> int:
        return len(self.values)

    def to(self, device: torch.device | str) -> Packed:
        """On another device; types stay."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: v.to(device) for name, v in moved.items() if isinstance(v, Tensor)})

    def integers(self, begin: int = 0, end: int | None = None) -> Tensor:
        """The stored numbers of rows [begin, end), float32 [rows, C]."""
        held = self.values[begin:end]
        if held.dtype == torch.float8_e4m3fn and held.device.type == "cpu":
            return _widen_e4m3(held)
        if self.bits != 4:
            return held.to(torch.float32)
        made = torch.empty(*held.shape, 2, dtype=torch.float32, device=held.device)
        made[..., 0] = held & 15
        made[..., 1] = held >> 4
        return made.flatten(1)[:, : self.columns]

    def widen(self, begin: int = 0, end: int | None = None) -> Tensor:
        """The weights of rows [begin, end), float32 [rows, C]. Products of few bits: exact in float32."""
        made = self.integers(begin, end)
        end = begin + len(made)
        if self.row_block == 1:
            scales = self.scales[begin:end].float()
        else:
            scales = self.scales[torch.arange(begin, end, device=made.device) // self.row_block].float()
        zeros = None if self.zeros is None else self.zeros[begin:end].float()
        count = scales.shape[1]
        if self.groups is None and self.columns % count == 0 and self.group_size in (0, self.columns // count):
            tiles = made.contiguous().view(len(made), count, -1)
            if not self.values.is_floating_point():
                tiles.sub_(float(1 << (self.bits - 1)) if zeros is None else zeros[..., None])
            return tiles.mul_(scales[..., None]).view(made.shape)
        at = self._group_of_columns()
        if not self.values.is_floating_point():
            made = made - (float(1 << (self.bits - 1)) if zeros is None else zeros[:, at])
        return made * scales[:, at]

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Row ranges whose widened size is at most ``TILE_BYTES`` (one row may be larger)."""
        step = max(1, TILE_BYTES // (4 * max(1, self.columns)))
        for begin in range(0, self.rows, step):
            yield begin, min(begin + step, self.rows)

    def _group_of_columns(self) -> Tensor:
        if self.groups is not None:
            return self.groups.long()
        return torch.arange(self.columns, device=self.values.device) // (self.group_size or self.columns)


def _widen_e4m3(values: Tensor) -> Tensor:
    """float8_e4m3fn -> float32, exactly, NaN excepted; torch's own conversion on a CPU takes many times as long.

    Shifted, the bits are those of a float16 whose exponent counts from 15 in place of 7.
    """
    bits = values.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    return bits.view(torch.float16).to(torch.float32).mul_(256)


def join_halves(values: Tensor) -> Tensor:
    """uint8 [R, C] below 16 -> uint8 [R, ceil(C/2)], the inverse of ``halves``."""
    if values.shape[1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return values[:, 0::2] | values[:, 1::2] << 4


def sort_columns(packed: Packed) -> tuple[Packed, Tensor | None]:
    """The matrix with the columns of each group side by side, and which column each was (int64 [C]), so that it times
    ``x[.., order]`` is what the given one times x is. As it is, and None, if that gives no plain groups of ``group_size``."""
    if packed.groups is None or packed.values.is_floating_point() or not packed.group_size:
        return packed, None
    sorted_groups, order = packed.groups.sort(stable=True)
    if not torch.equal(sorted_groups.long(), torch.arange(packed.columns) // packed.group_size):
        return packed, None
    values = packed.values
    if packed.bits == 4:
        whole = torch.stack((values & 15, values >> 4), -1).flatten(1)
        return replace(packed, values=join_halves(whole[:, order]), groups=None), order
    return replace(packed, values=values[:, order], groups=None), order


def to_matrix(packed: Packed) -> Matrix | None:
    """The form of the kernels that round activations, with the same integers, scales and zeros; None without kernels, or where
    they have no such form: reordered columns (see ``sort_columns``), scales of blocks of rows, float8, groups that are no
    multiple of 32, 8 bits with zeros other than the middle of the range. ``as_stored`` is for those."""
    p, floats = packed, packed.values.is_floating_point()
    zeros = p.zeros is not None and not (p.bits == 8 and bool((p.zeros == 128).all()))
    if floats or p.groups is not None or p.row_block != 1 or p.group_size % BLOCK or (p.bits == 8 and zeros):
        return None
    if library.library() is None:
        return None
    form = Format.INT4 if p.bits == 4 else Format.INT8
    group = p.group_size if p.scales.shape[1] > 1 else 0
    made = Matrix.empty(form, p.rows, p.columns, group, wide=p.scales.dtype != torch.float16, zeros=zeros)
    made.pack(0, p.values, p.scales, p.zeros if zeros else None)
    return made


def as_stored(packed: Packed) -> Matrix | None:
    """A view of the same numbers for the kernels that widen a few rows at a time and round nothing; None without kernels, off
    the CPU, and for reordered columns. Scales take a copy where they are bfloat16 or serve blocks of rows."""
    p = packed
    if p.values.device.type != "cpu" or p.groups is not None or not p.values.is_contiguous() or library.library() is None:
        return None
    if p.values.is_floating_point() and p.values.dtype != torch.float8_e4m3fn:
        return None
    form = Format.E4M3 if p.values.is_floating_point() else Format.STORED4 if p.bits == 4 else Format.STORED8
    scales = p.scales if p.scales.dtype in (torch.float16, torch.float32) else p.scales.float()
    if p.row_block != 1:
        scales = scales[torch.arange(p.rows) // p.row_block]
    count = scales.shape[1]
    group = p.group_size or p.columns // count
    if -(-p.columns // group) != count:
        return None
    zeros = None if p.zeros is None else p.zeros.contiguous()
    return Matrix.stored(form, p.values, scales.contiguous(), p.columns, group if count > 1 else 0, zeros)


class PackedRows(nn.Module):
    """One quantised matrix [R, C] without bias; ``fill`` hands it its integers."""

    _TENSORS = ("values", "scales", "zeros", "groups")

    def __init__(self, rows: int, columns: int, compiled: bool = False) -> None:
        super().__init__()
        self.rows, self.columns, self.compiled = rows, columns, compiled
        self.matrix: Matrix | None = None
        """The form of the compiled kernels, in place of the canonical one: with ``compiled``, where the integers allow it."""
        self.order: Tensor | None = None
        """Which columns of x are taken, one after another (int64 [C]); None: as they come."""
        self._form: Packed | None = None
        self._view: tuple[Any, Matrix | None] = (None, None)
        for name in self._TENSORS:
            self.register_buffer(name, None)

    def fill(self, packed: Packed, device: torch.device | str) -> None:
        """Takes the integers, on ``device``."""
        self.matrix, self.order = None, None
        if torch.device(device).type == "cpu" and library.library() is not None:
            packed, self.order = sort_columns(packed)
            self.matrix = to_matrix(packed) if self.compiled else None
            if self.matrix is not None:
                return
        self._form = packed = packed.to(device)
        for name in self._TENSORS:
            setattr(self, name, getattr(packed, name))

    def read(self) -> Matrix | None:
        """What compiled kernels multiply by, of columns in ``order``: the form that was made for them, or a view of what is
        stored. None where they read neither."""
        if self.matrix is not None or self.values is None:
            return self.matrix
        if self._view[0] is not self.values:
            self._view = self.values, as_stored(self.packed)
        return self._view[1]

    @property
    def packed(self) -> Packed:
        """The canonical form on the present device, of columns in ``order``."""
        if self._form is None:
            raise RuntimeError("the packed weights were not filled")
        return replace(self._form, **{name: getattr(self, name) for name in self._TENSORS})

    @property
    def weight(self) -> Tensor:
        """The whole matrix widened, float32 [R, C], made anew at each use."""
        made = self.packed.widen() if self.matrix is None else self.matrix.widen()
        return made if self.order is None else torch.empty_like(made).index_copy_(1, self.order, made)

    def forward(self, x: Tensor) -> Tensor:
        """[.., C] -> [.., R] in x's type."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        if self.matrix is None and fused.on(x) and (made := fused.packed(x, self.packed)) is not None:
            return made
        matrix = None if torch.compiler.is_compiling() else self.read()
        if matrix is not None:
            return linear(x, matrix)
        packed = self.packed
        return torch.cat([linear(x, packed.widen(a, b).to(x.dtype)) for a, b in packed.tiles()], -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedRows:
        """Moves between devices; scales and float8 values keep their type, as they are part of what is stored."""
        if self.matrix is not None:
            refuse_moves(fn)

        def moved(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            return made if made.dtype == tensor.dtype else tensor.to(made.device)

        if self.order is not None:
            self.order = moved(self.order)
        self._view = (None, None)
        return super()._apply(moved, recurse)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        return f"rows={self.rows}, columns={self.columns}, bits={self._form.bits if self._form else '?'}"


class PackedLinear(nn.Module):
    """Stands where an ``nn.Linear`` stood: the outputs of ``parts``, one after another, plus the bias.

    A part is a stored matrix: ``PackedRows``, or an ``nn.Linear`` without bias where the checkpoint left it plain. Fused
    matrices (queries, keys and values) keep parts of their own, since each may order its groups in its own way.
    """

    def __init__(self, parts: Sequence[nn.Module], bias: nn.Parameter | None, columns: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.bias = bias
        self.in_features = columns
        self.out_features = sum(p.rows if isinstance(p, PackedRows) else p.weight.shape[0] for p in parts)  # pyright: ignore

    @property
    def weight(self) -> Tensor:
        """[out, in] widened, float32 (a plain part in its own type), made anew at each use."""
        made = [part.weight for part in self.parts]
        return made[0] if len(made) == 1 else torch.cat([m.float() for m in made])  # pyright: ignore

    def compiled_matrices(self) -> list[Matrix] | None:
        """The stored matrices one below another, if compiled kernels multiply by all of them."""
        return _compiled(self.parts)

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out]."""
        made = [part(x) for part in self.parts]
        out = made[0] if len(made) == 1 else torch.cat(made, -1)
        return out if self.bias is None else out + self.bias


class PackedStack(nn.Module):
    """Stands where a parameter [E, R, C] stood: ``stack[e]`` is matrix e, widened in the type the parameter had.

    Its matrices are ``parts`` of their own as they come from a checkpoint, or, once ``joined``, the rows of one.
    """

    def __init__(self, parts: Sequence[nn.Module], shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.joined: PackedRows | None = None
        self.shape, self.dtype = torch.Size(shape), dtype

    def join(self) -> None:
        """All parts as one matrix [E R, C], which kernels for many experts read, if they are of one form. On their device."""
        forms = [
            part.packed if isinstance(part, PackedRows) and part.matrix is None and part.order is None else None
            for part in self.parts
        ]
        whole = _one_below_another(forms)
        if whole is not None:
            self._take(whole)

    def _take(self, whole: Packed) -> None:
        self.joined = PackedRows(whole.rows, whole.columns)
        self.joined.fill(whole, whole.values.device)
        self.parts = nn.ModuleList()

    def _rows_of(self, index: int) -> Packed | None:
        """Matrix ``index`` of those that are joined, as views."""
        if self.joined is None:
            return None
        whole, begin = self.joined.packed, range(len(self))[index] * self.shape[1]
        of = slice(begin, begin + self.shape[1])
        return replace(
            whole, values=whole.values[of], scales=whole.scales[of], zeros=None if whole.zeros is None else whole.zeros[of]
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        """[R, C], made anew at each use."""
        rows = self._rows_of(index)
        if rows is not None:
            return rows.widen().to(self.dtype)
        return torch.cat([part.weight.to(self.dtype) for part in self._of(index)])  # pyright: ignore

    def product(self, index: int, x: Tensor) -> Tensor:
        """x [.., C] times matrix ``index`` transposed -> [.., R]."""
        rows = self._rows_of(index)
        if rows is not None:
            made = fused.packed(x, rows)
            return linear(x, rows.widen().to(x.dtype)) if made is None else made
        if all(isinstance(part, PackedRows) and part.read() is not None for part in self._of(index)):
            return torch.cat([part(x) for part in self._of(index)], -1)
        return linear(x, self[index])

    def compiled_matrices(self, index: int) -> list[Matrix] | None:
        """The stored matrices one below another that are matrix ``index``, if compiled kernels multiply by all of them."""
        return None if self.joined is not None else _compiled(self._of(index))

    def _of(self, index: int) -> list[nn.Module]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        each = len(self.parts) // len(self)
        begin = index % len(self) * each
        return [self.parts[i] for i in range(begin, begin + each)]


def _one_below_another(forms: Sequence[Packed | None]) -> Packed | None:
    """Matrices of the same columns as one; None if their forms differ, or are more than integers in groups of columns."""
    given = [form for form in forms if form is not None]
    if not given or len(given) < len(forms):
        return None
    kinds = {
        (f.bits, f.group_size, f.columns, f.scales.shape[1], f.scales.dtype, f.values.dtype, f.zeros is None) for f in given
    }
    if len(kinds) > 1 or any(f.groups is not None or f.row_block != 1 or f.values.is_floating_point() for f in given):
        return None
    zeros = None if given[0].zeros is None else torch.cat([f.zeros for f in given])  # pyright: ignore
    return replace(
        given[0], values=torch.cat([f.values for f in given]), scales=torch.cat([f.scales for f in given]), zeros=zeros
    )


def _compiled(parts: Iterable[nn.Module]) -> list[Matrix] | None:
    made = [part.read() if isinstance(part, PackedRows) and part.order is None else None for part in parts]
    return None if any(matrix is None for matrix in made) else made  # pyright: ignore[reportReturnType]
