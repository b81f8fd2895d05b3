"""The experts of a few tokens on a CPU, as one call of compiled code (``kernels/experts.c``).

For one token each expert is read once and used once, so its time is the memory's; torch's calls and Python between the products
of a handful of experts would come on top. What is not for it (gradients, adapters, many tokens, matrices that the kernels do
not read) is left to ``moe.Experts``' own forward, which is the reference.

T tokens, D width, E experts, k experts per token, I inner width of an expert.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mirada.errors import OutOfMemory
from mirada.layers import fused
from mirada.layers.kernels import library as compiled
from mirada.layers.kernels.matrix import Format, Matrix, kernels
from mirada.layers.linear import FEW, Linear, MatrixLinear, MatrixStack

_FLOATS = {torch.float32: Format.F32, torch.bfloat16: Format.BF16}


class Expert(ctypes.Structure):
    """``mr_expert`` of experts.h."""

    _fields_ = tuple((name, compiled.Matrix) for name in ("gate", "up", "down"))


class _Refused(Exception):
    """Something that the kernels do not read: the modules' own forward computes. Never seen by callers of ``Table``."""


class Table:
    """Addresses of the experts of one block, made when they are wanted and again when a matrix is no longer what it was.

    A copy or a pickle begins without addresses: they are of one process.
    """

    def __init__(self) -> None:
        self._of: tuple[Any, ...] = ()
        """What the addresses rest on, held so that it cannot be replaced by another of the same identity."""
        self._array: ctypes.Array[Expert] | None = None
        self._shared: Expert | None = None

    def __reduce__(self) -> tuple[type[Table], tuple[()]]:
        return Table, ()

    def run(
        self, x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Any, down: Any, shared: nn.Module | None = None
    ) -> Tensor | None:
        """x [T, D], chosen experts and their weights [T, k] -> [T, D], with ``shared`` (a GatedMLP) added to each token.

        ``gate_up`` and ``down``: parameters [E, R, C], or what stands in their place. Numbers outside 0 .. E - 1 are left out.
        None, and nothing computed, where this is not for compiled code. OutOfMemory if there is no room.
        """
        if not self._suits(x) or self.addresses(gate_up, down, shared) is None:
            return None
        x, chosen, weights = x.contiguous(), chosen.contiguous(), weights.float().contiguous()
        out = torch.empty_like(x)
        by = None if self._shared is None else ctypes.byref(self._shared)
        failed = kernels().mr_experts(
            self._array, len(down), by, chosen.data_ptr(), weights.data_ptr(), chosen.shape[1], x.data_ptr(), len(x),
            out.data_ptr(),
        )  # fmt: skip
        if failed:
            raise OutOfMemory(f"no memory for the experts of {len(x)} tokens", "use a smaller model")
        return out

    def _suits(self, x: Tensor) -> bool:
        return x.dtype == torch.float32 and 0 < len(x) <= FEW and fused.compiles(x)

    def addresses(self, gate_up: Any, down: Any, shared: nn.Module | None) -> tuple[ctypes.Array[Expert], Expert | None] | None:
        """Of each expert, and of ``shared``; None for matrices that the kernels do not read."""
        of = (gate_up, down, *_places(gate_up), *_places(down), *_parts(shared))
        if len(of) != len(self._of) or any(
            a is not b and (type(a) is not int or a != b) for a, b in zip(of, self._of, strict=True)
        ):
            self._of, self._array = of, None
            try:
                made = [_struct(*both) for both in zip(_matrices(gate_up), _matrices(down), strict=True)]
                self._shared = None if shared is None else _shared(shared)
                _check([*made, *([self._shared] if self._shared else [])])
                self._array = (Expert * len(made))(*made)
            except _Refused:
                pass
        return None if self._array is None else (self._array, self._shared)


def _places(stack: Any) -> tuple[int, ...]:
    return (stack.data_ptr(),) if isinstance(stack, Tensor) else ()


def _parts(shared: nn.Module | None) -> tuple[Any, ...]:
    """All that ``_shared`` reads."""
    if shared is None:
        return ()
    made: list[Any] = [shared, *shared._modules.values()]
    for linear in shared._modules.values():
        made += [getattr(linear, "matrix", None), *_places(linear._parameters.get("weight"))]  # pyright: ignore
        made += linear.compiled_matrices() or () if hasattr(linear, "compiled_matrices") else ()  # pyright: ignore
    return tuple(made)


def _matrices(stack: Any) -> list[list[Matrix]]:
    """Of each expert: one matrix, or several that are stored apart and lie one below another."""
    if isinstance(stack, MatrixStack):
        return [[one] for one in stack.matrices]
    if not isinstance(stack, Tensor):  # held as a checkpoint packs it (adapt.packed.PackedStack)
        held = [stack.compiled_matrices(e) for e in range(len(stack))]
        if any(one is None for one in held):
            raise _Refused
        return held
    if type(stack) not in (Tensor, nn.Parameter) or stack.dtype not in _FLOATS or not stack.is_contiguous():
        raise _Refused
    return [[Matrix.of(one)] for one in stack.detach()]


def _gates(matrices: list[Matrix]) -> list[Matrix]:
    """Gate and up: as they are stored, or the halves of one."""
    if len(matrices) == 1:
        whole, inner = matrices[0], matrices[0].rows // 2
        matrices = [part for part in (whole.part(0, inner), whole.part(inner, whole.rows)) if part is not None]
    if len(matrices) != 2:
        raise _Refused
    return matrices


def _struct(gate_up: list[Matrix], down: list[Matrix]) -> Expert:
    if len(down) != 1:
        raise _Refused
    made, (gate, up) = Expert(), _gates(gate_up)
    made.gate, made.up, made.down = gate.struct, up.struct, down[0].struct
    return made


def _shared(shared: Any) -> Expert:
    return _struct(_matrix(shared.gate_up), _matrix(shared.down))


def _matrix(linear: Any) -> list[Matrix]:
    if linear.bias is not None:
        raise _Refused
    if type(linear) is MatrixLinear:
        return [linear.matrix]
    if type(linear) is Linear:
        return _matrices(linear.weight[None])[0]
    made = linear.compiled_matrices() if hasattr(linear, "compiled_matrices") else None  # adapt.packed.PackedLinear
    if made is None:
        raise _Refused
    return made


def _check(made: Sequence[Expert]) -> None:
    """All that the compiled code takes for granted."""
    width = made[0].down.rows
    for e in made:
        inner = e.down.cols
        sizes = (e.gate.rows, e.gate.cols, e.up.rows, e.up.cols, e.down.rows)
        if sizes != (inner, width, inner, width, width) or (e.gate.format, e.gate.group) != (e.up.format, e.up.group):
            raise _Refused
