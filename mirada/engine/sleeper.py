"""How a front door (``llm.VLM``) is put to sleep, and woken."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirada.engine.adapters import Adapters
from mirada.engine.sleep import Away, Offloaded, check_level, give_back
from mirada.errors import NotAvailable, ReplyTimeout

if TYPE_CHECKING:
    from mirada.engine.load import Parts
    from mirada.engine.thread import State


class Sleeper:
    """``sleep`` and ``wake`` of a VLM, whose attributes these are."""

    parts: Parts
    _read: Callable[[], Parts] | None
    _bed: threading.RLock
    _asleep: int
    _offloaded: Offloaded | None
    _earlier: dict[str, int]
    _counting: threading.RLock
    _adapters: Adapters | None
    _adapter_paths: dict[str, str | Path]
    _engine: Any
    _pool: Any
    _requests: Any
    _weights: Any
    _features: Any
    _prefix: Any
    _make_engine: Callable[[], Any]
    _keep_room: Callable[[], None]
    _engine_counts: Callable[[], dict[str, int]]

    @property
    def asleep(self) -> int:
        """0: awake. Else the level at which it was put to sleep."""
        return self._asleep

    def state(self, stall_seconds: float = 300.0) -> State:
        """``ready``, or why requests that come now would have no answer: ``asleep``, ``stalled`` (a step has taken longer than
        ``stall_seconds``), ``died`` (the engine's thread) or ``closed``. Any thread may ask, and nobody is waited for."""
        return self._engine.state(stall_seconds)

    def sleep(self, level: int = 1, timeout: float | None = None) -> None:
        """Give back memory until ``wake``: at level 1 keys and values, all caches and media workers, and what a GPU holds of
        the weights, which wait in the host's memory; at level 2 the weights too. Requests that were taken before are answered
        first; those that come from now on fail with EngineAsleep. Nothing happens at a level that it sleeps at already.

        Raises ReplyTimeout if what was taken is not answered within ``timeout`` seconds: it is awake then as before.
        SettingsError for another level, NotAvailable at level 2 for a model that was made in memory, and where several
        processes share the model; OutOfMemory if the host has no room for the weights of a GPU.
        """
        check_level(level)
        if self.parts.group is not None:
            raise NotAvailable("a model that several processes share cannot sleep", "close it, or leave tensor_parallel out")
        if level == 2 and self._read is None:
            raise NotAvailable("a model that was made in memory cannot be read again", "let it sleep at level 1")
        with self._bed:
            if not self._asleep:
                self._engine.refuse(True)
                try:
                    self._lie_down(level, timeout)
                except BaseException:
                    self._engine.refuse(False)
                    raise
            if level == 2 and self._asleep != 2:
                self._drop_weights()
            self._asleep = max(level, self._asleep)
            give_back()

    def _lie_down(self, level: int, timeout: float | None) -> None:
        """Wait until nothing is under way, then let go of all but the weights."""
        if not self._engine.wait_idle(timeout):
            raise ReplyTimeout(f"requests are still under way after {timeout} s", "wait longer, or cancel them")
        self._offloaded = Offloaded(self.parts.model) if level == 1 else None
        with self._counting:
            self._earlier = self._engine_counts()
            self._engine.replace(None)
        self._forget_caches()
        assert self._requests.cache is not None
        self._requests.cache.clear()
        self._pool.rest()

    def _forget_caches(self) -> None:
        self._weights = self._features = self._prefix = None

    def _drop_weights(self) -> None:
        away = Away(self.parts.model.config)
        self.parts = self._requests.parts = replace(self.parts, model=away)
        self._adapters = None
        self._offloaded = None

    def wake(self) -> None:
        """Take requests again, as before ``sleep``; at level 2 the checkpoint is read again, and adapters from their
        directories. Nothing happens to one that is awake. Raises what opening a model or an adapter does: it goes on sleeping
        then, and an adapter whose directory is gone can be unloaded before the next try."""
        with self._bed:
            if not self._asleep:
                return
            if self._asleep == 2:
                assert self._read is not None
                self._take_up(self._read())
            elif self._offloaded is not None:
                self._offloaded.back()
            try:
                engine = self._make_engine()
            except BaseException:
                self._forget_caches()
                if self._asleep == 2:  # another try reads them again
                    self._drop_weights()
                raise
            self._engine.replace(engine)
            self._keep_room()
            self._asleep, self._offloaded = 0, None
            self._engine.refuse(False)

    def _take_up(self, fresh: Parts) -> None:
        """Weights that were read again, in the place of those that went; what else belongs to the model was kept."""
        adapters = Adapters(fresh.model)
        for name, path in self._adapter_paths.items():
            adapters.load(name, path)
        self._adapters = adapters
        self.parts = self._requests.parts = replace(self.parts, model=fresh.model, placement=fresh.placement)
