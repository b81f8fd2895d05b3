"""Makes requests with media ready in threads of their own, so that nobody who submits one waits for a fetch or a decoder.

A sequence under preparation belongs to this module; the engine's thread gets it whole, and it takes its place in the line by
when it arrived. How many bytes of prepared pixels there may be at once is bounded: a request is begun when there is room for
the most that it can become.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from mirada.engine.sequence import Sequence
from mirada.errors import MiradaError, OutOfMemory, RequestFailed
from mirada.media.fetch import is_remote
from mirada.media.pool import Cancel, Pool
from mirada.media.rule import MediaRule
from mirada.types import Image, Video

THREADS = 8
"""Requests that are prepared at a time; most of it is waiting for the pool or for code that lets go of the interpreter."""
FETCHING = 32
"""Further ones, of those whose media are fetched from other machines: these may keep a thread waiting for as long as a fetch
may take, and must not hold up the rest."""
USUAL_PIXELS = 1 << 21
"""Of a resized picture, at most."""

_log = logging.getLogger(__name__)
Work = Callable[[Cancel], None]
"""Prepares one sequence, in place. Raises MiradaError."""


class Line(Protocol):
    """What preparation needs of the engine's line (``engine.thread``)."""

    def submit(self, sequence: Sequence, announced: bool = False) -> None: ...

    def retract(self) -> None: ...


@dataclass(eq=False)
class _Item:
    sequence: Sequence
    work: Work
    most: int
    """Bytes of pixels that it is expected to become."""
    remote: bool
    """Whether it waits for other machines."""
    cancel: Cancel = field(default_factory=Cancel)


class Preparing:
    """Threads that prepare sequences and hand them to ``line``; ``max_bytes`` bounds the pixels of all that are under way.

    Safe to use from several threads. Its threads end with ``close`` or when it is gone.
    """

    def __init__(self, line: Line, pool: Pool, max_bytes: int) -> None:
        self.pool = pool
        self._state = _State(line, max_bytes)
        weakref.finalize(self, self._state.close).atexit = True

    def submit(self, sequence: Sequence, work: Work, most: int, remote: bool = False) -> None:
        """Have ``work`` make ``sequence`` ready, which the line was told to expect; it becomes about ``most`` bytes.
        ``remote``: it fetches from other machines."""
        sequence.stop = _Stop(self._state.cancels, partial(self._state.end_cancelled, weakref.ref(sequence)))
        self._state.enter(_Item(sequence, work, most, remote))

    def watch(self, sequence: Sequence, end: Callable[[], None]) -> None:
        """Have ``end`` called, in a thread of this one's, if ``sequence`` is cancelled while its ``stop`` is what this sets."""
        self._state.watch()
        sequence.stop = _Stop(self._state.cancels, end)

    @property
    def bytes_held(self) -> int:
        """Prepared pixels of requests under way, and what those under preparation are expected to become."""
        return self._state.held

    @property
    def num_waiting(self) -> int:
        """Requests that are prepared or wait for it."""
        return sum(map(len, self._state.lines)) + len(self._state.running)

    def close(self) -> None:
        """Fail what is not ready, and end the workers."""
        self._state.close()
        self.pool.close()


@dataclass(eq=False)
class _Stop:
    """Tells the thread that watches that a sequence was cancelled. It takes no lock: the garbage collector may call it
    anywhere."""

    cancels: queue.SimpleQueue[Callable[[], None] | None]
    end: Callable[[], None]

    def __call__(self) -> None:
        self.cancels.put(self.end)


