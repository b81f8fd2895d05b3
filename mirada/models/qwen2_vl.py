"""Qwen2-VL 2B, 7B and 72B: config, model, and what the family offers.

A ViT over pairs of frames without a table of positions, a merger of squares of patches, a Qwen2 decoder with positions on
three axes. Ported facts: transformers ``modeling_qwen2_vl.py``, ``configuration_qwen2_vl.py`` (4.45 for the released form,
5.23 for what it saves); Qwen2-VL, arXiv 2409.12191.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from mirada import adapt
from mirada.errors import ConfigError
from mirada.keys import Keys
from mirada.layers.embed import PatchEmbed
from mirada.layers.rope import grid_angles, rotation
from mirada.media.rule import QWEN2_VL as QWEN2_VL_MEDIA
from mirada.media.rule import MediaRule
from mirada.models import decoder, processor
from mirada.models.decoder import Decoder, DecoderConfig
from mirada.models.layout import Layout, Rule, affine
from mirada.models.projector import Projector
from mirada.models.slices import Room, SlicedTower, Slices, through, unbound
from mirada.models.vit import VisionConfig, VisionLayer, check_heads, embedded
from mirada.models.vlm import VisionLanguageModel
from mirada.parallel.plan import Plan
from mirada.prompt.format import QWEN2_VL as QWEN2_VL_FORMAT
from mirada.prompt.format import PromptFormat
from mirada.types import Grid

MERGER_EPS = 1e-6


@dataclass(frozen=True)
class Qwen2VLConfig:
    """config.json of a Qwen2-VL, typed. ``from_hf`` accounts for every key."""

    model_type: str
    vision: VisionConfig
    text: DecoderConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any], where: str = "config.json") -> Qwen2VLConfig:
        """From the released flat layout or from what later transformers save (``text_config``, ``rope_parameters``).

        ConfigError names a key or value that is not understood.
        """
        keys = Keys(mapping, where)
        keys.ignore(*_TOP_IGNORED, *adapt.KEYS)
        text, ids = _text(keys)
        made = cls(
            model_type=keys.take("model_type", str),
            vision=_vision(Keys(keys.take("vision_config", dict), f"{where}: vision_config"), text.hidden_size),
            text=text,
            image_token_id=keys.take("image_token_id", int),
            video_token_id=keys.take("video_token_id", int),
            vision_start_token_id=keys.take("vision_start_token_id", int),
            vision_end_token_id=keys.take("vision_end_token_id", int),
            eos_token_ids=_eos(keys, ids),
            pad_token_id=keys.take("pad_token_id", _ID, ids.take("pad_token_id", _ID, None)),
        )
        ids.done()
        keys.done()
        return made


_ID = (int, type(None))
# Facts about training, about other software, or ids that the tokenizer says by name.
_COMMON_IGNORED = (
    "architectures", "auto_map", "bos_token_id", "torch_dtype", "dtype", "transformers_version", "_name_or_path",
    "_attn_implementation_autoset", "_attn_implementation",
)  # fmt: skip
_TOP_IGNORED = (*_COMMON_IGNORED, "vision_token_id", "mirada")
_TEXT_IGNORED = (
    *_COMMON_IGNORED, "model_type", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
    "vision_token_id",
)  # fmt: skip
_VISION_IGNORED = (*_COMMON_IGNORED, "model_type", "initializer_range", "spatial_patch_size")


def _text(keys: Keys) -> tuple[DecoderConfig, Keys]:
    """The decoder's sizes, and where ids that lie beside them are found: ``text_config``, or the flat file itself."""
    nested = keys.take("text_config", (dict, type(None)), None)
    if nested is None:
        return decoder.text_config(keys, qkv_bias=True, qk_norm=False), keys
    text = Keys(nested, f"{keys.where}: text_config")
    made = decoder.text_config(text, qkv_bias=True, qk_norm=False)
    # Some releases of transformers write both forms at once, and leave in text_config a tie that is only a class's default.
    tied = keys.take("tie_word_embeddings", bool, made.tie_word_embeddings)
    for name in sorted((text.seen & set(nested) & set(keys.mapping)) - {"tie_word_embeddings"}):
        if nested[name] != keys.mapping[name]:
            raise ConfigError(
                f"{keys.where}: {name} is {keys.mapping[name]!r}, in text_config {nested[name]!r}", "keep the right one"
            )
    keys.ignore(*text.seen)
    text.ignore(*_TEXT_IGNORED)
    return replace(made, tie_word_embeddings=tied), text


def _eos(keys: Keys, ids: Keys) -> tuple[int, ...]:
    nested = ids.take("eos_token_id", (int, list, type(None)), None)
    found = keys.take("eos_token_id", (int, list, type(None)), nested)
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)


