"""What a compiled step is planned from: the modules of a decoder, as its family names them.

H query heads, d head width (over latents: the channels that turn).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mirada.layers.mla import MLA, LatentSizes
from mirada.layers.mlp import GatedMLP
from mirada.layers.moe import MoE


class Unplannable(Exception):
    """A module that a plan cannot take: its own forward computes. Never seen by callers of ``step.Step``."""


@dataclass(frozen=True)
class Heads:
    """The modules of attention by groups of heads."""

    qkv: nn.Module
    norms: tuple[nn.Module, nn.Module] | None
    """Of the heads of queries and of keys."""
    out: nn.Module


@dataclass(frozen=True)
class Block:
    """The modules of one layer, in the order in which they are used."""

    norm1: nn.Module
    attention: Heads | MLA
    norm2: nn.Module
    mlp: GatedMLP | MoE


@dataclass(frozen=True)
class Shape:
    """Heads and rotation. ``frequencies`` [d/2], and for each of them the row of the positions that turns it."""

    heads: int
    kv_heads: int
    head_width: int
    scale: float
    frequencies: Tensor
    axes: Sequence[int]
    turn_scale: float = 1.0
    """What cosines and sines are multiplied by."""
    latent: LatentSizes | None = None
    """Where attention is over latents."""


@dataclass(frozen=True)
class Parts:
    """What a decoder is made of, the head apart."""

    shape: Shape
    blocks: Sequence[Block]
    norm: nn.Module
    embed: nn.Module | None = None
    """The table that tokens are looked up in."""
