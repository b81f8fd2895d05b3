"""A feed-forward block of many experts, of which each token passes few.

T tokens, D width, E experts, k experts per token, I inner width of an expert. Ported facts: DeepSeek-V3 (arXiv 2412.19437,
2.1.2; ``MoEGate`` of ``modeling_deepseek.py`` in deepseek-ai/DeepSeek-V3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirada.layers import fused
from mirada.layers.experts import Table
from mirada.layers.linear import MatrixStack, linear
from mirada.layers.mlp import GatedMLP


@dataclass(frozen=True)
class Routing:
    """How a token finds its experts: ``top_k`` of the ``kept`` best of ``groups`` groups, weights times ``scale``."""

    experts: int
    top_k: int
    groups: int = 1
    kept: int = 1
    normalise: bool = True
    scale: float = 1.0


class Router(nn.Module):
    """Sigmoid scores; ``bias`` steers which experts are chosen, never how much they weigh. Always float32 or wider."""

    def __init__(self, dim: int, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        self.weight = nn.Parameter(torch.empty(routing.experts, dim).normal_(std=dim**-0.5))
        # Balanced by a rule beside training, never by its gradient.
        self.bias = nn.Parameter(torch.zeros(routing.experts), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, D] -> chosen experts, int64 [T, k], and their weights, float32 [T, k]. Gradients flow through the weights."""
        r = self.routing
        scores = F.linear(x.to(self.weight.dtype), self.weight).sigmoid()
        chosen = self._rank(scores.detach()).topk(r.top_k, -1, sorted=False).indices
        weights = scores.gather(1, chosen)
        if r.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * r.scale

    def _rank(self, scores: Tensor) -> Tensor:
        """[T, E] by which experts are chosen: biased, and out of reach outside the best groups (by their best two)."""
        r, biased = self.routing, scores + self.bias
        if r.groups == r.kept:
            return biased
        grouped = biased.view(len(biased), r.groups, -1)
        best = grouped.topk(2, -1).values.sum(-1).topk(r.kept, -1, sorted=False).indices
        closed = torch.ones(len(biased), r.groups, dtype=torch.bool, device=biased.device).scatter_(1, best, False)
        return grouped.masked_fill(closed[..., None], float("-inf")).flatten(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves, but is never narrowed: in bfloat16 near ties between experts would fall otherwise."""

        def kept_wide(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            return made if made.dtype.itemsize >= 4 else tensor.to(made.device, torch.float32)

        return super()._apply(kept_wide, recurse)


class Experts(nn.Module):
    """E gated feed-forward blocks: ``gate_up`` [E, 2I, D] (gate's rows, then up's) and ``down`` [E, D, I]."""

    first: int | None = None
    """Number of the first expert here, where others lie elsewhere: what those would add is left out."""
    adapted: Callable[[str, int, Tensor, Tensor, Tensor], None] | None = None
    """Called with (name of the stack, expert, its tokens, x, out) of every product, to add to ``out`` what adapters add."""

    def __init__(self, experts: int, dim: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * inner, dim).normal_(std=dim**-0.5))
        self.down = nn.Parameter(torch.empty(experts, dim, inner).normal_(std=inner**-0.5))
        self.table = Table()

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor, shared: nn.Module | None = None) -> Tensor:
        """Sum over a token's experts of weight times expert: x [T, D], chosen and weights [T, k] -> [T, D]; with ``shared``
        (a GatedMLP) added.

        Tokens are sorted by expert, so that each expert is one matrix product over all its tokens. Few tokens on a CPU: in one
        call, where ``layers.experts`` can.
        """
        if self.first is not None:  # those elsewhere come last, beyond the counts
            own = chosen - self.first
            chosen = torch.where((own >= 0) & (own < len(self.down)), own, len(self.down))
        if not self.adapted and (shared is None or fused.plain(shared, *shared.children())):
            made = self.table.run(x, chosen, weights, self.gate_up, self.down, shared)
            if made is not None:
                return made
        made = self._sorted(x, chosen, weights)
        return made if shared is None else made + shared(x)

    def _sorted(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        order = chosen.flatten().argsort(stable=True)
        tokens, shares = order // chosen.shape[1], weights.flatten()[order].to(x.dtype)[:, None]
        counts = self._counts(chosen.flatten())
        if self.first is None and not self.adapted:
            made = fused.experts(x, self.gate_up, self.down, tokens, shares[:, 0], order, counts)
            if made is not None:
                return made
        # What no kernel takes comes one expert at a time: also what is held packed (adapt.packed.PackedStack) in other forms.
        if x.device.type == "cuda" and x.dtype == torch.bfloat16 and isinstance(self.gate_up, Tensor) and not self.adapted:
            return self._grouped(x, tokens, shares, order, counts)
        return self._one_by_one(x, tokens, shares, counts.tolist())

    def _counts(self, chosen: Tensor) -> Tensor:
        """int64 [E]: how often each expert is in ``chosen``. ``bincount`` would wait for a GPU to say the largest."""
        here = len(self.down)
        if chosen.device.type == "cpu":
            return torch.bincount(chosen, minlength=here)[:here]
        return chosen.new_zeros(here + 1).scatter_add_(0, chosen, torch.ones_like(chosen))[:here]

    def _one_by_one(self, x: Tensor, tokens: Tensor, shares: Tensor, counts: list[int]) -> Tensor:
        """``tokens`` and ``shares`` [T * k], sorted by expert, of which expert e takes ``counts[e]``."""
        made = torch.zeros_like(x)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                rows = tokens[start : start + count]
                out = self._product("down", expert, rows, fused.swiglu(self._product("gate_up", expert, rows, x[rows])))
                # No token comes twice to one expert, so each row is added to once: the order of the sum is fixed.
                made.index_add_(0, rows, out * shares[start : start + count])
                start += count
        return made

    def _product(self, name: str, expert: int, rows: Tensor, x: Tensor) -> Tensor:
        held = getattr(self, name)
        made = linear(x, held[expert]) if isinstance(held, Tensor | MatrixStack) else held.product(expert, x)
        if self.adapted is not None:
            self.adapted(name, expert, rows, x, made)
        return made

    def _grouped(self, x: Tensor, tokens: Tensor, shares: Tensor, order: Tensor, counts: Tensor) -> Tensor:
        """The same in two products for all experts together, and no word to the host."""
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(x[tokens], self.gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends) * shares
        if self.first is not None:
            out = out.masked_fill((torch.arange(len(out), device=x.device) >= ends[-1])[:, None], 0)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return out[back].view(len(x), -1, x.shape[1]).sum(1)


class MoE(nn.Module):
    """Routed experts plus experts that every token passes (one block of their joint width)."""

    def __init__(self, dim: int, inner: int, shared: int, routing: Routing) -> None:
        super().__init__()
        self.router = Router(dim, routing)
        self.experts = Experts(routing.experts, dim, inner)
        self.shared = GatedMLP(dim, shared * inner) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.experts(x, *self.router(x), self.shared)
