"""What a model family offers, and the table of families (keyed by ``model_type`` of config.json)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from mirada.errors import ConfigError, nearest
from mirada.keys import Keys
from mirada.table import Table

__all__ = ["FAMILIES", "Family", "Keys", "family_of"]

FAMILIES = Table(
    "model family",
    {
        "Keye": "mirada.models.keye_vl:KEYE",
        "KeyeVL1_5": "mirada.models.keye_vl:KEYE_1_5",
        "qwen2_vl": "mirada.models.qwen2_vl:QWEN2_VL",
        "KeyeVLMoe": "mirada.models.keye_moe:KEYE_MOE",
        "kimi_vl": "mirada.models.kimi_vl:KIMI",
    },
)
_BY_ARCHITECTURE = {"KeyeVLMoeForConditionalGeneration": "KeyeVLMoe"}
"""Architecture -> family, where only the architecture's name is known for sure."""


class Family(Protocol):
    """All that the rest of the package asks of a family."""

    model_type: str

    def config(self, mapping: Mapping[str, Any]) -> Any:
        """config.json -> the family's typed config; ConfigError names a key or value that is not understood."""
        ...

    def build(self, config: Any) -> nn.Module:
        """The modules, on the current default device (``meta`` allocates nothing)."""
        ...

    def layout(self, config: Any) -> Any:
        """``models.layout.Layout``: checkpoint names <-> parameters."""
        ...

    def plan(self, config: Any) -> Any:
        """``parallel.plan.Plan``: what each rank holds of every parameter, where several divide a model."""
        ...

    def prompt_format(self, config: Any) -> Any:
        """``prompt.format.PromptFormat``: control strings and how media are spelt."""
        ...

    def media_rule(self, config: Any, preprocessor: Mapping[str, Any] | None = None) -> Any:
        """``media.rule.MediaRule`` from preprocessor_config.json (None: the family's defaults)."""
        ...

    def cache_spec(self, config: Any) -> Mapping[str, Any]:
        """What ``layers.cache.make_cache`` builds: ``kind`` (``slab`` if absent) and the sizes of that kind, say num_layers,
        num_kv_heads, head_dim."""
        ...


def family_of(mapping: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family that config.json names; ConfigError lists what is supported."""
    name = next((_BY_ARCHITECTURE[a] for a in mapping.get("architectures") or () if a in _BY_ARCHITECTURE), None)
    name = name or mapping.get("model_type")
    if not isinstance(name, str):
        raise ConfigError(f"{where} has no model_type", f"supported: {', '.join(FAMILIES)}")
    if name not in FAMILIES:
        raise ConfigError(f"{where}: model_type {name!r} is not supported", nearest(name, FAMILIES))
    return FAMILIES[name]
