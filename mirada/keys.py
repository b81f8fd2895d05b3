"""Reads a model's released config files key by key, so that every key is used, ignored by name, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mirada.errors import ConfigError, nearest

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