def _vision(keys: Keys, text_width: int) -> VisionConfig:
    keys.ignore(*_VISION_IGNORED)
    keys.expect("hidden_act", "quick_gelu")
    keys.expect("hidden_size", text_width)  # of the merger's result
    channels = keys.take("in_channels", int, keys.take("in_chans", int, 3))
    width = keys.take("embed_dim", int)
    rope = Keys(keys.take("rope_parameters", (dict, type(None)), None) or {}, f"{keys.where}: rope_parameters")
    rope.expect("rope_type", "axial", "default")
    made = VisionConfig(
        hidden_size=width,
        num_hidden_layers=keys.take("depth", int),
        num_attention_heads=keys.take("num_heads", int),
        intermediate_size=int(width * keys.take("mlp_ratio", float, 4.0)),
        patch_size=keys.take("patch_size", int, 14),
        temporal_patch_size=keys.take("temporal_patch_size", int, 2),
        num_channels=channels,
        rope_theta=rope.take("rope_theta", float, 10000.0),
        spatial_merge_size=keys.take("spatial_merge_size", int, 2),
        merged_order=True,
    )
    rope.done()
    keys.done()
    check_heads(made, keys.where)
    return made


class Qwen2VisionTower(SlicedTower):
    """[N, C, 2, P, P] patches of all pictures, square after square -> [N, W]. Where a patch lies is said by rotation alone;
    the norm after the last layer is the merger's."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = c = config
        self.patches = PatchEmbed(c.num_channels, c.patch_size, c.hidden_size, frames=c.temporal_patch_size, bias=False)
        self.layers = nn.ModuleList(VisionLayer(c, gelu="quick") for _ in range(c.num_hidden_layers))

    def slices(self, pixels: Tensor, grids: Sequence[Grid], segments: Sequence[int], room: Room = unbound) -> Slices[Tensor]:
        c = self.config
        x = yield from embedded(self.patches, pixels, room)
        del pixels
        turn = rotation(grid_angles(grids, c.head_dim, c.rope_theta, x.device, merge=c.spatial_merge_size))
        return (yield from through(self.layers, x, turn, segments, room))


class Qwen2VL(VisionLanguageModel):
    """ViT, merger, Qwen2 decoder. Each pair of frames sees only itself."""

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__(
            config,
            Qwen2VisionTower(config.vision),
            Projector(config.vision, config.text.hidden_size, MERGER_EPS),
            Decoder(config.text),
            frames_apart=True,
        )


def layout(config: Qwen2VLConfig) -> Layout:
    """Released names <-> modules, with every shape. From 4.52 on, transformers may save under other prefixes."""
    return Layout(
        (*_vision_rules(config), *decoder.rules(config.text)),
        decoder.ignored(config.text),
        prefixes=(("model.visual.", "visual."), ("model.language_model.", "model.")),
    )


def _vision_rules(config: Qwen2VLConfig) -> Iterator[Rule]:
    v = config.vision
    d, inner, wide = v.hidden_size, v.intermediate_size, v.hidden_size * v.spatial_merge_size**2
    kernel = (d, v.num_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    yield Rule("visual.patches.proj.weight", (("visual.patch_embed.proj.weight", kernel),))
    for i in range(v.num_hidden_layers):
        ours, theirs = f"visual.layers.{i}", f"visual.blocks.{i}"
        yield from affine(f"{ours}.norm1", f"{theirs}.norm1", d)
        yield from affine(f"{ours}.attention.qkv", f"{theirs}.attn.qkv", 3 * d, d)
        yield from affine(f"{ours}.attention.out", f"{theirs}.attn.proj", d, d)
        yield from affine(f"{ours}.norm2", f"{theirs}.norm2", d)
        yield from affine(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1", inner, d)
        yield from affine(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2", d, inner)
    yield from affine("projector.norm", "visual.merger.ln_q", d)
    yield from affine("projector.mlp.fc1", "visual.merger.mlp.0", wide, wide)
    yield from affine("projector.mlp.fc2", "visual.merger.mlp.2", config.text.hidden_size, wide)


@dataclass(frozen=True)
class Qwen2VLFamily:
    """What the rest of the package asks of Qwen2-VL; see ``family.Family``."""

    model_type: str
    format: PromptFormat
    media: MediaRule

    def config(self, mapping: Mapping[str, Any]) -> Qwen2VLConfig:
        return Qwen2VLConfig.from_hf(mapping)

    def build(self, config: Qwen2VLConfig) -> Qwen2VL:
        return Qwen2VL(config)

    def layout(self, config: Qwen2VLConfig) -> Layout:
        return layout(config)

    def prompt_format(self, config: Qwen2VLConfig) -> PromptFormat:
        return replace(self.format, merge=config.vision.spatial_merge_size)

    def media_rule(self, config: Qwen2VLConfig, preprocessor: Mapping[str, Any] | None = None) -> MediaRule:
        """With preprocessor_config.json: its bounds, mean, deviation and filter. ConfigError names an unknown key or value."""
        return processor.media_rule(self.media, config.vision, preprocessor)

    def plan(self, config: Qwen2VLConfig) -> Plan:
        return decoder.plan(config.text)

    def cache_spec(self, config: Qwen2VLConfig) -> dict[str, int]:
        return decoder.cache_spec(config.text)


QWEN2_VL = Qwen2VLFamily("qwen2_vl", QWEN2_VL_FORMAT, QWEN2_VL_MEDIA)
