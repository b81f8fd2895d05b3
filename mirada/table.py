"""Plug-in tables: ``name -> "module:object"``, imported on use."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from mirada.errors import UnknownName, nearest


class Table:
    """One kind of plug-in. ``Table("family", {"KeyeVL1_5": "mirada.models.keye_vl:Keye15"})["KeyeVL1_5"]``."""

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self.entries = dict(entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self):
        return iter(self.entries)

    def __getitem__(self, name: str) -> Any:
        """The object behind ``name``; raises UnknownName listing the nearest."""
        if name not in self.entries:
            raise UnknownName(f"{self.kind} {name!r} is unknown", nearest(name, self.entries))
        module, _, attribute = self.entries[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
