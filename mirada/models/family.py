"""What a model family offers, and the table of families (keyed by ``model_type`` of config.json)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from mirada.errors import ConfigError, nearest
from mirada.table import Table

FAMILIES = Table("model family", {"Keye": "mirada.models.keye_vl:KEYE", "KeyeVL1_5": "mirada.models.keye_vl:KEYE_1_5"})


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

    def prompt_format(self, config: Any) -> Any:
        """``prompt.format.PromptFormat``: control strings and how media are spelt."""
        ...

    def media_rule(self, config: Any, preprocessor: Mapping[str, Any] | None = None) -> Any:
        """``media.rule.MediaRule`` from preprocessor_config.json (None: the family's defaults)."""
        ...

    def cache_spec(self, config: Any) -> Mapping[str, int]:
        """num_layers, num_kv_heads, head_dim of the cache."""
        ...


def family_of(mapping: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family that config.json names; ConfigError lists what is supported."""
    name = mapping.get("model_type")
    if not isinstance(name, str):
        raise ConfigError(f"{where} has no model_type", f"supported: {', '.join(FAMILIES)}")
    if name not in FAMILIES:
        raise ConfigError(f"{where}: model_type {name!r} is not supported", nearest(name, FAMILIES))
    return FAMILIES[name]


_MISSING: Any = object()


class Keys:
    """Reads a config mapping key by key; ``done`` refuses what nobody asked for."""

    def __init__(self, mapping: Mapping[str, Any], where: str) -> None:
        self.mapping, self.where, self.seen = mapping, where, set[str]()

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = _MISSING) -> Any:
        """The value of ``name`` (an int is a float too), or ``default``; ConfigError if absent or of another kind."""
        self.seen.add(name)
        value = self.mapping.get(name, _MISSING)
        if value is _MISSING:
            if default is _MISSING:
                raise ConfigError(
                    f"{self.where}: key {name!r} is missing", "take the config.json that belongs to these weights"
                )
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(k.__name__ for k in kinds)
            raise ConfigError(f"{self.where}: {name} is {value!r}", f"it must be a {wanted}")
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        """``name``, where present, must hold one of ``allowed``: others would change the arithmetic."""
        self.seen.add(name)
        if name in self.mapping and self.mapping[name] not in allowed:
            shown = " or ".join(repr(a) for a in allowed)
            raise ConfigError(f"{self.where}: {name}={self.mapping[name]!r} is not supported", f"supported: {shown}")

    def ignore(self, *names: str) -> None:
        """Keys that do not change what is computed."""
        self.seen.update(names)

    def done(self) -> None:
        unknown = sorted(set(self.mapping) - self.seen)
        if unknown:
            raise ConfigError(f"{self.where}: key {unknown[0]!r} is not understood", nearest(unknown[0], self.seen))