class _State:
    """What the threads share; it does not refer to ``Preparing``, so that can be let go."""

    def __init__(self, line: Line, max_bytes: int) -> None:
        self.line, self.max_bytes = line, max_bytes
        self.changed = threading.Condition(threading.RLock())
        self.lines: tuple[deque[_Item], deque[_Item]] = (deque(), deque())
        """What waits: with media that are here, and with remote ones."""
        self.running: set[_Item] = set()
        self.threads: list[threading.Thread] = []
        self.cancels: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.held = 0
        self.idle = 0
        self.closed = False
        self._pid = os.getpid()
        """Of the process that its threads belong to."""

    def enter(self, item: _Item) -> None:
        with self.changed:
            error = _closed() if self.closed else None
            if error is None:
                self.lines[item.remote].append(item)
                error = self._staff()
                if error is not None:
                    self.lines[item.remote].remove(item)
                self.changed.notify_all()
        if error is not None:
            self._end(item, error)

    def _staff(self) -> RequestFailed | None:
        """Begin the threads that what waits is worth; the error where there are none and none can begin."""
        try:
            self.watch()
            if self.idle < sum(map(len, self.lines)) and len(self.threads) <= self._num_useful():
                self._start(self._work, "mirada-prepare")
        except RuntimeError as error:
            if len(self.threads) < 2:  # else those that are there come to it
                return RequestFailed(
                    f"no thread can begin that prepares media ({error})", "end other threads, or raise their limit"
                )
        return None

    def _num_useful(self) -> int:
        """Threads that could be at work, beside the one that watches."""
        remote = sum(item.remote for item in self.running) + len(self.lines[True])
        local = sum(not item.remote for item in self.running) + len(self.lines[False])
        return min(THREADS, local) + min(FETCHING, remote)

    def _start(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        self.threads.append(thread)
        self._pid = os.getpid()

    def _work(self) -> None:
        while (item := self._next()) is not None:
            self._prepare(item)
            with self.changed:
                self.running.discard(item)
                self.changed.notify_all()
            del item  # its pixels would live until the next one comes

    def _next(self) -> _Item | None:
        """The first in line, once there is room for it; room is made when others end."""
        with self.changed:
            self.idle += 1
            while not self.closed and (item := self._pick()) is None:
                self.changed.wait()
            self.idle -= 1
            if self.closed:
                return None
            assert item is not None
            self.lines[item.remote].popleft()
            self.running.add(item)
            self.held += item.most
            return item

    def _pick(self) -> _Item | None:
        """Of the heads of both lines the older one, where its kind may have one more under way. Nobody passes one that waits
        for memory alone, else large ones would never come."""
        heads = [line[0] for line in self.lines if line]
        first = min(filter(self._may, heads), key=lambda item: item.sequence.born, default=None)
        return first if first is not None and (not self.held or self.held + first.most <= self.max_bytes) else None

    def _may(self, item: _Item) -> bool:
        """What waits for other machines takes half of the room at most (one may be larger), so that it keeps out nothing."""
        others = [one.most for one in self.running if one.remote == item.remote]
        if not item.remote:
            return len(others) < THREADS
        return len(others) < FETCHING and (not others or sum(others) + item.most <= self.max_bytes // 2)

    def _prepare(self, item: _Item) -> None:
        sequence = item.sequence
        sequence.spent("queue", time.perf_counter() - sequence.born)
        error: MiradaError | None = None
        try:
            item.work(item.cancel)
        except MiradaError as failure:
            error = failure
        except MemoryError:
            error = OutOfMemory(
                "memory ran out while media were prepared", "lower max_pixels (or fps for a video)", unit="bytes"
            )
        except BaseException as failure:
            error = RequestFailed(f"preparing the request failed: {failure!r}", "this is a defect, please report it")
            _log.exception("preparing a request failed")
        size = sum(patches.pixels.nbytes for patches in sequence.media)
        self._let_go(item.most - size)
        if error is None and not sequence.cancelled and not self.closed:
            sequence.listen(_Release(self, size))
            sequence.stop = None
            self.line.submit(sequence, announced=True)
        else:
            self._let_go(size)
            self._end(item, _closed() if self.closed else error)

    def _end(self, item: _Item, error: MiradaError | None) -> None:
        """It will not come to the engine."""
        self.line.retract()
        if item.sequence.cancelled or error is None:
            item.sequence.cancel()
        else:
            item.sequence.fail(_without_frames(error))

    def _let_go(self, size: int) -> None:
        with self.changed:
            self.held -= size
            self.changed.notify_all()

    def watch(self) -> None:
        """Have a thread that ends what is cancelled."""
        with self.changed:
            if not self.threads and not self.closed:
                self._start(self._watch, "mirada-cancel")

    def _watch(self) -> None:
        while (end := self.cancels.get()) is not None:
            try:
                end()
            except Exception:
                _log.exception("a request that was cancelled could not be ended early")
            del end

    def end_cancelled(self, cancelled: weakref.ref[Sequence]) -> None:
        """In line at once, under preparation as soon as its worker is ended or its fetch is through."""
        if (sequence := cancelled()) is None:
            return
        with self.changed:
            waiting = next((item for line in self.lines for item in line if item.sequence is sequence), None)
            if waiting is not None:
                self.lines[waiting.remote].remove(waiting)
                self.changed.notify_all()
            under_way = [item for item in self.running if item.sequence is sequence]
        if waiting is not None:
            self._end(waiting, None)
        for item in under_way:
            item.cancel.now()

    def close(self) -> None:
        if self.threads and os.getpid() != self._pid:
            return  # a fork's copy: its lock may be held for ever, and what is in line is its parent's
        with self.changed:
            self.closed = True
            dropped, under_way = [item for line in self.lines for item in line], list(self.running)
            for line in self.lines:
                line.clear()
            self.changed.notify_all()
        self.cancels.put(None)
        for item in dropped:
            self._end(item, _closed())
        for item in under_way:
            item.cancel.now()


class _Release:
    """A listener that gives the bytes of a sequence back when it has ended."""

    def __init__(self, state: _State, size: int) -> None:
        self._state, self._size, self._lock = state, size, threading.Lock()

    def __call__(self, done: bool) -> None:
        if done and self._lock.acquire(blocking=False):
            self._state._let_go(self._size)


def _without_frames(error: MiradaError) -> MiradaError:
    """``error``, its causes too: their frames would keep pixels and engines alive for as long as somebody holds the reply."""
    found: BaseException | None = error
    seen: list[BaseException] = []  # one may be its own cause
    while found is not None and found not in seen:
        seen.append(found)
        found.__traceback__ = None
        found = found.__cause__ or found.__context__
    return error


def _closed() -> RequestFailed:
    return RequestFailed("the engine was closed", "open the model again")


def are_remote(wanted: Seq[Image | Video]) -> bool:
    """Whether any of these media lies on another machine."""
    sources = [
        source for part in wanted for source in (part.source if isinstance(part.source, list | tuple) else [part.source])
    ]
    return any(map(is_remote, sources))


def most_bytes(wanted: Seq[Image | Video], rule: MediaRule) -> int:
    """Bytes of pixels that media are expected to become: pictures by their bounds, but no more than large ones usually have,
    videos by their budget. What they have become is counted exactly."""
    grid, total = rule.grid, 0
    for part in wanted:
        if isinstance(part, Image):
            asked = part.max_pixels if isinstance(part.max_pixels, int) else USUAL_PIXELS
            total += 3 * grid.frames * min(grid.max_pixels, asked, USUAL_PIXELS)
        else:
            asked = part.total_pixels if isinstance(part.total_pixels, int) else 0
            total += 3 * max(rule.total_pixels, asked)
    return total
