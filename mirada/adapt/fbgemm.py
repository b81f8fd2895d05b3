"""int8 matrices without our own kernels: torch's ``quantized::linear_dynamic`` (fbgemm), deprecated there, but fast.

It takes one scale for all of x, from its least and largest value. So each row is first brought to magnitudes of at most one,
and a sentinel row that holds both 1 and -1 is appended: the scale is then the same for every batch, and no row changes
another. ``reduce_range`` keeps x to 7 bits: with 8 the 16-bit sums of AVX2 overflow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mirada.errors import NotAvailable, TensorError
from mirada.layers.linear import quantise_rows, refuse_moves

NAME = "quantized::linear_dynamic"


def available() -> bool:
    """Whether this build of torch still has it, with fbgemm behind it."""
    return "fbgemm" in torch.backends.quantized.supported_engines and hasattr(torch.ops.quantized, "linear_dynamic")


class Int8Linear(nn.Module):
    """Stands where a Linear stood: int8 rows with one scale each, filled row by row, then packed at the first use."""

    def __init__(self, rows: int, columns: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        if not available():
            raise NotAvailable(
                f"this torch has no {NAME}", "install Mirada where there is a C compiler, for kernels of its own"
            )
        self.in_features, self.out_features, self.bias = columns, rows, bias
        self._values = torch.zeros(rows, columns, dtype=torch.int8)
        self._scales = torch.zeros(rows, dtype=torch.float16)
        self._packed: Any = None

    def fill(self, begin: int, rows: Tensor) -> None:
        """Rows [begin, ..) from floats [n, C]. TensorError for values that are not finite."""
        if not torch.isfinite(rows).all():
            raise TensorError("a weight holds values that are not finite", "download the file again")
        end = begin + len(rows)
        self._values[begin:end], self._scales[begin:end] = quantise_rows(rows)

    bits = 8

    def widen(self, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows [begin, end) as float32."""
        return self._values[begin:end].float() * self._scales[begin:end].float()[:, None]

    @property
    def weight(self) -> Tensor:
        """[out, in] widened, float32, made anew at each use."""
        return self.widen()

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out] in x's type."""
        if torch.is_grad_enabled() and x.requires_grad:
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)
        if self._packed is None:
            self._packed = _prepack(self._values, self._scales)
        flat = x.reshape(-1, self.in_features).float()
        most = flat.abs().amax(1, keepdim=True)
        even = flat.new_zeros(len(flat) + 1, self.in_features)
        torch.div(flat, torch.where(most == 0, torch.ones_like(most), most), out=even[:-1])
        even[-1, 0], even[-1, -1] = 1.0, -1.0
        made = torch.ops.quantized.linear_dynamic(even, self._packed, True)[:-1] * most
        made = made if self.bias is None else made + self.bias
        return made.view(*x.shape[:-1], -1).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        refuse_moves(fn)
        return super()._apply(fn, recurse)


def _prepack(values: Tensor, scales: Tensor) -> Any:
    safe = torch.where(scales == 0, torch.ones_like(scales), scales).double()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantize_per_tensor.*deprecated", category=UserWarning)
        zeros = torch.zeros(len(values), dtype=torch.long)
        held = torch._make_per_channel_quantized_tensor(values, safe, zeros, 0)  # pyright: ignore[reportPrivateImportUsage]
        return torch.ops.quantized.linear_prepack(held, None)
