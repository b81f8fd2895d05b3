"""Replies under way: several choices as one stream, the end of a client noticed, pieces sent as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mirada.errors import RequestFailed
from mirada.serve.errors import ClientGone
from mirada.types import Delta, Output, Usage

T = TypeVar("T")
ROOM = 64
"""Pieces that may wait to be sent."""
QUIET = 15.0
"""Seconds of silence after which a comment is sent, so that proxies and clients know that somebody is there."""
BEAT = b": still at work\n\n"


class Running(Protocol):
    """What is needed of ``engine.handle.EngineHandle``."""

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    def __await__(self) -> Any: ...

    def cancel(self) -> None: ...

    @property
    def usage(self) -> Usage: ...


class Choices:
    """The handles of one request, read together. ``end`` frees what has not ended; it must be called."""

    def __init__(self, handles: Sequence[Running]) -> None:
        self.handles = handles
        self._news: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue(ROOM)
        self._pumps: list[asyncio.Task[None]] = []
        self._open = len(handles)

    @property
    def usage(self) -> Usage:
        """What the prompt uses, from when the first piece is there on."""
        return self.handles[0].usage

    async def outputs(self) -> list[Output]:
        """All whole replies. Raises the error of the first that failed, and ends the others."""
        tasks = [asyncio.create_task(_whole(handle)) for handle in self.handles]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            self.end()
            raise
        finally:
            for task in tasks:
                task.cancel()

    def begin(self) -> None:
        """Read them piece by piece from now on."""
        self._pumps = [asyncio.create_task(self._pump(index, handle)) for index, handle in enumerate(self.handles)]

    async def next(self) -> tuple[int, Delta] | None:
        """(choice, piece), or None after the last. Raises what a choice does, MiradaError above all. Nothing is lost where its
        caller gives up waiting."""
        while self._open:
            index, news = await self._news.get()
            if isinstance(news, Exception):
                raise news
            if news is not None:
                return index, news
            self._open -= 1
        return None

    def ready(self) -> bool:
        """Whether ``next`` has an answer at once."""
        return not self._news.empty()

    async def _pump(self, index: int, handle: Running) -> None:
        try:
            async for delta in handle:
                if delta.finish == "cancelled":
                    raise _ended()
                await self._news.put((index, delta))
            await self._news.put((index, None))
        except Exception as error:  # a defect too: who reads would wait for ever
            await self._news.put((index, error))

    def end(self) -> None:
        for handle in self.handles:
            handle.cancel()
        for pump in self._pumps:
            pump.cancel()


async def _whole(handle: Running) -> Output:
    output: Output = await handle
    if output.error is not None:
        raise output.error
    if output.finish == "cancelled":
        raise _ended()
    return output


def _ended() -> RequestFailed:
    return RequestFailed("the request was ended before its answer was whole", "send it again")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``; ClientGone as soon as the client has closed its connection, with ``work`` cancelled."""
    doing = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((doing, watching), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGone
        return doing.result()
    finally:
        for task in (doing, watching):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """A reply of server-sent events. ``events`` makes the bytes of one event after the other; ``end`` is called whatever
    happens. Starlette's own would wait without bound for a client that does not read."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], end: Callable[[], None], headers: dict[str, str], send_seconds: float
    ) -> None:
        super().__init__(events, headers={"X-Accel-Buffering": "no", **headers}, media_type="text/event-stream")
        self._events, self._end, self._seconds = events, end, send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._run(send))
        finally:
            self._end()
            await self._events.aclose()

    async def _run(self, send: Send) -> None:
        await self._send(send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}))
        async for event in self._events:
            await self._send(send({"type": "http.response.body", "body": event, "more_body": True}))
        await self._send(send({"type": "http.response.body", "body": b"", "more_body": False}))

    async def _send(self, sending: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await sending
        except (TimeoutError, OSError):  # it does not read, or it has gone
            raise ClientGone from None


async def beating(choices: Choices, quiet: float = QUIET) -> AsyncGenerator[tuple[int, Delta] | None, None]:
    """What ``choices`` say until their end, and None after every ``quiet`` seconds of silence."""
    waiting = asyncio.ensure_future(choices.next())
    try:
        while True:
            done, _ = await asyncio.wait((waiting,), timeout=quiet)
            if not done:
                yield None
                continue
            news = waiting.result()
            if news is None:
                return
            yield news
            waiting = asyncio.ensure_future(choices.next())
    finally:
        waiting.cancel()


class Silence:
    """What is sent of a stream, with a comment where nothing was for ``quiet`` seconds: pieces may hold nothing to show, such
    as reasoning that is not told."""

    def __init__(self, quiet: float = QUIET) -> None:
        self._quiet, self._last = quiet, time.perf_counter()

    def broken(self, said: bytes) -> bytes:
        """``said``, or what is to be sent in its place."""
        now = time.perf_counter()
        if not said and now - self._last >= self._quiet:
            said = BEAT
        if said:
            self._last = now
        return said


class Pace:
    """Seconds from one piece of each choice to the next."""

    def __init__(self, note: Callable[[float], None]) -> None:
        self._note = note
        self._last: dict[int, float] = {}

    def piece(self, index: int) -> None:
        now = time.perf_counter()
        if index in self._last:
            self._note(now - self._last[index])
        self._last[index] = now
