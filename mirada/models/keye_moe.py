"""Keye-VL-671B-A37B: KeyeViT and the projector of Keye-VL-1.5 before a DeepSeek-V3 decoder.

Its config.json, processor and outputs are not public to read; what is here follows the Keye team's serving code (SGLang fork,
branch keye-dpsk-infer-fp8-release, ``models/keye_deepseek.py``): names of tensors, flat config, plain positions unless
``rope_scaling`` holds ``mrope_section``, videos as in 1.5 with a smaller budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mirada import adapt
from mirada.keys import Keys
from mirada.media.rule import KEYE_671B as KEYE_671B_MEDIA
from mirada.media.rule import MediaRule
from mirada.models import deepseek, processor
from mirada.models.deepseek import DeepseekConfig, DeepseekDecoder
from mirada.models.keye_vl import PROJECTOR_EPS, TOP_IGNORED, projector_rules, vision_config, vision_rules
from mirada.models.layout import Layout
from mirada.models.projector import Projector
from mirada.models.vit import KeyeVisionConfig, KeyeVisionTower
from mirada.models.vlm import VisionLanguageModel
from mirada.parallel.plan import Plan
from mirada.prompt.format import KEYE_1_5 as KEYE_15_FORMAT
from mirada.prompt.format import PromptFormat

MODEL_TYPE = "KeyeVLMoe"


@dataclass(frozen=True)
class KeyeMoeConfig:
    """config.json of Keye-VL-671B, typed. ``from_hf`` accounts for every key."""

    vision: KeyeVisionConfig
    text: DeepseekConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    model_type: str = MODEL_TYPE
    merge_then_norm: bool = True
    frames_apart: bool = True

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any], where: str = "config.json") -> KeyeMoeConfig:
        """From the flat layout; ConfigError names a key or value that is not understood."""
        keys = Keys(mapping, where)
        keys.ignore("model_type", *TOP_IGNORED, *adapt.KEYS)
        eos = keys.take("eos_token_id", (int, list), ())
        made = cls(
            vision=vision_config(Keys(keys.take("vision_config", dict), f"{where}: vision_config")),
            text=deepseek.text_config(keys),
            image_token_id=keys.take("image_token_id", int),
            video_token_id=keys.take("video_token_id", int),
            vision_start_token_id=keys.take("vision_start_token_id", int),
            vision_end_token_id=keys.take("vision_end_token_id", int),
            eos_token_ids=(eos,) if isinstance(eos, int) else tuple(eos),
            pad_token_id=keys.take("pad_token_id", (int, type(None)), None),
        )
        keys.done()
        return made


class KeyeMoe(VisionLanguageModel):
    """KeyeViT, a projector that normalises merged squares of patches, and a DeepSeek-V3 decoder."""

    def __init__(self, config: KeyeMoeConfig) -> None:
        super().__init__(
            config,
            KeyeVisionTower(config.vision),
            Projector(config.vision, config.text.hidden_size, PROJECTOR_EPS, config.merge_then_norm),
            DeepseekDecoder(config.text),
            config.frames_apart,
        )


@dataclass(frozen=True)
class KeyeMoeFamily:
    """What the rest of the package asks of Keye-VL-671B; see ``family.Family``."""

    model_type: str = MODEL_TYPE
    format: PromptFormat = KEYE_15_FORMAT
    media: MediaRule = KEYE_671B_MEDIA

    def config(self, mapping: Mapping[str, Any]) -> KeyeMoeConfig:
        return KeyeMoeConfig.from_hf(mapping)

    def build(self, config: KeyeMoeConfig) -> KeyeMoe:
        return KeyeMoe(config)

    def layout(self, config: KeyeMoeConfig) -> Layout:
        """Released names <-> modules; the pooling head and the table for packing take no part, as in the 8B models."""
        ignored = ("visual.vision_model.head.*", "*.packing_position_embedding.*", *deepseek.ignored(config.text))
        return Layout((*vision_rules(config.vision), *projector_rules(config), *deepseek.rules(config.text)), ignored)

    def prompt_format(self, config: KeyeMoeConfig) -> PromptFormat:
        return replace(
            self.format,
            tokens_per_second=config.vision.tokens_per_second,
            merge=config.vision.spatial_merge_size,
            flat_positions=config.text.mrope_section is None,
        )

    def media_rule(self, config: KeyeMoeConfig, preprocessor: Mapping[str, Any] | None = None) -> MediaRule:
        """With preprocessor_config.json: its bounds, mean, deviation and filter. ConfigError names an unknown key or value."""
        return processor.media_rule(self.media, config.vision, preprocessor)

    def plan(self, config: KeyeMoeConfig) -> Plan:
        return deepseek.plan(config.text)

    def cache_spec(self, config: KeyeMoeConfig) -> dict[str, int | str]:
        return deepseek.cache_spec(config.text)


KEYE_MOE = KeyeMoeFamily()
