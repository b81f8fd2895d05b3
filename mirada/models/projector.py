"""From patch features to the decoder's width: each square of patches becomes one token.

N patches, W width of the tower, D width of the decoder. Ported facts: Keye ``modeling_keye.py`` (Projector), vLLM
``keye_vl1_5.py``, transformers ``modeling_qwen2_vl.py`` (PatchMerger).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mirada.layers import fused
from mirada.layers.mlp import MLP
from mirada.layers.norm import LayerNorm
from mirada.models.slices import Room, Slices, Work, by_rows
from mirada.models.vit import VisionConfig
from mirada.types import Grid


class Projector(nn.Module):
    """[N, W] -> [N/merge², D]: normalise, lay the patches of a square side by side, Linear, exact GELU, Linear.

    ``merge_then_norm``: the norm goes over the whole square instead of each patch.
    """

    def __init__(self, vision: VisionConfig, dim: int, eps: float, merge_then_norm: bool = False) -> None:
        super().__init__()
        self.merge, self.merge_then_norm = vision.spatial_merge_size, merge_then_norm
        self.merged_order = vision.merged_order
        wide = vision.hidden_size * self.merge**2
        self.norm = LayerNorm(wide if merge_then_norm else vision.hidden_size, eps)
        self.mlp = MLP(wide, wide, dim, gelu="none")
        self._each = Work(products=wide * (wide + dim))

    def forward(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        return self.mlp(self._normed(x, grids))

    def slices(self, x: Tensor, grids: Sequence[Grid], room: Room) -> Slices[Tensor]:
        """``forward``: in one where it fits, else by squares."""
        count, area = len(x) // self.merge**2, self.merge**2
        work = self._each.times(count)
        if room(work) <= 1 or not fused.plain(self):
            yield work
            return self(x, grids)
        yield Work(numbers=x.numel())
        squares = self._normed(x, grids)
        del x
        return (yield from by_rows(lambda a, b: self.mlp(squares[a:b]), count, self._each, room, area=area))

    def _normed(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """[N/merge², merge²·W]."""
        return self.norm(self.square(x, grids)) if self.merge_then_norm else self.square(self.norm(x), grids)

    def square(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """[N, W] -> [N/merge², merge²·W]."""
        if self.merged_order:  # the patches of a square already follow one another
            return x.reshape(-1, self.merge**2 * x.shape[-1])
        return merge_patches(x, grids, self.merge)


def merge_patches(x: Tensor, grids: Sequence[Grid], merge: int) -> Tensor:
    """[N, W] row-major patches -> [N/merge², merge²·W]: each square's patches side by side, row by row."""
    pieces = x.split([t * h * w for t, h, w in grids])
    return torch.cat(
        [
            piece.view(t * (h // merge), merge, w // merge, merge, -1).transpose(1, 2).reshape(t * h * w // merge**2, -1)
            for piece, (t, h, w) in zip(pieces, grids, strict=True)
        ]
    )
