"""What is kept by the content it came from, bounded in bytes: the least recently used goes first."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from mirada.errors import SettingsError
from mirada.media.grid import Patches

V = TypeVar("V")


class ByteCache(Generic[V]):
    """Least-recently-used values by key, at most ``max_bytes`` of them by ``size``; counted; safe between threads.

    What it hands out is shared: do not write to it.
    """

    def __init__(self, max_bytes: int, size: Callable[[V], int]) -> None:
        if max_bytes < 0:
            raise SettingsError(f"max_bytes={max_bytes!r} is negative", "give 0 to keep nothing")
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self.bytes_held = 0
        self._size = size
        self._entries: OrderedDict[bytes, V] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def get(self, key: bytes, count_miss: bool = True) -> V | None:
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self.misses += count_miss
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return found

    def put(self, key: bytes, value: V) -> None:
        """Keep ``value``, dropping the least recently used; one larger than the whole cache is not kept."""
        size = self._size(value)
        if size > self.max_bytes:
            return
        with self._lock:
            if (old := self._entries.pop(key, None)) is not None:
                self.bytes_held -= self._size(old)
            self._entries[key] = value
            self.bytes_held += size
            while self.bytes_held > self.max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self.bytes_held -= self._size(dropped)
                self.evictions += 1

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.bytes_held = 0


class PixelCache(ByteCache[Patches]):
    """Prepared pixels. While somebody prepares a key others may wait for it instead of preparing it too (``claim``)."""

    def __init__(self, max_bytes: int = 256 << 20) -> None:
        super().__init__(max_bytes, lambda patches: patches.pixels.nbytes)
        self._claims: dict[bytes, threading.Event] = {}

    def claim(self, key: bytes) -> threading.Event | None:
        """None: the caller is the one who prepares ``key``, and must ``release`` it. Else what to wait for before asking
        again."""
        with self._lock:
            if (event := self._claims.get(key)) is None:
                self._claims[key] = threading.Event()
            return event

    def release(self, key: bytes) -> None:
        """``key`` was prepared and put here, or its preparation failed."""
        with self._lock:
            event = self._claims.pop(key, None)
        if event is not None:
            event.set()


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
