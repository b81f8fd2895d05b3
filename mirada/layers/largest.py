"""Where the largest number of each row lies, in one pass."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mirada.layers.kernels import library as compiled


def largest(x: Tensor) -> list[int] | None:
    """Per row of float32 x [n, V] the place of its largest number, of equal ones the first; -1 where that is not finite or a
    number of the row is NaN. None where the compiled kernels are not there or do not read x."""
    library = compiled.library()
    if library is None or x.device.type != "cpu" or x.dtype != torch.float32 or not x.is_contiguous():
        return None
    rows, width = x.shape
    made = (ctypes.c_int64 * rows)()
    library.mr_largest(x.data_ptr(), rows, width, ctypes.addressof(made))
    return made[:]
