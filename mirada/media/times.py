"""Seconds per stage of work, by name; what an inner stage takes does not count for the outer one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
_END = object()


class Times(dict[str, float]):
    """Of one thread: ``with times.stage("decode"): ...``. Media prepared by processes side by side add their own sums."""

    def __init__(self) -> None:
        super().__init__()
        self._inner = [0.0]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.add(name, spent - self._inner.pop())
            self._inner[-1] += spent

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """``items``, with the time that each takes to come."""
        iterator = iter(items)
        while True:
            with self.stage(name):
                item = next(iterator, _END)
            if item is _END:
                return
            yield item  # type: ignore[misc]

    def add(self, name: str, seconds: float) -> None:
        self[name] = self.get(name, 0.0) + seconds
