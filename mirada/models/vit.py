"""Vision towers: the parts that families share, and KeyeViT, which two of them are built on.

N patches, W width, d head size. Ported facts: Keye ``modeling_keye.py`` (SiglipVisionTransformer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mirada.errors import ConfigError
from mirada.layers import fused
from mirada.layers.attention import attend_packed, attend_some
from mirada.layers.embed import GridPositions, PatchEmbed
from mirada.layers.kinds import DEFAULT
from mirada.layers.linear import Linear
from mirada.layers.mlp import MLP, Gelu
from mirada.layers.norm import LayerNorm
from mirada.layers.rope import Rotation, grid_angles, pairs_to_halves, rotate, rotation
from mirada.models.slices import Room, SlicedTower, Slices, Work, by_rows, cuts, seen, through, unbound
from mirada.types import Grid


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes that every tower has."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    patch_size: int = 14
    temporal_patch_size: int = 1
    """Frames that one patch spans."""
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    spatial_merge_size: int = 2
    """Side of the square of patches that becomes one token."""
    merged_order: bool = False
    """Patches come square after square instead of row after row."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def check_heads(config: VisionConfig, where: str) -> None:
    """ConfigError unless the width is a whole number of heads, each of which halves and halves again."""
    if config.hidden_size % config.num_attention_heads or config.head_dim % 4:
        raise ConfigError(
            f"{where}: width {config.hidden_size} over {config.num_attention_heads} heads",
            "the head size must be a whole multiple of 4, half of it for rows and half for columns",
        )


class VisionAttention(nn.Module):
    """Bidirectional attention inside each segment; ``qkv`` holds the rows of q, then k, then v."""

    attention_kind: str = DEFAULT
    pairs: bool = False

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        self.qkv = Linear(dim, 3 * dim, bias=True)
        self.out = Linear(dim, dim, bias=True)

    def forward(self, x: Tensor, turn: Rotation, segments: Sequence[int]) -> Tensor:
        qk, v = self._turned(x, turn)
        q, k = qk.split(self.heads, 1)
        mixed = attend_packed(q, k, v, segments, causal=False, scale=q.shape[-1] ** -0.5, kind=self.attention_kind)
        return self.out(mixed.reshape(x.shape))

    def _turned(self, x: Tensor, turn: Rotation) -> tuple[Tensor, Tensor]:
        """Queries and keys [N, 2 H, d], turned, and values [N, H, d]."""
        qkv = self.qkv(x)
        qk, v = qkv.view(len(x), 3 * self.heads, -1).split((2 * self.heads, self.heads), 1)
        turned = fused.turn_in_place(qkv, self.qkv, qk, turn, pairs=self.pairs)
        if turned is None:
            turned = rotate(pairs_to_halves(qk) if self.pairs else qk, turn)
        return turned, v

    def slices(self, norm: nn.Module, x: Tensor, turn: Rotation, segments: Sequence[int], room: Room) -> Slices[Tensor]:
        """x [N, W] -> what ``out`` is given when the layer is computed whole."""
        cos, sin = turn

        def rows(a: int, b: int) -> Tensor:
            return torch.cat(self._turned(norm(x[a:b]), (cos[a:b], sin[a:b])), 1)

        qkv = yield from by_rows(rows, len(x), Work(products=3 * self.dim**2), room)
        d = self.dim // self.heads
        mixed = x.new_empty(len(x), self.heads, d)
        for cut, work in cuts(segments, self.heads, d, room):
            yield work
            q, k, v = (part[:, cut.heads] for part in qkv[cut.tokens].split(self.heads, 1))
            if len(cut.lengths) == 1:
                made = attend_some(q[cut.queries], k, v, d**-0.5, self.attention_kind)
            else:
                made = attend_packed(q, k, v, cut.lengths, causal=False, scale=d**-0.5, kind=self.attention_kind)
            mixed[cut.tokens][cut.queries, cut.heads] = made
        return mixed.view(x.shape)


class PairedAttention(VisionAttention):
    """Adjacent channels turn together, instead of channel i with channel i + d/2."""

    pairs = True


