"""Qwen3 decoder with three-dimensional rotary positions.

T tokens of all sequences end to end, D width, H query and K key/value heads of size d.
Ported facts: Keye ``modeling_keye.py`` (KeyeDecoderLayer), Qwen3 (arXiv 2505.09388).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mirada.layers.attention import attend_packed
from mirada.layers.batch import Batch
from mirada.layers.cache import KVCache
from mirada.layers.mlp import GatedMLP
from mirada.layers.norm import RMSNorm, norm_heads
from mirada.layers.rope import Rotation, mrope_angles, rotate, rotation


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the language model; names as in the released config."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False


@dataclass(frozen=True, eq=False)
class Context:
    """What every layer of one forward shares."""

    batch: Batch
    turn: Rotation
    cache: KVCache | None = None


class DecoderAttention(nn.Module):
    """Causal grouped-query attention; ``qkv`` holds the rows of q, then k, then v. Heads are normalised before they turn."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.scale = config.head_dim**-0.5
        rows = (self.heads + 2 * self.kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, rows, bias=False)
        self.out = nn.Linear(self.heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        keys = self.heads + self.kv_heads
        qk, v = self.qkv(x).view(len(x), keys + self.kv_heads, -1).split((keys, self.kv_heads), 1)
        q, k = rotate(norm_heads(qk, self.q_norm, self.k_norm, self.heads), ctx.turn).split((self.heads, self.kv_heads), 1)
        if ctx.cache is None:
            mixed = attend_packed(q, k, v, ctx.batch.lengths, causal=True, scale=self.scale)
        else:
            mixed = ctx.cache.attend(self.index, q, k, v, ctx.batch, self.scale)
        return self.out(mixed.flatten(1))


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = DecoderAttention(config, index)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = x + self.attention(self.norm1(x), ctx)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Token ids, features in their places, causal layers, final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, batch: Batch, cache: KVCache | None = None) -> Tensor:
        """[T, D] embeddings -> [T, D] after the final norm."""
        c = self.config
        turn = rotation(mrope_angles(batch.positions, c.mrope_section, c.head_dim, c.rope_theta))
        ctx = Context(batch, turn, cache)
        for layer in self.layers:
            x = layer(x, ctx)
        return self.norm(x)
