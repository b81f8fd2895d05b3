"""DeepSeek-V3 decoder: latent attention and experts. The language model of Kimi-VL and of Keye-VL-671B.

T tokens of all sequences end to end, D width, E experts. Ported facts: deepseek-ai/DeepSeek-V3 ``modeling_deepseek.py``,
``configuration_deepseek.py``; Moonlight (arXiv 2502.16982) has the same blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mirada.errors import ConfigError
from mirada.layers.batch import Batch
from mirada.layers.latent_cache import LatentCache
from mirada.layers.mla import MLA, LatentSizes
from mirada.layers.mlp import GatedMLP
from mirada.layers.moe import MoE, Routing
from mirada.layers.norm import RMSNorm, add_norm
from mirada.layers.rope import Rotation, Yarn, inverse_frequencies, rotation, section_angles
from mirada.layers.step import Step
from mirada.layers.step_parts import Block, Parts, Shape, Unplannable
from mirada.models.decoder import SUMS, shared_splits
from mirada.models.family import Keys
from mirada.models.layout import Rule
from mirada.parallel.plan import Column, Experts, Plan, Row, Share, Units


@dataclass(frozen=True)
class DeepseekConfig:
    """Sizes of the language model; names as in the released config."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    rope_theta: float = 10000.0
    yarn: Yarn | None = None
    mrope_section: tuple[int, int, int] | None = None
    """Frequencies that turn by time, row and column; None: all turn by the first row of the positions."""
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    num_nextn_predict_layers: int = 0
    """Layers after the last that predict further tokens; they lie in a checkpoint and are not used."""
    tie_word_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        """Channels of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        """Whether layer ``layer`` has experts; the others are dense."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def sizes(self) -> LatentSizes:
        return LatentSizes(
            self.hidden_size, self.num_attention_heads, self.q_lora_rank, self.kv_lora_rank,
            self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim,
        )  # fmt: skip

    @property
    def routing(self) -> Routing:
        return Routing(
            self.n_routed_experts, self.num_experts_per_tok, self.n_group, self.topk_group,
            self.norm_topk_prob, self.routed_scaling_factor,
        )  # fmt: skip

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 * (self.yarn.softmax_scale if self.yarn else 1.0)


class DeepseekLayer(nn.Module):
    def __init__(self, config: DeepseekConfig, index: int) -> None:
        super().__init__()
        c = config
        self.norm1 = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.attention = MLA(c.sizes, c.softmax_scale, index)
        self.norm2 = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = (
            MoE(c.hidden_size, c.moe_intermediate_size, c.n_shared_experts, c.routing)
            if c.is_moe(index)
            else GatedMLP(c.hidden_size, c.intermediate_size)
        )

    def forward(self, x: Tensor, turn: Rotation, batch: Batch, cache: LatentCache | None) -> Tensor:
        x, normed = add_norm(x, self.attention(self.norm1(x), turn, batch, cache), self.norm2)
        return x + self.mlp(normed)


