"""Where the latents of past tokens live (multi-head latent attention).

T new tokens of all sequences end to end; S past + new tokens of one sequence; W latent and rotary key together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mirada.layers.cache import Slabs

if TYPE_CHECKING:
    from mirada.layers.batch import Batch


class LatentCache(Slabs):
    """One row of W = ``latent_dim`` + ``rope_dim`` values per token and layer, whatever the number of heads.

    A row is the normalised latent, then the rotated key that all heads share (DeepSeek-V2, arXiv 2405.04434, 2.1).
    """

    def __init__(
        self,
        num_layers: int,
        latent_dim: int,
        rope_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(num_layers, ((1, latent_dim + rope_dim),), dtype, device)
        self.latent_dim = latent_dim
        self.rope_dim = rope_dim

    def extend(self, layer: int, rows: Tensor, batch: Batch) -> list[Tensor]:
        """Keep the new ``rows`` [T, W]; of each sequence all rows so far [S, W], as views."""
        made: list[Tensor] = []
        start = 0
        for length, past, slot in zip(batch.lengths, batch.past, batch.slots, strict=True):
            made.append(self.write(layer, slot, past, rows[start : start + length, None])[0][0])
            start += length
        return made
