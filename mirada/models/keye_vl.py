"""Keye-VL-8B-Preview and Keye-VL-1.5-8B: config, model, and what the family offers.

N patches, F features (N / 4), T tokens, D width of the decoder, V vocabulary. Both releases share everything but three
facts, said in ``KeyeConfig``: where the projector normalises, which patches see each other, and how a video is spelt.
Ported facts: Keye repository, ``keye-vl-8b-preview/modeling_keye.py``; vLLM ``keye_vl1_5.py`` for 1.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirada.errors import ConfigError, MessageError
from mirada.layers.batch import Batch, MediaBatch
from mirada.layers.mlp import MLP
from mirada.layers.norm import LayerNorm
from mirada.models.decoder import Decoder, DecoderConfig
from mirada.models.family import Keys
from mirada.models.vit import KeyeVisionTower, VisionConfig
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
        for name in _TOP_IGNORED:
            keys.ignore(name)
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
    "architectures auto_map attention_dropout bos_token_id initializer_range max_window_layers sliding_window torch_dtype dtype "
    "transformers_version use_cache vision_token_id frame_token_id fast_start_token_id fast_end_token_id fast_video_token_id "
    "_name_or_path _attn_implementation_autoset mirada"
).split()
# temporal_patch_size stands as 2 in the release and is never used: frames are patched one by one.
_VISION_IGNORED = (
    "model_type attention_dropout temporal_patch_size initializer_range torch_dtype dtype transformers_version _name_or_path "
    "_attn_implementation_autoset architectures auto_map"
).split()


def _vision(keys: Keys) -> VisionConfig:
    for name in _VISION_IGNORED:
        keys.ignore(name)
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

    def forward(self, batch: Batch, features: Tensor | None = None, cache: Any = None) -> Tensor:
        """Hidden values [T, D] after the final norm. With a cache, only the new tokens are in ``batch``."""
        return self.decoder(self.embed(batch, features), batch, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., D] -> float32 [.., V]."""
        return F.linear(hidden, self.lm_head.weight).float()

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Fresh weights for training: normal with deviation 0.02, residual outputs scaled down by depth; norms one, biases zero."""
        random = torch.Generator(self.lm_head.weight.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            depth = len(self.visual.layers) if name.startswith("visual") else len(self.decoder.layers)
            last = name.endswith(("attention.out.weight", "mlp.fc2.weight", "mlp.down.weight")) and "projector" not in name
            parameter.normal_(std=0.02 / (2 * depth) ** 0.5 if last else 0.02, generator=random)
