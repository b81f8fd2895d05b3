"""Kimi-VL-A3B (Instruct, Thinking, Thinking-2506): config, MoonViT, model, and what the family offers.

N patches, W width of the tower. All releases share the architecture. Ported facts: Kimi-VL (arXiv 2504.07491), the ports of its
``modeling_kimi_vl.py`` in NVIDIA-NeMo/Automodel and vLLM (``moonvit.py``, ``kimi_vl.py``). Where their paths differ, pictures
that are packed together never see each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mirada import adapt
from mirada.errors import ConfigError
from mirada.keys import Keys
from mirada.layers.embed import GridPositions, PatchEmbed
from mirada.layers.norm import LayerNorm
from mirada.layers.rope import grid_angles, rotation
from mirada.media.rule import KIMI as KIMI_MEDIA
from mirada.media.rule import MediaRule
from mirada.models import deepseek, processor
from mirada.models.deepseek import DeepseekConfig, DeepseekDecoder
from mirada.models.layout import Layout, Rule, affine
from mirada.models.projector import Projector
from mirada.models.slices import Room, SlicedTower, Slices, through, unbound
from mirada.models.vit import PairedAttention, VisionConfig, VisionLayer, check_heads, placed
from mirada.models.vlm import VisionLanguageModel
from mirada.parallel.plan import Plan
from mirada.prompt.format import KIMI as KIMI_FORMAT
from mirada.prompt.format import PromptFormat
from mirada.types import Grid

PROJECTOR_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class MoonVisionConfig(VisionConfig):
    """Sizes of MoonViT."""

    table_rows: int
    table_columns: int
    """Of the learnt position table, in patches."""
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class KimiConfig:
    """config.json of a Kimi-VL, typed. ``from_hf`` accounts for every key."""

    model_type: str
    vision: MoonVisionConfig
    text: DeepseekConfig
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    video_token_id: None = None
    """There is none: a video is given as pictures."""
    frames_apart: bool = True

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any], where: str = "config.json") -> KimiConfig:
        """From the released nested layout; ConfigError names a key or value that is not understood."""
        keys = Keys(mapping, where)
        keys.ignore(*_IGNORED, *adapt.KEYS)
        nested = Keys(keys.take("text_config", dict), f"{where}: text_config")
        nested.ignore(*_IGNORED, *adapt.KEYS)
        nested.expect("model_type", "deepseek_v3")
        eos = nested.take("eos_token_id", (int, list), ())
        text = deepseek.text_config(nested)
        nested.done()
        if text.mrope_section is not None:
            raise ConfigError(
                f"{where}: text_config: mrope_section is set", "Kimi-VL counts its tokens one by one: leave it out"
            )
        # Both are said twice; the model's own head is built from text_config.
        keys.expect("vocab_size", text.vocab_size)
        keys.expect("tie_word_embeddings", text.tie_word_embeddings)
        made = cls(
            model_type=keys.take("model_type", str),
            vision=_vision(Keys(keys.take("vision_config", dict), f"{where}: vision_config")),
            text=text,
            image_token_id=keys.take("media_placeholder_token_id", int),
            eos_token_ids=(eos,) if isinstance(eos, int) else tuple(eos),
            pad_token_id=nested.take("pad_token_id", (int, type(None)), None),
        )
        keys.done()
        return made


# Facts about training, about other software, or ids that the tokenizer says by name.
_IGNORED = (
    "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "ignore_index", "torch_dtype", "dtype",
    "transformers_version", "_name_or_path", "_attn_implementation_autoset", "mirada",
)  # fmt: skip


def _vision(keys: Keys) -> MoonVisionConfig:
    keys.ignore(*_IGNORED, "initializer_range")
    keys.expect("model_type", "moonvit")
    keys.expect("merge_kernel_size", [2, 2])
    made = MoonVisionConfig(
        hidden_size=keys.take("hidden_size", int),
        num_hidden_layers=keys.take("num_hidden_layers", int),
        num_attention_heads=keys.take("num_attention_heads", int),
        intermediate_size=keys.take("intermediate_size", int),
        patch_size=keys.take("patch_size", int, 14),
        table_rows=keys.take("init_pos_emb_height", int, 64),
        table_columns=keys.take("init_pos_emb_width", int, 64),
    )
    keys.done()
    check_heads(made, keys.where)
    return made


class MoonVisionTower(SlicedTower):
    """MoonViT: [N, C, P, P] patches of all pictures -> [N, W] features, one per patch, after the last norm.

    Places are said twice: by a learnt table, resampled bicubically and added, and by rotary angles of columns and rows.
    """

    def __init__(self, config: MoonVisionConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patches = PatchEmbed(c.num_channels, c.patch_size, c.hidden_size)
        self.positions = GridPositions((c.table_rows, c.table_columns), c.hidden_size, "bicubic")
        self.layers = nn.ModuleList(VisionLayer(c, "tanh", PairedAttention) for _ in range(c.num_hidden_layers))
        self.norm = LayerNorm(c.hidden_size, c.layer_norm_eps)

    def slices(self, pixels: Tensor, grids: Sequence[Grid], segments: Sequence[int], room: Room = unbound) -> Slices[Tensor]:
        x = yield from placed(self.patches, self.positions, pixels, grids, room)
        del pixels
        turn = rotation(column_row_angles(grids, self.config.head_dim, self.config.rope_theta, x.device))
        return self.norm((yield from through(self.layers, x, turn, segments, room)))


def column_row_angles(grids: Sequence[Grid], head_dim: int, theta: float, device: torch.device) -> Tensor:
    """[N, d/2]: of each frequency the angle of the column, then that of the row."""
    rows, columns = grid_angles(grids, head_dim, theta, device).chunk(2, -1)
    return torch.stack((columns, rows), -1).flatten(-2)


class KimiVL(VisionLanguageModel):
    """MoonViT, a projector that merges squares of patches, and a DeepSeek-V3 decoder."""

    def __init__(self, config: KimiConfig) -> None:
        super().__init__(
            config,
            MoonVisionTower(config.vision),
            Projector(config.vision, config.text.hidden_size, PROJECTOR_EPS),
            DeepseekDecoder(config.text),
        )


def layout(config: KimiConfig) -> Layout:
    """Released names <-> modules, with every shape."""
    text = deepseek.rules(config.text, "language_model.")
    return Layout(
        (*_vision_rules(config.vision), *_projector_rules(config), *text), deepseek.ignored(config.text, "language_model.")
    )


def _vision_rules(v: MoonVisionConfig) -> Iterator[Rule]:
    d, inner, first = v.hidden_size, v.intermediate_size, "vision_tower.patch_embed"
    yield from affine("visual.patches.proj", f"{first}.proj", d, v.num_channels, v.patch_size, v.patch_size)
    yield Rule("visual.positions.weight", ((f"{first}.pos_emb.weight", (v.table_rows, v.table_columns, d)),))
    for i in range(v.num_hidden_layers):
        ours, theirs = f"visual.layers.{i}", f"vision_tower.encoder.blocks.{i}"
        yield from affine(f"{ours}.attention.qkv", f"{theirs}.wqkv", 3 * d, d)
        yield from affine(f"{ours}.attention.out", f"{theirs}.wo", d, d)
        yield from affine(f"{ours}.norm1", f"{theirs}.norm0", d)
        yield from affine(f"{ours}.norm2", f"{theirs}.norm1", d)
        yield from affine(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc0", inner, d)
        yield from affine(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc1", d, inner)
    yield from affine("visual.norm", "vision_tower.encoder.final_layernorm", d)


def _projector_rules(config: KimiConfig) -> Iterator[Rule]:
    d = config.vision.hidden_size
    wide = d * config.vision.spatial_merge_size**2
    yield from affine("projector.norm", "multi_modal_projector.pre_norm", d)
    yield from affine("projector.mlp.fc1", "multi_modal_projector.linear_1", wide, wide)
    yield from affine("projector.mlp.fc2", "multi_modal_projector.linear_2", config.text.hidden_size, wide)


@dataclass(frozen=True)
class KimiFamily:
    """What the rest of the package asks of Kimi-VL; see ``family.Family``."""

    model_type: str = "kimi_vl"
    format: PromptFormat = KIMI_FORMAT
    media: MediaRule = KIMI_MEDIA

    def config(self, mapping: Mapping[str, Any]) -> KimiConfig:
        return KimiConfig.from_hf(mapping)

    def build(self, config: KimiConfig) -> KimiVL:
        return KimiVL(config)

    def layout(self, config: KimiConfig) -> Layout:
        return layout(config)

    def prompt_format(self, config: KimiConfig) -> PromptFormat:
        return replace(self.format, merge=config.vision.spatial_merge_size)

    def media_rule(self, config: KimiConfig, preprocessor: Mapping[str, Any] | None = None) -> MediaRule:
        """With preprocessor_config.json: its limit, mean and deviation. ConfigError names an unknown key or value."""
        return processor.kimi_media_rule(self.media, config.vision, preprocessor)

    def plan(self, config: KimiConfig) -> Plan:
        return deepseek.plan(config.text)

    def cache_spec(self, config: KimiConfig) -> dict[str, int | str]:
        return deepseek.cache_spec(config.text)


KIMI = KimiFamily()