class DeepseekDecoder(nn.Module):
    """Token ids (``embed``), causal layers, final norm; takes the place of ``models.decoder.Decoder``."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DeepseekLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.steps = Step()

    def forward(self, x: Tensor, batch: Batch, cache: LatentCache | None = None) -> Tensor:
        """[T, D] embeddings -> [T, D] after the final norm. Few tokens on a CPU: in one call, where ``layers.step`` can."""
        made = self.steps.run(self, self._parts, x, batch, cache)
        if made is not None and made[0] is not None:
            return made[0]
        turn = self.turn(batch.positions)
        for layer in self.layers:
            x = layer(x, turn, batch, cache)
        return self.norm(x)

    def logits(self, x: Tensor | None, batch: Batch, cache: LatentCache | None, head: nn.Module) -> Tensor | None:
        """As ``models.decoder.Decoder.logits``."""
        made = self.steps.run(self, self._parts, x, batch, cache, head)
        return None if made is None else made[1]

    def turn(self, positions: Tensor) -> Rotation:
        """Of positions [3, T]."""
        c, frequencies = self.config, self._frequencies(positions.device)
        if c.mrope_section is None:
            angles = positions[0, :, None].float() * frequencies
        else:
            angles = section_angles(positions, c.mrope_section, frequencies)
        cos, sin = rotation(angles)
        scale = c.yarn.turn_scale if c.yarn else 1.0
        return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)

    def _frequencies(self, device: torch.device) -> Tensor:
        c = self.config
        if c.yarn is None:
            return inverse_frequencies(c.qk_rope_head_dim, c.rope_theta, device)
        return c.yarn.frequencies(c.qk_rope_head_dim, c.rope_theta, device)

    def _parts(self) -> Parts:
        c = self.config
        sections = c.mrope_section or (c.qk_rope_head_dim // 2, 0, 0)
        axes = [axis for axis, count in enumerate(sections) for _ in range(count)]
        shape = Shape(
            c.num_attention_heads, 1, c.qk_rope_head_dim, c.softmax_scale, self._frequencies(torch.device("cpu")), axes,
            c.yarn.turn_scale if c.yarn else 1.0, c.sizes,
        )  # fmt: skip
        return Parts(shape, [_block(layer) for layer in self.layers], self.norm, self.embed)


def _block(layer: nn.Module) -> Block:
    """The parts of a layer, for ``layers.step``; Unplannable if it, or one of them, is of another kind than here."""
    if type(layer) is not DeepseekLayer or type(layer.attention) is not MLA or type(layer.mlp) not in (MoE, GatedMLP):
        raise Unplannable
    return Block(layer.norm1, layer.attention, layer.norm2, layer.mlp)


def cache_spec(config: DeepseekConfig) -> dict[str, int | str]:
    """What ``Family.cache_spec`` returns for this decoder."""
    return {
        "kind": "latent",
        "num_layers": config.num_hidden_layers,
        "latent_dim": config.kv_lora_rank,
        "rope_dim": config.qk_rope_head_dim,
    }


# Facts about training, about other software, or sizes that follow from others.
_IGNORED = (
    "attention_dropout", "aux_loss_alpha", "seq_aux", "ep_size", "initializer_range", "pretraining_tp", "use_cache",
    "output_router_logits", "head_dim", "qk_head_dim", "num_mtp_layers",
)  # fmt: skip


def text_config(keys: Keys) -> DeepseekConfig:
    """Reads the decoder's keys of a nested ``text_config`` or of a flat config.json.

    The caller takes its own (token ids, names, types, quantisation) and calls ``done``. Raises ConfigError for a key that
    is missing or a value that this decoder does not compute.
    """
    keys.ignore(*_IGNORED)
    for name, value in (("hidden_act", "silu"), ("attention_bias", False), ("rope_interleave", True)):
        keys.expect(name, value)
    keys.expect("scoring_func", "sigmoid")
    keys.expect("topk_method", "noaux_tc")
    heads = keys.take("num_attention_heads", int)
    keys.expect("num_key_value_heads", heads, None)
    theta, yarn, sections = _rope(keys)
    made = DeepseekConfig(
        vocab_size=keys.take("vocab_size", int),
        hidden_size=keys.take("hidden_size", int),
        num_hidden_layers=keys.take("num_hidden_layers", int),
        num_attention_heads=heads,
        intermediate_size=keys.take("intermediate_size", int),
        kv_lora_rank=keys.take("kv_lora_rank", int),
        q_lora_rank=keys.take("q_lora_rank", (int, type(None))),
        qk_nope_head_dim=keys.take("qk_nope_head_dim", int),
        qk_rope_head_dim=keys.take("qk_rope_head_dim", int),
        v_head_dim=keys.take("v_head_dim", int),
        moe_intermediate_size=keys.take("moe_intermediate_size", int),
        n_routed_experts=keys.take("n_routed_experts", int),
        n_shared_experts=keys.take("n_shared_experts", (int, type(None)), None) or 0,
        num_experts_per_tok=keys.take("num_experts_per_tok", int),
        n_group=keys.take("n_group", int),
        topk_group=keys.take("topk_group", int),
        norm_topk_prob=keys.take("norm_topk_prob", bool),
        routed_scaling_factor=keys.take("routed_scaling_factor", float),
        first_k_dense_replace=keys.take("first_k_dense_replace", int, 0),
        moe_layer_freq=keys.take("moe_layer_freq", int, 1),
        rope_theta=theta,
        yarn=yarn,
        mrope_section=sections,
        rms_norm_eps=keys.take("rms_norm_eps", float, 1e-6),
        max_position_embeddings=keys.take("max_position_embeddings", int),
        num_nextn_predict_layers=keys.take("num_nextn_predict_layers", int, 0),
        tie_word_embeddings=keys.take("tie_word_embeddings", bool, False),
    )
    _check(made, keys.where)
    return made


def _rope(keys: Keys) -> tuple[float, Yarn | None, tuple[int, int, int] | None]:
    """theta, YaRN and sections. transformers 5 writes rope_parameters (theta inside), 4.x rope_theta and rope_scaling."""
    name = "rope_parameters" if "rope_parameters" in keys.mapping else "rope_scaling"
    found = keys.take(name, (dict, type(None)), None)
    rope = Keys(found or {}, f"{keys.where}: {name}")
    theta = rope.take("rope_theta", float, None)
    theta = keys.take("rope_theta", float, 10000.0) if theta is None else theta
    keys.ignore("rope_theta")
    given = rope.take("mrope_section", (list, type(None)), None)
    kinds = {rope.mapping[key] for key in ("type", "rope_type") if key in rope.mapping}
    for key in ("type", "rope_type"):
        rope.expect(key, "yarn", "default", "mrope")
    yarn = _yarn(rope) if "yarn" in kinds else None
    rope.done()
    return theta, yarn, tuple(given) if given else None  # pyright: ignore[reportReturnType]


def _yarn(rope: Keys) -> Yarn:
    rope.expect("truncate", True)
    rope.expect("attention_factor", None)
    return Yarn(
        factor=rope.take("factor", float),
        original_max_position_embeddings=rope.take("original_max_position_embeddings", int),
        beta_fast=rope.take("beta_fast", float, 32.0),
        beta_slow=rope.take("beta_slow", float, 1.0),
        mscale=rope.take("mscale", float, 1.0),
        mscale_all_dim=rope.take("mscale_all_dim", float, 0.0),
    )


def _check(config: DeepseekConfig, where: str) -> None:
    c = config
    if c.n_routed_experts % c.n_group or not 1 <= c.topk_group <= c.n_group:
        raise ConfigError(
            f"{where}: n_group {c.n_group} and topk_group {c.topk_group} for n_routed_experts {c.n_routed_experts}",
            "groups must be of one size, and at least one and at most all of them kept",
        )
    size = c.n_routed_experts // c.n_group
    if not 1 <= c.num_experts_per_tok <= c.topk_group * size or (c.topk_group < c.n_group and size < 2):
        raise ConfigError(
            f"{where}: num_experts_per_tok {c.num_experts_per_tok} of {c.topk_group} groups of {size}",
            "the groups that are kept must hold that many experts, and each at least two to be ranked by",
        )
    if c.qk_rope_head_dim % 2 or c.v_head_dim > c.head_dim:
        raise ConfigError(
            f"{where}: qk_rope_head_dim {c.qk_rope_head_dim}, v_head_dim {c.v_head_dim} with keys of {c.head_dim}",
            "the rotary part must be even, and values no wider than keys",
        )
    if c.mrope_section is not None and (len(c.mrope_section) != 3 or sum(c.mrope_section) * 2 != c.qk_rope_head_dim):
        raise ConfigError(
            f"{where}: mrope_section {list(c.mrope_section)} does not fit qk_rope_head_dim {c.qk_rope_head_dim}",
            "give three numbers that sum to half of it",
        )


def rules(config: DeepseekConfig, stored: str = "", ours: str = "decoder") -> Iterator[Rule]:
    """Released names (after the prefix ``stored``, say ``language_model.``) <-> the modules under ``ours``, and the head."""
    c = config
    yield Rule(f"{ours}.embed.weight", ((f"{stored}model.embed_tokens.weight", (c.vocab_size, c.hidden_size)),))
    for i in range(c.num_hidden_layers):
        layer, theirs = f"{ours}.layers.{i}", f"{stored}model.layers.{i}"
        yield from _attention_rules(c, f"{layer}.attention", f"{theirs}.self_attn")
        yield Rule(f"{layer}.norm1.weight", ((f"{theirs}.input_layernorm.weight", (c.hidden_size,)),))
        yield Rule(f"{layer}.norm2.weight", ((f"{theirs}.post_attention_layernorm.weight", (c.hidden_size,)),))
        if c.is_moe(i):
            yield from _moe_rules(c, f"{layer}.mlp", f"{theirs}.mlp")
        else:
            yield from _gated_rules(f"{layer}.mlp", f"{theirs}.mlp", c.hidden_size, c.intermediate_size)
    yield Rule(f"{ours}.norm.weight", ((f"{stored}model.norm.weight", (c.hidden_size,)),))
    if not c.tie_word_embeddings:
        yield Rule("lm_head.weight", ((f"{stored}lm_head.weight", (c.vocab_size, c.hidden_size)),))


def _attention_rules(c: DeepseekConfig, ours: str, theirs: str) -> Iterator[Rule]:
    d, heads = c.hidden_size, c.num_attention_heads
    shapes: list[tuple[str, str, tuple[int, ...]]] = [
        ("kv_a", "kv_a_proj_with_mqa", (c.kv_lora_rank + c.qk_rope_head_dim, d)),
        ("kv_norm", "kv_a_layernorm", (c.kv_lora_rank,)),
        ("kv_b", "kv_b_proj", (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)),
        ("out", "o_proj", (d, heads * c.v_head_dim)),
    ]
    if c.q_lora_rank is None:
        shapes.append(("q", "q_proj", (heads * c.head_dim, d)))
    else:
        shapes.append(("q_a", "q_a_proj", (c.q_lora_rank, d)))
        shapes.append(("q_norm", "q_a_layernorm", (c.q_lora_rank,)))
        shapes.append(("q_b", "q_b_proj", (heads * c.head_dim, c.q_lora_rank)))
    for name, released, shape in shapes:
        yield Rule(f"{ours}.{name}.weight", ((f"{theirs}.{released}.weight", shape),))


def _moe_rules(c: DeepseekConfig, ours: str, theirs: str) -> Iterator[Rule]:
    d, inner, experts = c.hidden_size, c.moe_intermediate_size, range(c.n_routed_experts)
    yield Rule(f"{ours}.router.weight", ((f"{theirs}.gate.weight", (len(experts), d)),))
    yield Rule(f"{ours}.router.bias", ((f"{theirs}.gate.e_score_correction_bias", (len(experts),)),))
    gate_up = tuple((f"{theirs}.experts.{e}.{x}_proj.weight", (inner, d)) for e in experts for x in ("gate", "up"))
    yield Rule(f"{ours}.experts.gate_up", gate_up, "stack")
    down = tuple((f"{theirs}.experts.{e}.down_proj.weight", (d, inner)) for e in experts)
    yield Rule(f"{ours}.experts.down", down, "stack")
    if c.n_shared_experts:
        yield from _gated_rules(f"{ours}.shared", f"{theirs}.shared_experts", d, c.n_shared_experts * inner)


def _gated_rules(ours: str, theirs: str, d: int, inner: int) -> Iterator[Rule]:
    gate_up = tuple((f"{theirs}.{x}_proj.weight", (inner, d)) for x in ("gate", "up"))
    yield Rule(f"{ours}.gate_up.weight", gate_up)
    yield Rule(f"{ours}.down.weight", ((f"{theirs}.down_proj.weight", (d, inner)),))


def plan(config: DeepseekConfig) -> Plan:
    """How ranks divide a model of this decoder: attention by heads, over latents that every rank has; routed experts whole,
    shared ones and dense blocks by inner channels. The rest as in ``decoder.plan``."""
    c = config
    heads, inner = Units(c.num_attention_heads, "heads"), Units(c.intermediate_size, "inner channels")
    shared = Units(c.n_shared_experts * c.moe_intermediate_size, "inner channels of the shared experts")
    experts, layer = Experts(_experts(c)), "decoder.layers.*."
    return Plan(
        {
            f"{layer}attention.q.weight": Column((heads,)),
            f"{layer}attention.q_b.weight": Column((heads,)),
            f"{layer}attention.kv_b.weight": Column((heads,)),
            f"{layer}attention.out.weight": Row(heads),
            f"{layer}mlp.gate_up.weight": Column((inner, inner)),
            f"{layer}mlp.down.weight": Row(inner),
            f"{layer}mlp.shared.gate_up.weight": Column((shared, shared)),
            f"{layer}mlp.shared.down.weight": Row(shared),
            f"{layer}mlp.experts.*": experts,
            **shared_splits(c.vocab_size),
        },
        sums=SUMS,
        apply=_take_share,
    )


def _experts(config: DeepseekConfig) -> Units:
    return Units(config.n_routed_experts, "experts")


def _take_share(decoder: Any, share: Share) -> None:
    for layer in decoder.layers:
        attention, mlp = layer.attention, layer.mlp
        attention.sizes = replace(attention.sizes, heads=attention.sizes.heads // share.ranks)
        if isinstance(mlp, MoE):
            mlp.experts.first = _experts(decoder.config).of(share)[0]


def ignored(config: DeepseekConfig, stored: str = "") -> tuple[str, ...]:
    """Names that may lie in a checkpoint unused: stored frequencies (they may be stale) and layers for further tokens."""
    last = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    tied = (f"{stored}lm_head.weight",) if config.tie_word_embeddings else ()
    return (f"{stored}model.layers.*.rotary_emb.inv_freq", *(f"{stored}model.layers.{i}.*" for i in last), *tied)