class VisionLayer(nn.Module):
    """Norm, attention, norm, MLP, each pair around a residual."""

    def __init__(self, config: VisionConfig, gelu: Gelu, attention: type[VisionAttention] = VisionAttention) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = attention(config.hidden_size, config.num_attention_heads)
        self.norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_size, gelu=gelu)
        self._rest = Work(products=config.hidden_size * (config.hidden_size + 2 * config.intermediate_size))

    def work(self, segments: Sequence[int]) -> Work:
        """Of all of it, for segments so long."""
        products = sum(segments) * (3 * self.attention.dim**2 + self._rest.products)
        return Work(products, seen(segments, self.attention.dim).pairs)

    def slices(self, x: Tensor, turn: Rotation, segments: Sequence[int], room: Room) -> Slices[Tensor]:
        """One where it fits; else the queries, keys and values of some rows, the attention of some queries, or all that follows
        of some rows: what is widest, [N, 4 W], is never there for all."""
        work = self.work(segments)
        # What is hooked on the layer itself, or put in its place, must see it whole.
        if room(work) <= 1 or not fused.plain(self, self.attention):
            yield work
            return self(x, turn, segments)
        mixed = yield from self.attention.slices(self.norm1, x, turn, segments, room)

        def rest(a: int, b: int) -> Tensor:
            y = x[a:b] + self.attention.out(mixed[a:b])
            return y + self.mlp(self.norm2(y))

        return (yield from by_rows(rest, len(x), self._rest, room, into=mixed))

    def forward(self, x: Tensor, turn: Rotation, segments: Sequence[int]) -> Tensor:
        x = x + self.attention(self.norm1(x), turn, segments)
        return x + self.mlp(self.norm2(x))


def grid_segments(grids: Sequence[Grid], frames_apart: bool) -> tuple[int, ...]:
    """Lengths of the runs of patches that see each other: each frame, or each picture and each whole video."""
    if frames_apart:
        return tuple(h * w for t, h, w in grids for _ in range(t))
    return tuple(t * h * w for t, h, w in grids)


def embedded(patches: PatchEmbed, pixels: Tensor, room: Room) -> Slices[Tensor]:
    """[N, ..] patches -> [N, W]."""
    each = Work(products=pixels[:1].numel() * patches.width)
    return (yield from by_rows(lambda a, b: patches(pixels[a:b]), len(pixels), each, room))


def placed(patches: PatchEmbed, positions: GridPositions, pixels: Tensor, grids: Sequence[Grid], room: Room) -> Slices[Tensor]:
    """Patch vectors plus their place in the picture: [N, W]."""
    x = yield from embedded(patches, pixels, room)
    yield Work(numbers=x.numel())
    return x + positions(grids)


@dataclass(frozen=True, kw_only=True)
class KeyeVisionConfig(VisionConfig):
    """Sizes of KeyeViT; names as in the released ``vision_config``."""

    image_size: int
    tokens_per_second: float = 2.0

    @property
    def table_side(self) -> int:
        """Side of the learnt position table, in patches."""
        return self.image_size // self.patch_size


class KeyeVisionTower(SlicedTower):
    """KeyeViT, a SigLIP encoder at native resolution with rows and columns as rotary angles: [N, C, P, P] patches of all
    pictures -> [N, W] features, one per patch, after the last norm."""

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = PatchEmbed(config.num_channels, config.patch_size, config.hidden_size)
        self.positions = GridPositions(config.table_side, config.hidden_size)
        self.layers = nn.ModuleList(VisionLayer(config, gelu="tanh") for _ in range(config.num_hidden_layers))
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def slices(self, pixels: Tensor, grids: Sequence[Grid], segments: Sequence[int], room: Room = unbound) -> Slices[Tensor]:
        x = yield from placed(self.patches, self.positions, pixels, grids, room)
        del pixels
        turn = rotation(grid_angles(grids, self.config.head_dim, self.config.rope_theta, x.device))
        return self.norm((yield from through(self.layers, x, turn, segments, room)))
