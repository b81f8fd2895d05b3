"""Keye-VL-8B-Preview and Keye-VL-1.5-8B: config, model, and what the family offers.

N patches, F features (N / 4), T tokens, D width of the decoder, V vocabulary. Both releases share everything but three
facts, said in ``KeyeConfig``: where the projector normalises, which patches see each other, and how a video is spelt.
Ported facts: Keye repository, ``keye-vl-8b-preview/modeling_keye.py``; vLLM ``keye_vl1_5.py`` for 1.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirada.errors import ConfigError, MessageError
from mirada.layers.batch import Batch, MediaBatch
from mirada.layers.cache import KVCache
from mirada.layers.mlp import MLP
from mirada.layers.norm import LayerNorm
from mirada.media.grid import GridRule
from mirada.media.rule import KEYE_15 as KEYE_15_MEDIA
from mirada.media.rule import KEYE_PREVIEW as KEYE_PREVIEW_MEDIA
from mirada.media.rule import MediaRule, Resample
from mirada.models.decoder import Decoder, DecoderConfig
from mirada.models.family import Keys
from mirada.models.layout import Layout, Rule
from mirada.models.vit import KeyeVisionTower, VisionConfig
from mirada.prompt.format import KEYE_1_5 as KEYE_15_FORMAT
from mirada.prompt.format import KEYE_PREVIEW as KEYE_PREVIEW_FORMAT
from mirada.prompt.format import PromptFormat
from mirada.types import Grid

PROJECTOR_EPS = 1e-5


@dataclass(frozen=True)
class KeyeConfig:
    """config.json of a Keye-VL, typed. ``from_hf`` accounts for every key."""

    model_type: str
    vision: VisionConfig
    text: DecoderConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    quantisation: str | None = None
    """``mirada_int8_rows``: matrices are stored as int8 rows and scales; they are widened on load."""

    @property
    def is_15(self) -> bool:
        return self.model_type == "KeyeVL1_5"

    @property
    def merge_then_norm(self) -> bool:
        """Whether the projector normalises the four merged patches together (1.5) or each patch alone (Preview)."""
        return self.is_15

    @property
    def frames_apart(self) -> bool:
        """Whether each frame of a video sees only itself (1.5) or the whole video sees itself (Preview)."""
        return self.is_15

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any], where: str = "config.json") -> KeyeConfig:
        """From the released flat layout; ConfigError names a key or value that is not understood."""
        keys = Keys(mapping, where)
        keys.ignore(*_TOP_IGNORED)
        keys.expect("hidden_act", "silu")
        keys.expect("attention_bias", False)
        keys.expect("use_sliding_window", False)
        vision_mapping = keys.take("vision_config", dict)
        vision = _vision(Keys(vision_mapping, f"{where}: vision_config"))
        eos = keys.take("eos_token_id", (int, list), ())
        made = cls(
            model_type=keys.take("model_type", str),
            vision=vision,
            text=_text(keys),
            image_token_id=keys.take("image_token_id", int),
            video_token_id=keys.take("video_token_id", int),
            vision_start_token_id=keys.take("vision_start_token_id", int),
            vision_end_token_id=keys.take("vision_end_token_id", int),
            eos_token_ids=(eos,) if isinstance(eos, int) else tuple(eos),
            pad_token_id=keys.take("pad_token_id", (int, type(None)), None),
            quantisation=_quantisation(keys),
        )
        keys.done()
        return made


# Facts about training, about other software, or ids that the tokenizer says by name.
_TOP_IGNORED = (
    "architectures", "auto_map", "attention_dropout", "bos_token_id", "initializer_range", "max_window_layers",
    "sliding_window", "torch_dtype", "dtype", "transformers_version", "use_cache", "vision_token_id", "frame_token_id",
    "fast_start_token_id", "fast_end_token_id", "fast_video_token_id", "_name_or_path", "_attn_implementation_autoset",
    "mirada",
)  # fmt: skip
# temporal_patch_size stands as 2 in the release and is never used: frames are patched one by one.
_VISION_IGNORED = (
    "model_type", "attention_dropout", "temporal_patch_size", "initializer_range", "torch_dtype", "dtype",
    "transformers_version", "_name_or_path", "_attn_implementation_autoset", "architectures", "auto_map",
)  # fmt: skip


def _vision(keys: Keys) -> VisionConfig:
    keys.ignore(*_VISION_IGNORED)
    keys.expect("hidden_act", "gelu_pytorch_tanh")
    keys.expect("spatial_merge_size", 2)
    keys.expect("has_learnable_position_embedding", True)
    keys.expect("use_qk_norm", False)
    made = VisionConfig(
        hidden_size=keys.take("hidden_size", int),
        num_hidden_layers=keys.take("num_hidden_layers", int),
        num_attention_heads=keys.take("num_attention_heads", int),
        intermediate_size=keys.take("intermediate_size", int),
        image_size=keys.take("image_size", int),
        patch_size=keys.take("patch_size", int, 14),
        num_channels=keys.take("num_channels", int, 3),
        layer_norm_eps=keys.take("layer_norm_eps", float, 1e-6),
        rope_theta=keys.take("rope_theta", float, 10000.0),
        tokens_per_second=keys.take("tokens_per_second", float, 2.0),
    )
    keys.done()
    if made.hidden_size % made.num_attention_heads or made.head_dim % 4:
        raise ConfigError(
            f"{keys.where}: hidden_size {made.hidden_size} over {made.num_attention_heads} heads",
            "the head size must be a whole multiple of 4, half of it for rows and half for columns",
        )
    return made


def _text(keys: Keys) -> DecoderConfig:
    heads, hidden = keys.take("num_attention_heads", int), keys.take("hidden_size", int)
    # transformers 5 writes rope_parameters (theta inside) for what 4.x writes as rope_theta and rope_scaling.
    name = "rope_parameters" if "rope_parameters" in keys.mapping else "rope_scaling"
    rope = Keys(keys.take(name, dict), f"{keys.where}: {name}")
    rope.expect("type", "mrope", "default")
    rope.expect("rope_type", "mrope", "default")
    theta = rope.take("rope_theta", float, None) or keys.take("rope_theta", float)
    keys.ignore("rope_theta")
    sections = tuple(rope.take("mrope_section", list))
    rope.done()
    made = DecoderConfig(
        vocab_size=keys.take("vocab_size", int),
        hidden_size=hidden,
        num_hidden_layers=keys.take("num_hidden_layers", int),
        num_attention_heads=heads,
        num_key_value_heads=keys.take("num_key_value_heads", int),
        head_dim=keys.take("head_dim", int, hidden // heads),
        intermediate_size=keys.take("intermediate_size", int),
        rope_theta=theta,
        mrope_section=sections,  # pyright: ignore[reportArgumentType]
        rms_norm_eps=keys.take("rms_norm_eps", float, 1e-6),
        max_position_embeddings=keys.take("max_position_embeddings", int, 32768),
        tie_word_embeddings=keys.take("tie_word_embeddings", bool, False),
    )
    if len(sections) != 3 or sum(sections) * 2 != made.head_dim:
        raise ConfigError(
            f"{rope.where}: mrope_section {list(sections)} does not fit head_dim {made.head_dim}",
            "give three numbers that sum to half the head size",
        )
    if heads % made.num_key_value_heads:
        raise ConfigError(
            f"{keys.where}: num_attention_heads {heads} is no multiple of num_key_value_heads {made.num_key_value_heads}",
            "each key/value head serves a whole number of query heads",
        )
    return made


def _quantisation(keys: Keys) -> str | None:
    found = keys.take("quantization_config", (dict, type(None)), None)
    if found is None:
        return None
    inner = Keys(found, f"{keys.where}: quantization_config")
    inner.expect("quant_method", "mirada_int8_rows")
    method = inner.take("quant_method", str)
    inner.done()
    return method


class Projector(nn.Module):
    """[N, vision width] patches -> [N/4, D]: each 2x2 square becomes one token."""

    def __init__(self, vision: VisionConfig, dim: int, merge_then_norm: bool) -> None:
        super().__init__()
        self.merge, self.merge_then_norm = vision.spatial_merge_size, merge_then_norm
        wide = vision.hidden_size * self.merge**2
        self.norm = LayerNorm(wide if merge_then_norm else vision.hidden_size, PROJECTOR_EPS)
        self.mlp = MLP(wide, wide, dim, gelu="none")

    def forward(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        if self.merge_then_norm:
            return self.mlp(self.norm(merge_patches(x, grids, self.merge)))
        return self.mlp(merge_patches(self.norm(x), grids, self.merge))


def merge_patches(x: Tensor, grids: Sequence[Grid], merge: int) -> Tensor:
    """[N, D] row-major patches -> [N/merge², merge²·D]: each square's patches side by side, row by row."""
    pieces = x.split([t * h * w for t, h, w in grids])
    return torch.cat(
        [
            piece.view(t * (h // merge), merge, w // merge, merge, -1).transpose(1, 2).reshape(t * h * w // merge**2, -1)
            for piece, (t, h, w) in zip(pieces, grids, strict=True)
        ]
    )


class KeyeVL(nn.Module):
    """The whole model: ``encode`` media, ``forward`` packed tokens, ``logits`` of the rows that are wanted."""

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.config = config
        self.config_text: str | None = None
        """config.json as it was read; what a save writes."""
        self.visual = KeyeVisionTower(config.vision)
        self.projector = Projector(config.vision, config.text.hidden_size, config.merge_then_norm)
        self.decoder = Decoder(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes head and embedding one parameter, where the config says so."""
        if self.config.text.tie_word_embeddings:
            self.lm_head.weight = self.decoder.embed.weight

    def segments(self, grids: Sequence[Grid]) -> tuple[int, ...]:
        """Lengths of the runs of patches that see each other."""
        if self.config.frames_apart:
            return tuple(h * w for t, h, w in grids for _ in range(t))
        return tuple(t * h * w for t, h, w in grids)

    def encode(self, media: MediaBatch) -> Tensor:
        """Normalised patches -> [F, D] features in the order of the placeholders."""
        features = self.visual(media.pixels, media.grids, self.segments(media.grids))
        return self.projector(features, media.grids)

    def embed(self, batch: Batch, features: Tensor | None = None) -> Tensor:
        """[T, D]: token embeddings, with features written over their placeholders."""
        x = self.decoder.embed(batch.tokens)
        rows = 0 if batch.feature_rows is None else len(batch.feature_rows)
        given = 0 if features is None else len(features)
        if rows != given:
            raise MessageError(
                f"{given} visual features for {rows} placeholder tokens",
                "encode exactly the media of this batch, in the order of their spans",
            )
        if features is None or batch.feature_rows is None or not rows:
            return x
        return x.index_copy(0, batch.feature_rows, features.to(x.dtype))

    def forward(self, batch: Batch, features: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Hidden values [T, D] after the final norm. With a cache, only the new tokens are in ``batch``."""
        return self.decoder(self.embed(batch, features), batch, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., D] -> float32 [.., V]."""
        return F.linear(hidden, self.lm_head.weight).float()

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Fresh weights for training: tables normal with deviation 0.02, matrices 1/sqrt(inputs), residual outputs less
        by depth; norms one, biases zero. Small widths learn markedly faster from these than from 0.02 throughout."""
        random = torch.Generator(self.lm_head.weight.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            std = 0.02 if "embed" in name or "positions" in name or "lm_head" in name else parameter.shape[1] ** -0.5
            if name.endswith(("attention.out.weight", "mlp.fc2.weight", "mlp.down.weight")) and "projector" not in name:
                std *= (2 * len(self.visual.layers if name.startswith("visual") else self.decoder.layers)) ** -0.5
            parameter.normal_(std=std, generator=random)


def layout(config: KeyeConfig) -> Layout:
    """Released names <-> modules, with every shape."""
    return Layout((*_vision_rules(config), *_projector_rules(config), *_text_rules(config)), _ignored(config))


def _ignored(config: KeyeConfig) -> tuple[str, ...]:
    # The pooling head and the table for packing take no part in the model; rotary frequencies are computed.
    tied = ("lm_head.weight",) if config.text.tie_word_embeddings else ()
    return ("visual.vision_model.head.*", "*.packing_position_embedding.*", "*.inv_freq", *tied)


def _affine(parameter: str, stored: str, rows: int, *columns: int) -> Iterator[Rule]:
    yield Rule(f"{parameter}.weight", ((f"{stored}.weight", (rows, *columns)),))
    yield Rule(f"{parameter}.bias", ((f"{stored}.bias", (rows,)),))


def _vision_rules(config: KeyeConfig) -> Iterator[Rule]:
    v = config.vision
    d, inner = v.hidden_size, v.intermediate_size
    embeddings = "visual.vision_model.embeddings"
    yield from _affine("visual.patches.proj", f"{embeddings}.patch_embedding", d, v.num_channels, v.patch_size, v.patch_size)
    yield Rule("visual.positions.weight", ((f"{embeddings}.position_embedding.weight", (v.table_side**2, d)),))
    for i in range(v.num_hidden_layers):
        ours, theirs = f"visual.layers.{i}", f"visual.vision_model.encoder.layers.{i}"
        for name, columns in (("weight", (d,)), ("bias", ())):
            parts = tuple((f"{theirs}.self_attn.{x}_proj.{name}", (d, *columns)) for x in "qkv")
            yield Rule(f"{ours}.attention.qkv.{name}", parts)
        yield from _affine(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj", d, d)
        yield from _affine(f"{ours}.norm1", f"{theirs}.layer_norm1", d)
        yield from _affine(f"{ours}.norm2", f"{theirs}.layer_norm2", d)
        yield from _affine(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1", inner, d)
        yield from _affine(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2", d, inner)
    yield from _affine("visual.norm", "visual.vision_model.post_layernorm", d)


def _projector_rules(config: KeyeConfig) -> Iterator[Rule]:
    d = config.vision.hidden_size
    wide = d * config.vision.spatial_merge_size**2
    yield from _affine("projector.norm", "mlp_AR.pre_norm", wide if config.merge_then_norm else d)
    yield from _affine("projector.mlp.fc1", "mlp_AR.linear_1", wide, wide)
    yield from _affine("projector.mlp.fc2", "mlp_AR.linear_2", config.text.hidden_size, wide)


def _text_rules(config: KeyeConfig) -> Iterator[Rule]:
    t = config.text
    d, inner = t.hidden_size, t.intermediate_size
    q, kv = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    yield Rule("decoder.embed.weight", (("model.embed_tokens.weight", (t.vocab_size, d)),))
    for i in range(t.num_hidden_layers):
        ours, theirs = f"decoder.layers.{i}", f"model.layers.{i}"
        parts = tuple((f"{theirs}.self_attn.{x}_proj.weight", (rows, d)) for x, rows in (("q", q), ("k", kv), ("v", kv)))
        yield Rule(f"{ours}.attention.qkv.weight", parts)
        yield Rule(f"{ours}.attention.out.weight", ((f"{theirs}.self_attn.o_proj.weight", (d, q)),))
        for name in ("q_norm", "k_norm"):
            yield Rule(f"{ours}.attention.{name}.weight", ((f"{theirs}.self_attn.{name}.weight", (t.head_dim,)),))
        yield Rule(f"{ours}.norm1.weight", ((f"{theirs}.input_layernorm.weight", (d,)),))
        yield Rule(f"{ours}.norm2.weight", ((f"{theirs}.post_attention_layernorm.weight", (d,)),))
        gate_up = tuple((f"{theirs}.mlp.{x}_proj.weight", (inner, d)) for x in ("gate", "up"))
        yield Rule(f"{ours}.mlp.gate_up.weight", gate_up)
        yield Rule(f"{ours}.mlp.down.weight", ((f"{theirs}.mlp.down_proj.weight", (d, inner)),))
    yield Rule("decoder.norm.weight", (("model.norm.weight", (d,)),))
    if not t.tie_word_embeddings:
        yield Rule("lm_head.weight", (("lm_head.weight", (t.vocab_size, d)),))


@dataclass(frozen=True)
class KeyeFamily:
    """What the rest of the package asks of Keye-VL; see ``family.Family``."""

    model_type: str
    format: PromptFormat
    media: MediaRule

    def config(self, mapping: Mapping[str, Any]) -> KeyeConfig:
        return KeyeConfig.from_hf(mapping)

    def build(self, config: KeyeConfig) -> KeyeVL:
        return KeyeVL(config)

    def layout(self, config: KeyeConfig) -> Layout:
        return layout(config)

    def prompt_format(self, config: KeyeConfig) -> PromptFormat:
        return replace(self.format, tokens_per_second=config.vision.tokens_per_second, merge=config.vision.spatial_merge_size)

    def media_rule(self, config: KeyeConfig, preprocessor: Mapping[str, Any] | None = None) -> MediaRule:
        """With preprocessor_config.json: its bounds, mean, deviation and filter. ConfigError names an unknown key or value."""
        keys = Keys(preprocessor or {}, "preprocessor_config.json")
        vision, default = config.vision, self.media.grid
        keys.expect("patch_size", vision.patch_size)
        keys.expect("merge_size", vision.spatial_merge_size)
        for name, value in _PROCESSOR_FIXED.items():
            keys.expect(name, value)
        keys.ignore(*_PROCESSOR_IGNORED)
        grid = GridRule(
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            min_pixels=keys.take("min_pixels", int, default.min_pixels),
            max_pixels=keys.take("max_pixels", int, default.max_pixels),
            mean=_triple(keys, "image_mean", default.mean),
            std=_triple(keys, "image_std", default.std),
        )
        filters: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}
        keys.expect("resample", *filters)
        resample = filters[preprocessor["resample"]] if preprocessor and "resample" in preprocessor else self.media.resample
        keys.done()
        return replace(self.media, grid=grid, resample=resample)

    def cache_spec(self, config: KeyeConfig) -> dict[str, int]:
        t = config.text
        return {"num_layers": t.num_hidden_layers, "num_kv_heads": t.num_key_value_heads, "head_dim": t.head_dim}


_PROCESSOR_FIXED: dict[str, Any] = {
    "temporal_patch_size": 1,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
}
# ``size`` repeats the bounds in files that transformers wrote; the bounds themselves are read.
_PROCESSOR_IGNORED = (
    "image_processor_type",
    "processor_class",
    "auto_map",
    "size",
    "_valid_processor_keys",
    "video_processor_type",
)


def _triple(keys: Keys, name: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    made = tuple(float(x) for x in keys.take(name, list, list(default)))
    if len(made) != 3:
        raise ConfigError(f"{keys.where}: {name} holds {len(made)} numbers", "one per colour channel: three")
    return made


KEYE = KeyeFamily("Keye", KEYE_PREVIEW_FORMAT, KEYE_PREVIEW_MEDIA)
KEYE_1_5 = KeyeFamily("KeyeVL1_5", KEYE_15_FORMAT, KEYE_15_MEDIA)
