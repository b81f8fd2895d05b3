"""Feed-forward blocks."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Gelu = Literal["tanh", "none"]
"""``tanh``: the approximation; ``none``: exact (erf)."""


class MLP(nn.Module):
    """Linear, GELU, Linear: [.., D] -> [.., out]."""

    def __init__(self, dim: int, inner: int, out: int, gelu: Gelu) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, inner)
        self.fc2 = nn.Linear(inner, out)
        self.gelu: Gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x). ``gate_up`` holds the gate's rows, then the up's."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * inner, bias=False)
        self.down = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)
