"""Where the latents of past tokens live (multi-head latent attention).

T new tokens of all sequences end to end; S past + new tokens of one sequence; W latent and rotary key together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mirada.layers.cache import Cache, Slabs
from mirada.layers.kv_int8 import Quantised

if TYPE_CHECKING:
    from mirada.layers.batch import Batch

Rows = Tensor | Quantised
"""Latents of one sequence [S, W]."""


class Latents(Cache):
    """One row of W = ``latent_dim`` + ``rope_dim`` values per token and layer, whatever the number of heads; a layout of them
    comes beside it.

    A row is the normalised latent, then the rotated key that all heads share (DeepSeek-V2, arXiv 2405.04434, 2.1). As int8
    each of the two has a scale: their magnitudes have nothing in common.
    """

    def __init__(
        self,
        num_layers: int,
        latent_dim: int,
        rope_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kv: str = "auto",
        budget: int | None = None,
        **layout: Any,
    ) -> None:
        sides, parts = ((1, latent_dim + rope_dim),), (latent_dim, rope_dim)
        super().__init__(num_layers, sides, dtype, device, kv, budget, parts, **layout)
        self.latent_dim = latent_dim
        self.rope_dim = rope_dim

    def extend(self, layer: int, rows: Tensor, batch: Batch) -> list[Rows]:
        """Keep the new ``rows`` [T, W]; of each sequence all rows so far [S, W], as views where the layout allows."""
        made: list[Rows] = []
        for new, past, slot in zip(rows[:, None].split(batch.lengths), batch.past, batch.slots, strict=True):
            (side,) = self.write(layer, slot, past, new)
            made.append(Quantised(side.values[0], side.scales[0], side.parts) if isinstance(side, Quantised) else side[0])
        return made


class LatentCache(Latents, Slabs):
    """Latents in slabs [1, capacity, W]."""
