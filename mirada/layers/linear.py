"""Matrix products, and matrices stored as int8 rows with one scale each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirada.errors import NotAvailable
from mirada.layers.kernels import library as compiled
from mirada.layers.kernels.matrix import STORED, Format, Matrix, product

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_ONEDNN_FROM = 1 << 20
"""Multiplications below which the ten microseconds that oneDNN takes to find its kernel cost more than it saves."""
FEW = 8
"""Rows of x up to which reading the weight bounds a product: the compiled kernels, if they are there, read it once for all."""
FEW_STORED = 64
"""The same for matrices as checkpoints store them, which are widened a few rows at a time; more go to oneDNN by tiles."""
_FEW_FROM = 1 << 20
"""Elements from which a weight comes from memory each time; a smaller one may lie in the cache, where MKL is quick."""
TILE_BYTES = 2 << 20
"""Float32 bytes of a tile of a matrix in another form: it stays in the cache between being widened and being multiplied."""


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, ..] float -> int8 of the same shape and float16 scales [rows]: value = int8 * scale.

    Symmetric, largest magnitude to 127, rounded to even with the scale as it is stored. A row of zeros has scale zero.
    """
    flat = weight.detach().float().flatten(1)
    scale = (flat.abs().amax(1) / 127).to(torch.float16)
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    values = (flat / divisor[:, None]).round_().clamp_(-127, 127)
    # A row too small for float16's least step would be divided by one: that is zeros, as it should be.
    return values.to(torch.int8).view(weight.shape), scale


def dequantise_rows(values: Tensor, scale: Tensor) -> Tensor:
    """int8 [rows, ..] and scales [rows] -> float32 [rows, ..]."""
    return values.float() * scale.float().view(-1, *[1] * (values.ndim - 1))


def linear(x: Tensor, weight: Tensor | Matrix, bias: Tensor | None = None) -> Tensor:
    """x [.., columns] times weight [rows, columns] transposed, plus bias [rows] -> [.., rows]; differentiable where gradients
    are wanted.

    On a CPU in float32 without gradients up to ``FEW`` rows of x go to the compiled kernels, which read the weight at the
    speed of memory and give each row the same result bit by bit however many there are; more go to oneDNN. torch's own choice
    there is MKL, which on a processor that is not Intel's takes up to three times as long for more than a few rows of x.

    oneDNN reads the weight as it lies. Packed into oneDNN's own form first it saves, at 256 rows of x, 4 % of the matrices of
    Qwen2-VL's tower, 8 % of its 2B decoder's and nothing that could be told with AVX2 alone (``benchmarks/tower.py``): not
    worth a second copy of every weight, which the kernels for few rows would still need as it lies.
    """
    if isinstance(weight, Matrix):
        return _matrix_linear(x, weight, bias)
    if x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled():
        if weight.numel() >= _FEW_FROM and x.numel() <= FEW * x.shape[-1] and _compiled(weight, bias):
            return product(Matrix.of(weight, bias), x)
        if _ONEDNN and x.numel() * len(weight) >= _ONEDNN_FROM:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _compiled(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the compiled kernels may read ``weight``: they take addresses, which subclasses and traces do not have."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_contiguous() and (bias is None or bias.dtype == torch.float32)
    return plain and not torch.compiler.is_compiling() and compiled.library() is not None


def _matrix_linear(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """By the kernels. Floats in front of many rows need those for vectors; without them they are widened tile by tile."""
    if torch.is_grad_enabled() and x.requires_grad:
        return F.linear(x, matrix.widen().to(x.dtype), bias)
    wide = x.float()
    floats = matrix.format in (Format.F32, Format.BF16)
    if matrix.format in STORED and wide.numel() > FEW_STORED * matrix.columns:
        return _by_tiles(wide, matrix, bias).to(x.dtype)
    many = floats and wide.numel() > FEW * matrix.columns
    if floats and (compiled.library() is None or (many and compiled.status().name == "scalar")):
        return _by_tiles(wide, matrix, bias).to(x.dtype)
    made = product(matrix, wide, many)
    return (made if bias is None else made.add_(bias)).to(x.dtype)


def _by_tiles(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """float32 x; never a product in bfloat16: that would round x without a word."""
    flat = x.reshape(-1, matrix.columns)
    out = torch.empty(len(flat), matrix.rows, dtype=torch.float32)
    step = max(1, TILE_BYTES // (4 * matrix.columns))
    tile = torch.empty(min(step, matrix.rows), matrix.columns, dtype=torch.float32)
    for begin in range(0, matrix.rows, step):
        held = matrix.widen_into(tile[: min(step, matrix.rows - begin)], begin)
        part = None if bias is None else bias[begin : begin + len(held)]
        out[:, begin : begin + len(held)] = linear(flat, held, part)
    return out.view(*x.shape[:-1], matrix.rows)


class Linear(nn.Linear):
    """torch's through ``linear``; without a bias unless asked."""

    stays_float: bool = False
    """Its weight is read by another module, so a quantised checkpoint is widened into it, never held packed."""

    def __init__(self, columns: int, rows: int, bias: bool = False) -> None:
        super().__init__(columns, rows, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class MatrixLinear(nn.Module):
    """Stands where a Linear stood, with its matrix in a form that only the CPU kernels read."""

    def __init__(self, matrix: Matrix, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias = bias
        self.in_features, self.out_features = matrix.columns, matrix.rows

    @property
    def weight(self) -> Tensor:
        """[out, in] widened, float32, made anew at each use."""
        return self.matrix.widen()

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out] in x's type."""
        return linear(x, self.matrix, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        refuse_moves(fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        m = self.matrix
        return f"rows={m.rows}, columns={m.columns}, format={m.format.name.lower()}, group={m.group}"


class MatrixStack(nn.Module):
    """Stands where a parameter [E, R, C] of stacked matrices stood; ``stack[e]`` is matrix e, for ``linear``."""

    def __init__(self, matrices: list[Matrix]) -> None:
        super().__init__()
        self.matrices = matrices
        self.shape = torch.Size((len(matrices), *matrices[0].shape))

    def __len__(self) -> int:
        return len(self.matrices)

    def __getitem__(self, index: int) -> Matrix:
        return self.matrices[index]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        refuse_moves(fn)
        return super()._apply(fn, recurse)


def refuse_moves(fn: Callable[[Tensor], Tensor]) -> None:
    """NotAvailable if ``fn`` moves tensors off the CPU."""
    if fn(torch.empty(0)).device.type != "cpu":
        raise NotAvailable("matrices in the form of the CPU kernels stay on the CPU", "load the model on that device anew")
