"""AdamW groups, learning-rate schedules, moving averages and rounding-aware weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from mirada.errors import SettingsError

Shape = Literal["constant", "cosine", "linear"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Rate over steps: a linear warm-up, then constant, or down to ``floor`` times the peak by cosine or line."""

    peak: float
    steps: int
    warmup: int = 100
    shape: Shape = "cosine"
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in ("constant", "cosine", "linear"):
            raise SettingsError(f"schedule shape {self.shape!r} is unknown", "use constant, cosine or linear")

    def at(self, step: int) -> float:
        """Rate for step ``step`` (from 0)."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        fall = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}[self.shape]
        return self.peak * (self.floor + (1 - self.floor) * fall)


def adamw(modules: Iterable[nn.Module], weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW over what requires a gradient; matrices decay, vectors (norms, biases) do not."""
    params = list({id(p): p for module in modules for p in module.parameters() if p.requires_grad}.values())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, foreach=True)


class Average:
    """Exponential moving average of a model's parameters, with a warm-up so that early steps count."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.params = dict(model.named_parameters())
        self.shadow = {name: p.detach().clone() for name, p in self.params.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        shadow, live = list(self.shadow.values()), [self.params[name].detach() for name in self.shadow]
        torch._foreach_lerp_(shadow, live, 1 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        for name, param in self.params.items():
            param.copy_(self.shadow[name])


class RoundRows(nn.Module):
    """Weights as they will be after int8 rows with fp16 scales; gradients pass straight through (Bengio et al. 2013)."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        scale = (weight.detach().abs().amax(-1, keepdim=True) / 127).half().float().clamp(min=1e-8)
        rounded = (weight.detach() / scale).round().clamp(-127, 127) * scale
        return weight + (rounded - weight).detach()


def round_rows(model: nn.Module) -> None:
    """Make every matrix of ``model`` that export stores as int8 rows train as if it were so already."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not parametrize.is_parametrized(module):
            parametrize.register_parametrization(module, "weight", RoundRows())


def unround_rows(model: nn.Module) -> None:
    """Undo ``round_rows``; the weights keep their full-precision values, tied ones stay tied."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
