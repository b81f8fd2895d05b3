"""What a caller holds of a request under way."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any

from mirada.engine.sequence import Listener, Sequence
from mirada.errors import ReplyTimeout
from mirada.types import Delta, Output


class EngineHandle:
    """Implements ``types.Handle``. The engine works on its own; nothing is lost if nobody reads.

    ``owner`` is what must live for the reply to come. A handle that is gone, with all its iterators, ends its request.
    """

    def __init__(self, sequence: Sequence, owner: Any = None) -> None:
        self._sequence = sequence
        self._owner = owner
        weakref.finalize(self, _cancel, sequence).atexit = False

    @property
    def done(self) -> bool:
        return self._sequence.done

    def __iter__(self) -> Iterator[Delta]:
        """Every delta from the first on; raises the typed error of a request that failed."""
        news = threading.Event()
        at = 0
        with self._listening(lambda done: news.set()):
            while True:
                news.clear()
                done = self._sequence.done  # read before the deltas: what is published before it is set is then seen below
                for delta in self._since(at):
                    at += 1
                    yield delta
                if done:
                    return
                news.wait()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """The same without blocking the event loop, and without a thread of its own."""
        news = asyncio.Event()
        at = 0
        with self._listening(_to(asyncio.get_running_loop(), news)):
            while True:
                news.clear()
                done = self._sequence.done
                for delta in self._since(at):
                    at += 1
                    yield delta
                if done:
                    return
                await news.wait()

    def __await__(self) -> Generator[Any, None, Output]:
        """``await handle`` is ``result`` without blocking the event loop."""
        return self._result().__await__()

    async def _result(self) -> Output:
        news = asyncio.Event()
        with self._listening(_to(asyncio.get_running_loop(), news, last=True)):
            if not self._sequence.done:
                await news.wait()
        return self._sequence.output()

    def result(self, timeout: float | None = None) -> Output:
        """The whole reply, or an Output that carries the error. Raises ReplyTimeout if it is not there after ``timeout``
        seconds; the request goes on."""
        news = threading.Event()
        with self._listening(lambda done: news.set() if done else None):
            if not self._sequence.done and not news.wait(timeout):
                raise ReplyTimeout(f"the reply is not there after {timeout} s", "wait longer, or cancel the request")
        return self._sequence.output()

    def cancel(self) -> None:
        """End it with the step under way; what is there stays readable, with finish ``cancelled``. Nothing happens to one
        that has ended."""
        _cancel(self._sequence)

    def when_done(self, call: Any) -> None:
        """Have ``call()`` called once when the request has ended, in the engine's thread or, if it has ended, in this one."""
        self._sequence.listen(_Once(call))

    def _since(self, at: int) -> Iterator[Delta]:
        for delta in self._sequence.deltas[at:]:
            if delta.finish == "error":
                assert self._sequence.error is not None
                raise self._sequence.error
            yield delta

    @contextlib.contextmanager
    def _listening(self, listener: Listener) -> Iterator[None]:
        self._sequence.listen(listener)
        try:
            yield
        finally:
            self._sequence.listeners.remove(listener)


class _Once:
    """A listener that calls on the first news that is the last."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._lock = threading.Lock()

    def __call__(self, done: bool) -> None:
        # ``listen`` and the engine's thread may both come with the same news.
        if done and self._lock.acquire(blocking=False):
            self._call()


def _cancel(sequence: Sequence) -> None:
    """A flag and no lock: the garbage collector may call this in any thread at any moment. While a sequence is not done the
    engine has something to do, so it looks at the flag before its next step."""
    sequence.cancelled = True
    if (stop := sequence.stop) is not None:
        stop()


def _to(loop: asyncio.AbstractEventLoop, event: asyncio.Event, last: bool = False) -> Listener:
    """A listener that sets ``event`` in its ``loop``."""

    def listener(done: bool) -> None:
        if done or not last:
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits there any more
                loop.call_soon_threadsafe(event.set)

    return listener
