"""Prepared pixels kept by the content they came from, bounded in bytes."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from pathlib import Path

from mirada.errors import SettingsError
from mirada.media.grid import Patches


class PixelCache:
    """Least-recently-used cache of :class:`Patches`, safe between threads. What it hands out is shared: do not write to it."""

    def __init__(self, max_bytes: int = 256 << 20) -> None:
        if max_bytes < 0:
            raise SettingsError(f"max_bytes={max_bytes!r} is negative", "give 0 to keep nothing")
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self.bytes_held = 0
        self._entries: OrderedDict[bytes, Patches] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Patches | None:
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return found

    def put(self, key: bytes, patches: Patches) -> None:
        """Keep ``patches``, dropping the least recently used; one larger than the whole cache is not kept."""
        size = patches.pixels.nbytes
        if size > self.max_bytes:
            return
        with self._lock:
            if (old := self._entries.pop(key, None)) is not None:
                self.bytes_held -= old.pixels.nbytes
            self._entries[key] = patches
            self.bytes_held += size
            while self.bytes_held > self.max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self.bytes_held -= dropped.pixels.nbytes
                self.evictions += 1

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.bytes_held = 0


def source_key(data: bytes | memoryview | Path, *settings: object) -> bytes:
    """256-bit hash of a source's bytes (of a file's content, read in pieces) and of every setting that shapes its pixels."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=32)
    digest.update(b"\0")  # no repr holds it, so settings and content cannot run into one another
    if isinstance(data, Path):
        with data.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    else:
        digest.update(data)
    return digest.digest()
