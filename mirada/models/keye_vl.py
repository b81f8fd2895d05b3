"""Keye-VL-8B-Preview and Keye-VL-1.5-8B: config, model, and what the family offers.

Both releases share everything but three facts, said in ``KeyeConfig``: where the projector normalises, which patches see each
other, and how a video is spelt. Ported facts: Keye repository, ``keye-vl-8b-preview/modeling_keye.py``; vLLM
``keye_vl1_5.py`` for 1.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mirada import adapt
from mirada.keys import Keys
from mirada.media.rule import KEYE_15 as KEYE_15_MEDIA
from mirada.media.rule import KEYE_PREVIEW as KEYE_PREVIEW_MEDIA
from mirada.media.rule import MediaRule
from mirada.models import decoder, processor
from mirada.models.decoder import Decoder, DecoderConfig
from mirada.models.layout import Layout, Rule, affine
from mirada.models.projector import Projector
from mirada.models.vit import KeyeVisionConfig, KeyeVisionTower, check_heads
from mirada.models.vlm import VisionLanguageModel
from mirada.parallel.plan import Plan
from mirada.prompt.format import KEYE_1_5 as KEYE_15_FORMAT
from mirada.prompt.format import KEYE_PREVIEW as KEYE_PREVIEW_FORMAT
from mirada.prompt.format import PromptFormat

PROJECTOR_EPS = 1e-5


@dataclass(frozen=True)
class KeyeConfig:
    """config.json of a Keye-VL, typed. ``from_hf`` accounts for every key."""

    model_type: str
    vision: KeyeVisionConfig
    text: DecoderConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

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
        keys.ignore(*TOP_IGNORED, *adapt.KEYS)
        keys.expect("attention_bias", False)
        vision_mapping = keys.take("vision_config", dict)
        vision = vision_config(Keys(vision_mapping, f"{where}: vision_config"))
        eos = keys.take("eos_token_id", (int, list), ())
        made = cls(
            model_type=keys.take("model_type", str),
            vision=vision,
            text=decoder.text_config(keys, qkv_bias=False, qk_norm=True),
            image_token_id=keys.take("image_token_id", int),
            video_token_id=keys.take("video_token_id", int),
            vision_start_token_id=keys.take("vision_start_token_id", int),
            vision_end_token_id=keys.take("vision_end_token_id", int),
            eos_token_ids=(eos,) if isinstance(eos, int) else tuple(eos),
            pad_token_id=keys.take("pad_token_id", (int, type(None)), None),
        )
        keys.done()
        return made


# Facts about training, about other software, or ids that the tokenizer says by name.
TOP_IGNORED = (
    "architectures", "auto_map", "bos_token_id", "torch_dtype", "dtype", "transformers_version", "vision_token_id",
    "frame_token_id", "fast_start_token_id", "fast_end_token_id", "fast_video_token_id", "_name_or_path",
    "_attn_implementation_autoset", "mirada",
)  # fmt: skip
# temporal_patch_size stands as 2 in the release and is never used: frames are patched one by one.
_VISION_IGNORED = (
    "model_type", "attention_dropout", "temporal_patch_size", "initializer_range", "torch_dtype", "dtype",
    "transformers_version", "_name_or_path", "_attn_implementation_autoset", "architectures", "auto_map",
)  # fmt: skip


def vision_config(keys: Keys) -> KeyeVisionConfig:
    """KeyeViT from ``vision_config``; ConfigError names a key or value that is not understood."""
    keys.ignore(*_VISION_IGNORED)
    keys.expect("hidden_act", "gelu_pytorch_tanh")
    keys.expect("spatial_merge_size", 2)
    keys.expect("has_learnable_position_embedding", True)
    keys.expect("use_qk_norm", False)
    made = KeyeVisionConfig(
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
    check_heads(made, keys.where)
    return made


class KeyeVL(VisionLanguageModel):
    """KeyeViT, a projector that merges squares of patches, and a Qwen3 decoder."""

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__(
            config,
            KeyeVisionTower(config.vision),
            Projector(config.vision, config.text.hidden_size, PROJECTOR_EPS, config.merge_then_norm),
            Decoder(config.text),
            config.frames_apart,
        )


def layout(config: KeyeConfig) -> Layout:
    """Released names <-> modules, with every shape."""
    # The pooling head and the table for packing take no part in the model.
    ignored = ("visual.vision_model.head.*", "*.packing_position_embedding.*", *decoder.ignored(config.text))
    return Layout((*vision_rules(config.vision), *projector_rules(config), *decoder.rules(config.text)), ignored)


def vision_rules(v: KeyeVisionConfig) -> Iterator[Rule]:
    """Released names <-> modules of KeyeViT."""
    d, inner = v.hidden_size, v.intermediate_size
    embeddings = "visual.vision_model.embeddings"
    yield from affine("visual.patches.proj", f"{embeddings}.patch_embedding", d, v.num_channels, v.patch_size, v.patch_size)
    yield Rule("visual.positions.weight", ((f"{embeddings}.position_embedding.weight", (v.table_side**2, d)),))
    for i in range(v.num_hidden_layers):
        ours, theirs = f"visual.layers.{i}", f"visual.vision_model.encoder.layers.{i}"
        for name, columns in (("weight", (d,)), ("bias", ())):
            parts = tuple((f"{theirs}.self_attn.{x}_proj.{name}", (d, *columns)) for x in "qkv")
            yield Rule(f"{ours}.attention.qkv.{name}", parts)
        yield from affine(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj", d, d)
        yield from affine(f"{ours}.norm1", f"{theirs}.layer_norm1", d)
        yield from affine(f"{ours}.norm2", f"{theirs}.layer_norm2", d)
        yield from affine(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1", inner, d)
        yield from affine(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2", d, inner)
    yield from affine("visual.norm", "visual.vision_model.post_layernorm", d)


def projector_rules(config: Any) -> Iterator[Rule]:
    """Released names <-> the projector of a config with ``vision``, ``text`` and ``merge_then_norm``."""
    d = config.vision.hidden_size
    wide = d * config.vision.spatial_merge_size**2
    yield from affine("projector.norm", "mlp_AR.pre_norm", wide if config.merge_then_norm else d)
    yield from affine("projector.mlp.fc1", "mlp_AR.linear_1", wide, wide)
    yield from affine("projector.mlp.fc2", "mlp_AR.linear_2", config.text.hidden_size, wide)


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
        return processor.media_rule(self.media, config.vision, preprocessor)

    def plan(self, config: KeyeConfig) -> Plan:
        return decoder.plan(config.text)

    def cache_spec(self, config: KeyeConfig) -> dict[str, int]:
        return decoder.cache_spec(config.text)


KEYE = KeyeFamily("Keye", KEYE_PREVIEW_FORMAT, KEYE_PREVIEW_MEDIA)
KEYE_1_5 = KeyeFamily("KeyeVL1_5", KEYE_15_FORMAT, KEYE_15_MEDIA)
