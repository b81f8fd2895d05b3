"""What an objective gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class Loss:
    """``total`` is a scalar to minimise; ``figures`` are scalars to log."""

    total: torch.Tensor
    figures: Mapping[str, torch.Tensor] = field(default_factory=dict)
