"""Matrices in the form that the compiled CPU kernels read, and products with them.

R rows (outputs), C columns (inputs), G groups of columns that share a scale. What the integers mean is said in gemm.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from mirada.errors import NotAvailable, OutOfMemory, TensorError
from mirada.layers.kernels import library as compiled

__all__ = [
    "BLOCK", "PANEL", "STORED", "Format", "Matrix", "attend_seen", "gelu", "kernels", "normalise_heads", "product", "swiglu",
    "turn_heads",
]  # fmt: skip

PANEL = 16
"""Rows of integers that lie together."""
BLOCK = 32
"""Columns of activations that are rounded together; a group is a multiple of it."""


class Format(IntEnum):
    """``enum mr_format`` of cpu.h."""

    F32 = 0
    BF16 = 1
    INT8 = 2
    INT4 = 3
    STORED8 = 4
    STORED4 = 5
    E4M3 = 6


STORED = (Format.STORED8, Format.STORED4, Format.E4M3)
"""Row by row as checkpoints store them, in groups of any number of columns; activations stay float32."""

_FLOATS = {torch.float32: Format.F32, torch.bfloat16: Format.BF16}


def kernels() -> ctypes.CDLL:
    """The library. NotAvailable if there is none; ``library.status`` says it without raising."""
    found = compiled.library()
    if found is None:
        status = compiled.status()
        raise NotAvailable(f"the compiled CPU kernels are not there: {status.why}", status.fix)
    threads = torch.get_num_threads()
    if found.mr_threads() != threads:
        found.mr_set_threads(threads)
    return found


@dataclass
class Matrix:
    """[R, C] on the CPU. Floats, and what is ``STORED``, lie row by row; integers in panels. Scales are float16, or (``wide``)
    float32.

    ``values``, ``scales`` and ``zeros`` of integers are bytes. They may lie in a mapped file: nothing writes to them but
    ``fill`` and ``pack``.
    """

    format: Format
    rows: int
    columns: int
    group: int
    """Columns of a group; 0: all (integers only)."""
    values: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    bias: Tensor | None = None
    """float32 [R]."""
    wide: bool = False

    def __post_init__(self) -> None:
        self._struct: compiled.Matrix | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle begins without addresses: they are of these tensors."""
        return self.__dict__ | {"_struct": None}

    @classmethod
    def empty(cls, format: Format, rows: int, columns: int, group: int, *, wide: bool = False, zeros: bool = False) -> Matrix:
        """Integers that ``fill`` or ``pack`` will set. TensorError for a group that is no multiple of 32."""
        if group % BLOCK or group < 0:
            raise TensorError(f"groups of {group} columns", f"the CPU kernels take multiples of {BLOCK}, or 0 for whole rows")
        sizes = (ctypes.c_size_t * 3)()
        kernels().mr_packed_bytes(format, rows, columns, group, wide, sizes)
        made = [torch.zeros(size, dtype=torch.uint8) for size in sizes[: 3 if zeros else 2]]
        return cls(format, rows, columns, group, made[0], made[1], made[2] if zeros else None, wide=wide)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> Matrix:
        """A view of float32 or bfloat16 [R, C] that lies row by row."""
        if not weight.is_contiguous():
            raise TensorError("a weight does not lie row by row", "call contiguous() on it")
        rows, columns = weight.shape
        held = None if bias is None else bias.detach()
        return cls(_FLOATS[weight.dtype], rows, columns, 0, weight.detach(), bias=held)

    @classmethod
    def stored(
        cls, format: Format, values: Tensor, scales: Tensor, columns: int, group: int, zeros: Tensor | None = None
    ) -> Matrix:
        """A view of canonical integers or e4m3 floats [R, ..]: any group; scales float16 or float32, zeros uint8 [R, G]."""
        held = values if values.dtype == torch.uint8 else values.view(torch.uint8)
        return cls(format, len(values), columns, group, held, scales, zeros, wide=scales.dtype == torch.float32)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def nbytes(self) -> int:
        held = (self.values, self.scales, self.zeros)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    @property
    def struct(self) -> compiled.Matrix:
        """``mr_matrix``; valid as long as this object lives and its tensors stay."""
        if self._struct is None:
            held = (self.values, self.scales, self.zeros, self.bias)
            pointers = (None if t is None else t.data_ptr() for t in held)
            self._struct = compiled.Matrix(self.format, self.rows, self.columns, self.group, self.wide, *pointers)
        return self._struct

    def fill(self, begin: int, rows: Tensor) -> None:
        """Rows [begin, ..) from floats [n, C]: stored as they are (F32, BF16), or rounded to integers.

        TensorError for values that are not finite."""
        if self.format in (Format.F32, Format.BF16):
            self.values[begin : begin + len(rows)].copy_(rows)
            return
        rows = rows if rows.dtype == torch.bfloat16 else rows.float()
        rows = rows.contiguous()
        failed = kernels().mr_fill(self.struct, begin, len(rows), rows.dtype == torch.bfloat16, rows.data_ptr())
        if failed == 2:
            raise OutOfMemory("no memory to round a matrix", "use a smaller model")
        if failed:
            raise TensorError("a weight holds values that are not finite or beyond 500000", "download the file again")

    def pack(self, begin: int, values: Tensor, scales: Tensor, zeros: Tensor | None = None) -> None:
        """Rows [begin, ..) from canonical integers: uint8 [n, C] or [n, ceil(C/2)], scales [n, G], zeros uint8 [n, G]."""
        values, scales = values.contiguous(), scales.float().contiguous()
        given = None if zeros is None else zeros.contiguous()
        kernels().mr_pack(self.struct, begin, len(values), values.data_ptr(), scales.data_ptr(), _address(given))

    def part(self, begin: int, end: int) -> Matrix | None:
        """Rows [begin, end) as a view, without a bias; None where they begin inside a panel."""
        if self.format in (Format.F32, Format.BF16, *STORED):
            held = [None if t is None else t[begin:end] for t in (self.values, self.scales, self.zeros)]
            return Matrix(self.format, end - begin, self.columns, self.group, held[0], *held[1:], wide=self.wide)  # pyright: ignore
        if begin % PANEL or (end % PANEL and end != self.rows):
            return None
        panels = -(-self.rows // PANEL)
        held = [None if t is None else t[begin * (len(t) // panels) // PANEL :] for t in (self.values, self.scales, self.zeros)]
        return Matrix(self.format, end - begin, self.columns, self.group, held[0], *held[1:], wide=self.wide)  # pyright: ignore

    def unpack(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Canonical values, float32 scales and zeros, as ``pack`` takes them."""
        groups = -(-self.columns // self.group) if self.group else 1
        width = -(-self.columns // 2) if self.format == Format.INT4 else self.columns
        values, scales = torch.empty(self.rows, width, dtype=torch.uint8), torch.empty(self.rows, groups, dtype=torch.float32)
        zeros = None if self.zeros is None else torch.empty(self.rows, groups, dtype=torch.uint8)
        kernels().mr_unpack(self.struct, 0, self.rows, values.data_ptr(), scales.data_ptr(), _address(zeros))
        return values, scales, zeros

    def widen(self, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows [begin, end) as float32."""
        count = (self.rows if end is None else min(end, self.rows)) - begin
        return self.widen_into(torch.empty(count, self.columns, dtype=torch.float32), begin)

    def widen_into(self, made: Tensor, begin: int) -> Tensor:
        """Rows from ``begin`` on into float32 [n, C], which lies in one piece."""
        if self.format in (Format.F32, Format.BF16):
            return made.copy_(self.values[begin : begin + len(made)])
        kernels().mr_widen(self.struct, begin, len(made), made.data_ptr())
        return made


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def product(matrix: Matrix, x: Tensor, many: bool = False) -> Tensor:
    """float32 x [.., C] -> [.., R], without gradients. Each row of x has the same result whatever the other rows are.

    ``many``: the order of sums for many rows of x in front of floats, another one. Threads are torch's. OutOfMemory if x cannot
    be rounded."""
    library = kernels()
    flat = x.reshape(-1, matrix.columns).contiguous()
    out = torch.empty(len(flat), matrix.rows, dtype=torch.float32)
    if library.mr_linear(matrix.struct, flat.data_ptr(), len(flat), many, out.data_ptr()):
        raise OutOfMemory(f"no memory to round {len(flat)} x {x.shape[-1]} activations", "send smaller batches")
    return out.view(*x.shape[:-1], matrix.rows)


def swiglu(x: Tensor) -> Tensor:
    """float32 [.., 2 I], gates then ups -> silu(gate) * up [.., I], without gradients."""
    x = x.contiguous()
    inner = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], inner, dtype=torch.float32)
    kernels().mr_swiglu_rows(x.data_ptr(), out.numel() // max(inner, 1), inner, out.data_ptr())
    return out


def gelu(x: Tensor, quick: bool) -> None:
    """GELU of float32 x that lies in one piece, where it lies: by tanh, or ``quick``."""
    kernels().mr_gelu(x.data_ptr(), x.numel(), quick)


def attend_seen(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """softmax(q kᵀ · scale) v inside each segment: float32 [T, H, d] each, channels side by side, rows and heads any number
    apart -> [T, H, d]. Of a single segment q may be some of the queries, [n, H, d] -> [n, H, d]. A query's result depends on
    its segment alone. OutOfMemory; TensorError if lengths do not sum to T."""
    made = torch.empty(q.shape, dtype=torch.float32)
    some = len(q) != len(k)
    if sum(lengths) != len(k) or min(lengths, default=1) < 0 or (some and len(lengths) != 1):
        raise TensorError(f"segments of {list(lengths)} tokens in {len(k)}, {len(q)} asked", "they must sum to all tokens")
    ends = (ctypes.c_int32 * len(lengths))(*lengths)
    strides = (ctypes.c_int64 * 6)(*(x.stride(i) for x in (q, k, v) for i in (0, 1)))
    given = compiled.Seen(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), strides, q.shape[1], q.shape[2], scale, len(lengths),
        ctypes.addressof(ends), made.data_ptr(),
    )  # fmt: skip
    if kernels().mr_attend_some(given, len(q)) if some else kernels().mr_attend_seen(given):
        raise OutOfMemory(f"no memory for the keys of {max(lengths)} tokens", "send smaller pictures")
    return made


def normalise_heads(heads: Tensor, weight: Tensor, eps: float) -> None:
    """RMS norm of float32 [T, H, d], where it lies: channels side by side, rows and heads any number apart."""
    n, count, d = heads.shape
    kernels().mr_norm_heads(heads.data_ptr(), n, heads.stride(0), count, heads.stride(1), d, weight.data_ptr(), eps)


def turn_heads(heads: Tensor, turn: tuple[Tensor, Tensor], pairs: bool = False) -> None:
    """``rope.rotate`` of float32 [T, H, d], where it lies; ``pairs``: of ``rope.pairs_to_halves`` of it."""
    n, count, d = heads.shape
    cos, sin = (side.contiguous() for side in turn)
    if cos.numel() != n * d or kernels().mr_turn_heads(
        heads.data_ptr(), n, heads.stride(0), count, heads.stride(1), d, cos.data_ptr(), sin.data_ptr(), pairs
    ):
        raise TensorError(f"heads {list(heads.shape)} turned by {list(cos.shape)}", "give factors of every token and channel")
