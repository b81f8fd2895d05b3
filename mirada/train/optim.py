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
from mirada.layers.linear import dequantise_rows, quantise_rows

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


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for the matrices inside a network (Keller Jordan 2024, "Muon").

    Scaled by 0.2 * sqrt(larger side), so that one rate serves it and AdamW (Moonlight, arXiv 2502.16982, section 2.2).
    A group's ``pieces`` cuts fused matrices (q, k and v in one) into that many equal blocks of rows, each made orthogonal
    alone. All blocks of one shape are worked on in one batched product, in ``dtype``.
    """

    def __init__(
        self, groups: Iterable[dict], weight_decay: float, momentum: float = 0.95, dtype: torch.dtype = torch.float32
    ) -> None:
        self.dtype = dtype
        super().__init__(groups, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum, "pieces": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        blocks: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor, float]]] = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["velocity"] = torch.zeros_like(param)
                velocity = state["velocity"].lerp_(param.grad, 1 - group["momentum"])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                ahead = param.grad.lerp(velocity, group["momentum"])
                for part, update in zip(param.chunk(group["pieces"]), ahead.chunk(group["pieces"]), strict=True):
                    rows, columns = sorted(part.shape)
                    blocks.setdefault((rows, columns), []).append((part, update, group["lr"]))
        for (_, columns), members in blocks.items():
            stacked = torch.stack([u.T if u.shape[0] > u.shape[1] else u for _, u, _ in members])
            for (part, update, rate), made in zip(members, orthogonal(stacked.to(self.dtype)).to(stacked.dtype), strict=True):
                made = made.T if update.shape[0] > update.shape[1] else made
                part.add_(made, alpha=-rate * 0.2 * columns**0.5)


def orthogonal(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """[B, r, c] with r <= c -> matrices of the same row spaces with singular values near 1 (quintic Newton-Schulz)."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def optimizers(
    modules: nn.Module,
    weight_decay: float,
    betas: tuple[float, float],
    kind: Literal["adamw", "muon"] = "adamw",
    dtype: torch.dtype = torch.float32,
) -> list[torch.optim.Optimizer]:
    """What updates everything that requires a gradient. ``muon``: Muon for matrices inside ``layers``
    (its products in ``dtype``), AdamW for the rest.

    Matrices decay, vectors (norms, biases) do not.
    """
    if kind not in ("adamw", "muon"):
        raise SettingsError(f"optimizer {kind!r} is unknown", "use adamw or muon")
    named = {name: p for name, p in modules.named_parameters() if p.requires_grad}
    inner = {name: p for name, p in named.items() if kind == "muon" and p.ndim == 2 and ".layers." in name}
    rest = [p for name, p in named.items() if name not in inner]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    made: list[torch.optim.Optimizer] = []
    if any(g["params"] for g in groups):
        made.append(torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, foreach=True))
    if inner:
        by_pieces: dict[int, list[nn.Parameter]] = {}
        for name, p in inner.items():
            by_pieces.setdefault(_pieces(name, p), []).append(p)
        made.append(Muon([{"params": ps, "pieces": n} for n, ps in by_pieces.items()], weight_decay, dtype=dtype))
    return made


def _pieces(name: str, param: nn.Parameter) -> int:
    """How many equal matrices are fused in this one."""
    rows, columns = param.shape
    if "gate_up" in name:
        return 2
    return rows // columns if "qkv" in name and rows % columns == 0 else 1


class Average:
    """Exponential moving average of a model's parameters, with a warm-up so that early steps count."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.params = dict(model.named_parameters())
        self.shadow = {name: p.detach().clone() for name, p in self.params.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        for name, shadow in self.shadow.items():
            shadow.lerp_(self.params[name], 1 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        for name, param in self.params.items():
            param.copy_(self.shadow[name])


class RoundRows(nn.Module):
    """Weights as they will be after int8 rows with fp16 scales; gradients pass straight through (Bengio et al. 2013)."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (dequantise_rows(*quantise_rows(weight)) - weight).detach()


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
