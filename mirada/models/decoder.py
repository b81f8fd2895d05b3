"""Qwen2 and Qwen3 decoders with three-dimensional rotary positions.

T tokens of all sequences end to end, D width, H query and K key/value heads of size d. Qwen2 adds biases to q, k and v; Qwen3
normalises the heads of q and k instead. Ported facts: transformers ``modeling_qwen2_vl.py``, Keye ``modeling_keye.py``
(KeyeDecoderLayer), Qwen3 (arXiv 2505.09388).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mirada.errors import ConfigError
from mirada.keys import Keys
from mirada.layers import fused
from mirada.layers.attention import attend_packed
from mirada.layers.batch import Batch
from mirada.layers.cache import KVCache
from mirada.layers.kinds import DEFAULT
from mirada.layers.linear import Linear
from mirada.layers.mlp import GatedMLP
from mirada.layers.norm import RMSNorm, add_norm, norm_heads
from mirada.layers.paged import PagedCache
from mirada.layers.rope import Rotation, inverse_frequencies, mrope_angles, rotate, rotation
from mirada.layers.step import Step
from mirada.layers.step_parts import Block, Heads, Parts, Shape, Unplannable
from mirada.models.layout import Rule
from mirada.parallel.plan import FIRST, WHOLE, Column, Plan, Row, Share, Units


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
    qkv_bias: bool = False
    """q, k and v have biases (Qwen2)."""
    qk_norm: bool = True
    """The heads of q and k are normalised before they turn (Qwen3)."""


@dataclass(frozen=True, eq=False)
class Context:
    """What every layer of one forward shares."""

    batch: Batch
    turn: Rotation
    cache: KVCache | None = None


class DecoderAttention(nn.Module):
    """Causal grouped-query attention; ``qkv`` holds the rows of q, then k, then v."""

    attention_kind: str = DEFAULT

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.scale, self.qk_norm = config.head_dim**-0.5, config.qk_norm
        rows = (self.heads + 2 * self.kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, rows, bias=config.qkv_bias)
        self.out = Linear(self.heads * config.head_dim, config.hidden_size)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        keys, qkv = self.heads + self.kv_heads, self.qkv(x)
        norms = (self.q_norm, self.k_norm) if self.qk_norm else ()
        shares = [(norm.weight, norm.eps, n) for norm, n in zip(norms, (self.heads, self.kv_heads), strict=False)]
        if isinstance(ctx.cache, PagedCache):
            q = ctx.cache.turn_and_keep(self.index, qkv, self.heads, ctx.turn, shares, ctx.batch)
            if q is not None:
                mixed = ctx.cache.attend_kept(self.index, q, ctx.batch, self.scale, self.attention_kind)
                return self.out(mixed.flatten(1))
        qk, v = qkv.view(len(x), keys + self.kv_heads, -1).split((keys, self.kv_heads), 1)
        turned = fused.turn_in_place(qkv, self.qkv, qk, ctx.turn, shares) if fused.plain(*norms) else None
        if turned is None:
            turned = rotate(norm_heads(qk, *norms, self.heads) if norms else qk, ctx.turn)
        q, k = turned.split((self.heads, self.kv_heads), 1)
        if ctx.cache is None:
            mixed = attend_packed(q, k, v, ctx.batch.lengths, causal=True, scale=self.scale, kind=self.attention_kind)
        else:
            mixed = ctx.cache.attend(self.index, q, k, v, ctx.batch, self.scale, self.attention_kind)
        return self.out(mixed.flatten(1))


class DecoderLayer(nn.Module):
    """Norm, attention, norm, gated MLP, each pair around a residual."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = DecoderAttention(config, index)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x, normed = add_norm(x, self.attention(self.norm1(x), ctx), self.norm2)
        return x + self.mlp(normed)


