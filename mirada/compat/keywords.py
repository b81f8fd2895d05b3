"""Keyword arguments of other packages, sorted: what is honoured, what changes nothing, what cannot be done, what is unknown."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mirada.errors import SettingsError, nearest


@dataclass(frozen=True)
class Keywords:
    """What one call knows of its keyword arguments. None is as good as not given, for all of them."""

    where: str
    """The call, as messages name it."""
    honoured: Collection[str] = ()
    done_anyway: Mapping[str, Collection[Any]] = field(default_factory=dict)
    """Name -> the values that ask for what is done in any case; others are in ``without_effect`` or refused."""
    without_effect: Mapping[str, str] = field(default_factory=dict)
    """Name -> why it changes nothing; said in a warning."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Name -> what to do instead."""

    def settle(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of ``given`` that are honoured. Raises SettingsError for an unknown name (with the nearest) or a value that
        asks for what cannot be done."""
        kept = {}
        for name, value in given.items():
            if value is None:
                continue
            if name in self.honoured:
                kept[name] = value
            elif _among(value, self.done_anyway.get(name, ())):
                continue
            elif name in self.without_effect:
                warnings.warn(f"{self.where}: {name} has no effect: {self.without_effect[name]}", stacklevel=4)
            elif name in self.refused or name in self.done_anyway:
                known = ", ".join(map(repr, self.done_anyway.get(name, ())))
                fix = self.refused.get(name) or f"leave it out, or give {known}"
                raise SettingsError(f"{self.where} cannot do {name}={_short(value)}", fix)
            else:
                names = {*self.honoured, *self.done_anyway, *self.without_effect, *self.refused}
                raise SettingsError(f"{self.where} has no option {name!r}", nearest(name, names))
        return kept


def _among(value: Any, values: Collection[Any]) -> bool:
    # By type too: 1 is not True. Tensors and arrays are compared by nothing.
    return any(type(value) is type(one) and value == one for one in values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
