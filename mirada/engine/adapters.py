"""The adapters of one engine, by name, and whose rows are whose in each forward."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mirada.adapt.lora import Adapted, Adapter
from mirada.engine import memory
from mirada.errors import SettingsError, nearest
from mirada.models.family import family_of
from mirada.models.lora import load_adapter, size_of


def no_adapter(name: object, known: Collection[str]) -> SettingsError:
    """Lists what there is."""
    return SettingsError(f"there is no adapter {name!r}", nearest(str(name), list(known)))


def check_adapter(name: object, known: Collection[str]) -> None:
    """Raises SettingsError for what names none of ``known``."""
    if not isinstance(name, str) or name not in known:
        raise no_adapter(name, known)


class Adapters:
    """Names -> adapters. Any thread may load, unload and look up; ``tokens`` and ``media`` are for the engine's."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._adapted = Adapted(model)
        self._merge = model.config.vision.spatial_merge_size**2
        self._held: dict[str, Adapter] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._held)

    def load(self, name: str, path: str | Path) -> None:
        """Make the adapter in directory ``path`` known as ``name``. Raises SettingsError for a name that is taken,
        CheckpointError and its kinds, OutOfMemory."""
        if not isinstance(name, str) or not name:
            raise SettingsError(f"an adapter is named {name!r}", "give it a name of at least one letter")
        self._refuse_taken(name)
        device = next(self._model.parameters()).device
        memory.require(size_of(path), memory.available(device), f"adapter {name!r}", "unload another adapter first")
        layout = family_of({"model_type": self._model.config.model_type}).layout(self._model.config)
        made = load_adapter(path, self._model, layout)
        with self._lock:
            self._refuse_taken(name)
            self._held[name] = made

    def unload(self, name: str) -> None:
        """Forget ``name``. Requests that were submitted with it end with it; SettingsError if there is none."""
        with self._lock:
            self.find(name)
            del self._held[name]

    def find(self, name: str) -> Adapter:
        """SettingsError lists what there is."""
        found = self._held.get(name) if isinstance(name, str) else None
        if found is None:
            raise no_adapter(name, self._held)
        return found

    def _refuse_taken(self, name: str) -> None:
        if name in self._held:
            raise SettingsError(f"there is an adapter {name!r} already", "unload it first, or give this one another name")

    def tokens(self, segments: Iterable[tuple[Adapter | None, int, int]]) -> AbstractContextManager[None]:
        """While open, a forward over the tokens of several sequences is each one's own: (adapter, tokens, of which so many have
        their logits made) in order."""
        given = list(segments)
        tokens, rows = [(adapter, count) for adapter, count, _ in given], [(adapter, rows) for adapter, _, rows in given]
        return self._over(decoder=tokens, lm_head=rows)

    def media(
        self, segments: Iterable[tuple[Adapter | None, int]], rows: tuple[int, int] | None = None
    ) -> AbstractContextManager[None]:
        """The same for patches on their way through tower and projector: all, or ``rows`` of them."""
        patches = list(segments) if rows is None else _within(segments, *rows)
        area = self._model.config.vision.spatial_merge_size**2
        return self._over(visual=patches, projector=[(adapter, count // area) for adapter, count in patches])

    def _over(self, **segments: list[tuple[Adapter | None, int]]) -> AbstractContextManager[None]:
        if all(adapter is None for given in segments.values() for adapter, _ in given):
            return contextlib.nullcontext()
        return self._adapted.over(segments)


def _within(segments: Iterable[tuple[Adapter | None, int]], first: int, end: int) -> list[tuple[Adapter | None, int]]:
    """Of each segment what lies in [first, end) of all."""
    made, at = [], 0
    for adapter, count in segments:
        made.append((adapter, max(0, min(end, at + count) - max(first, at))))
        at += count
    return made
