"""Feed-forward blocks."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirada.layers import fused
from mirada.layers.linear import Linear

Gelu = Literal["tanh", "none", "quick"]
"""``tanh``: the approximation; ``none``: exact (erf); ``quick``: x * sigmoid(1.702 x)."""


def gelu(x: Tensor, kind: Gelu) -> Tensor:
    """GELU in one of its forms."""
    return x * torch.sigmoid(1.702 * x) if kind == "quick" else F.gelu(x, approximate=kind)


class MLP(nn.Module):
    """Linear, GELU, Linear: [.., D] -> [.., out]."""

    def __init__(self, dim: int, inner: int, out: int, gelu: Gelu) -> None:
        super().__init__()
        self.fc1 = Linear(dim, inner, bias=True)
        self.fc2 = Linear(inner, out, bias=True)
        self.gelu: Gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        wide = self.fc1(x)
        return self.fc2(wide if fused.gelu_in_place(wide, self.fc1, self.gelu) else gelu(wide, self.gelu))


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x). ``gate_up`` holds the gate's rows, then the up's."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * inner)
        self.down = Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(fused.swiglu(self.gate_up(x)))