class Decoder(nn.Module):
    """Token ids (``embed``), causal layers, final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.steps = Step()

    def forward(self, x: Tensor, batch: Batch, cache: KVCache | None = None) -> Tensor:
        """[T, D] embeddings -> [T, D] after the final norm. Few tokens on a CPU: in one call, where ``layers.step`` can."""
        made = self.steps.run(self, self._parts, x, batch, cache)
        if made is not None and made[0] is not None:
            return made[0]
        c = self.config
        turn = rotation(mrope_angles(batch.positions, c.mrope_section, c.head_dim, c.rope_theta))
        ctx = Context(batch, turn, cache)
        for layer in self.layers:
            x = layer(x, ctx)
        return self.norm(x)

    def logits(self, x: Tensor | None, batch: Batch, cache: KVCache | None, head: nn.Module) -> Tensor | None:
        """[T, D] embeddings, or None for those of the batch's tokens -> float32 logits [T, V] of every token, in the same
        call; None where ``layers.step`` cannot."""
        made = self.steps.run(self, self._parts, x, batch, cache, head)
        return None if made is None else made[1]

    def _parts(self) -> Parts:
        c = self.config
        axes = [axis for axis, count in enumerate(c.mrope_section) for _ in range(count)]
        frequencies = inverse_frequencies(c.head_dim, c.rope_theta)
        shape = Shape(c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.head_dim**-0.5, frequencies, axes)
        return Parts(shape, [_block(layer) for layer in self.layers], self.norm, self.embed)


def _block(layer: nn.Module) -> Block:
    """The parts of a layer, for ``layers.step``; Unplannable if it, or one of them, is of another kind than here."""
    if type(layer) is not DecoderLayer or type(layer.attention) is not DecoderAttention or type(layer.mlp) is not GatedMLP:
        raise Unplannable
    a = layer.attention
    norms = (a.q_norm, a.k_norm) if a.qk_norm else None
    return Block(layer.norm1, Heads(a.qkv, norms, a.out), layer.norm2, layer.mlp)


def cache_spec(config: DecoderConfig) -> dict[str, int]:
    """What ``Family.cache_spec`` returns for this decoder."""
    return {
        "num_layers": config.num_hidden_layers,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
    }


# Facts about training, and sliding windows that are switched off.
_IGNORED = ("attention_dropout", "initializer_range", "max_window_layers", "sliding_window", "use_cache")


def text_config(keys: Keys, *, qkv_bias: bool, qk_norm: bool, tied: bool = False) -> DecoderConfig:
    """Reads the decoder's keys of a nested ``text_config`` or of a flat config.json; ``tied`` is the default.

    The caller takes its own (token ids, names, types, quantisation) and calls ``done``. Raises ConfigError for a key that
    is missing or a value that this decoder does not compute.
    """
    keys.ignore(*_IGNORED)
    keys.expect("hidden_act", "silu")
    keys.expect("use_sliding_window", False)
    layers = keys.take("num_hidden_layers", int)
    keys.expect("layer_types", ["full_attention"] * layers, None)
    heads, hidden = keys.take("num_attention_heads", int), keys.take("hidden_size", int)
    theta, sections = _rope(keys)
    made = DecoderConfig(
        vocab_size=keys.take("vocab_size", int),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys.take("num_key_value_heads", int),
        head_dim=keys.take("head_dim", int, hidden // heads),
        intermediate_size=keys.take("intermediate_size", int),
        rope_theta=theta,
        mrope_section=sections,  # pyright: ignore[reportArgumentType]
        rms_norm_eps=keys.take("rms_norm_eps", float, 1e-6),
        max_position_embeddings=keys.take("max_position_embeddings", int, 32768),
        tie_word_embeddings=keys.take("tie_word_embeddings", bool, tied),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )
    _check(made, keys.where)
    return made


def _rope(keys: Keys) -> tuple[float, tuple[int, ...]]:
    """theta and sections. transformers 5 writes rope_parameters (theta inside) for rope_theta and rope_scaling of 4.x;
    either may call itself "default", but where sections are given, they hold."""
    name = "rope_parameters" if "rope_parameters" in keys.mapping else "rope_scaling"
    rope = Keys(keys.take(name, dict), f"{keys.where}: {name}")
    rope.expect("type", "mrope", "default")
    rope.expect("rope_type", "mrope", "default")
    theta = rope.take("rope_theta", float, None) or keys.take("rope_theta", float)
    keys.ignore("rope_theta")
    sections = tuple(rope.take("mrope_section", list))
    rope.done()
    return theta, sections


def _check(config: DecoderConfig, where: str) -> None:
    c = config
    if len(c.mrope_section) != 3 or sum(c.mrope_section) * 2 != c.head_dim:
        raise ConfigError(
            f"{where}: mrope_section {list(c.mrope_section)} does not fit head_dim {c.head_dim}",
            "give three numbers that sum to half the head size",
        )
    if c.num_attention_heads % c.num_key_value_heads:
        raise ConfigError(
            f"{where}: num_attention_heads {c.num_attention_heads} is no multiple of num_key_value_heads"
            f" {c.num_key_value_heads}",
            "each key/value head serves a whole number of query heads",
        )


def rules(config: DecoderConfig, stored: str = "") -> Iterator[Rule]:
    """Released names (after the prefix ``stored``) <-> the modules under ``decoder``, and the head."""
    c = config
    d, inner = c.hidden_size, c.intermediate_size
    yield Rule("decoder.embed.weight", ((f"{stored}model.embed_tokens.weight", (c.vocab_size, d)),))
    for i in range(c.num_hidden_layers):
        ours, theirs = f"decoder.layers.{i}", f"{stored}model.layers.{i}"
        yield from _attention_rules(c, f"{ours}.attention", f"{theirs}.self_attn")
        yield Rule(f"{ours}.norm1.weight", ((f"{theirs}.input_layernorm.weight", (d,)),))
        yield Rule(f"{ours}.norm2.weight", ((f"{theirs}.post_attention_layernorm.weight", (d,)),))
        gate_up = tuple((f"{theirs}.mlp.{x}_proj.weight", (inner, d)) for x in ("gate", "up"))
        yield Rule(f"{ours}.mlp.gate_up.weight", gate_up)
        yield Rule(f"{ours}.mlp.down.weight", ((f"{theirs}.mlp.down_proj.weight", (d, inner)),))
    yield Rule("decoder.norm.weight", ((f"{stored}model.norm.weight", (d,)),))
    if not c.tie_word_embeddings:
        yield Rule("lm_head.weight", ((f"{stored}lm_head.weight", (c.vocab_size, d)),))


def _attention_rules(c: DecoderConfig, ours: str, theirs: str) -> Iterator[Rule]:
    d = c.hidden_size
    rows = {"q": c.num_attention_heads * c.head_dim, "k": c.num_key_value_heads * c.head_dim}
    rows["v"] = rows["k"]
    yield Rule(f"{ours}.qkv.weight", tuple((f"{theirs}.{x}_proj.weight", (n, d)) for x, n in rows.items()))
    if c.qkv_bias:
        yield Rule(f"{ours}.qkv.bias", tuple((f"{theirs}.{x}_proj.bias", (n,)) for x, n in rows.items()))
    yield Rule(f"{ours}.out.weight", ((f"{theirs}.o_proj.weight", (d, rows["q"])),))
    for name in ("q_norm", "k_norm") if c.qk_norm else ():
        yield Rule(f"{ours}.{name}.weight", ((f"{theirs}.{name}.weight", (c.head_dim,)),))


def plan(config: DecoderConfig) -> Plan:
    """How ranks divide a model of this decoder: by heads and inner channels, and the head by words.

    Tower, projector and embedding stay whole on the first rank: what they make is sent once, where a divided tower would take
    two sums a layer over four times as many rows.
    """
    c = config
    heads, inner = Units(c.num_attention_heads, "heads"), Units(c.intermediate_size, "inner channels")
    keys = Units(c.num_key_value_heads, "key/value heads", copied=True)
    layer = "decoder.layers.*."
    return Plan(
        {
            f"{layer}attention.qkv.*": Column((heads, keys, keys)),
            f"{layer}attention.out.weight": Row(heads),
            f"{layer}mlp.gate_up.weight": Column((inner, inner)),
            f"{layer}mlp.down.weight": Row(inner),
            **shared_splits(c.vocab_size),
        },
        sums=SUMS,
        apply=_take_share,
    )


SUMS = ("decoder.layers.*.attention", "decoder.layers.*.mlp")
"""Modules of any decoder here whose outputs are partial sums on each rank."""


def shared_splits(vocab_size: int) -> dict[str, Any]:
    """What decoders divide alike."""
    words = Units(vocab_size, "words", ragged=True)
    return {
        "lm_head.weight": Column((words,)),
        "decoder.embed.weight": FIRST,
        "decoder.*": WHOLE,
        "visual.*": FIRST,
        "projector.*": FIRST,
    }


def _take_share(decoder: Any, share: Share) -> None:
    keys = Units(decoder.config.num_key_value_heads, "key/value heads", copied=True)
    begin, end = keys.of(share)
    for layer in decoder.layers:
        layer.attention.heads, layer.attention.kv_heads = decoder.config.num_attention_heads // share.ranks, end - begin


def ignored(config: DecoderConfig, stored: str = "") -> tuple[str, ...]:
    """Names that may lie in a checkpoint unused: frequencies, which are computed, and the head where it is the embedding."""
    tied = (f"{stored}lm_head.weight",) if config.tie_word_embeddings else ()
    return ("*.inv_freq", *tied)
