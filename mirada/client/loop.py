"""The thread of a client: an event loop whose tasks end with the loop, and whose replies always end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import httpx

from mirada.client.handle import Growing
from mirada.errors import RequestFailed
from mirada.types import Delta

T = TypeVar("T")


class Loop:
    """An event loop in a thread of its own, which closes ``web`` when it ends. It knows no client: one can be forgotten."""

    def __init__(self, web: httpx.AsyncClient) -> None:
        self._loop = asyncio.new_event_loop()
        self._ended = False
        self._lock = threading.RLock()
        """Held while something is handed to the loop or ends it, so that nothing comes behind its end and is never begun. The
        garbage collector may call ``end`` anywhere, so it is one that may be taken again."""
        self._thread = threading.Thread(target=_run, args=(self._loop, web), name="mirada-client", daemon=True)
        self._thread.start()

    def start(self, work: Callable[[], Coroutine[Any, Any, None]], reply: Growing) -> None:
        """Have ``work()`` done; ``reply`` ends with it, whatever becomes of it. RequestFailed if the client is closed."""
        tasks: list[asyncio.Task[None]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(work()))
            tasks[0].add_done_callback(lambda task: _ended(task, reply))
            if reply.cancelled:
                tasks[0].cancel()

        def stop() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended all tasks
                self._loop.call_soon_threadsafe(lambda: tasks and tasks[0].cancel())

        reply.stop = stop
        with self._lock:
            ended = self._ended
            if not ended:
                self._loop.call_soon_threadsafe(begin)
        if ended:
            reply.fail(_closed())

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """What ``work`` returns, from any thread but the loop's own. RequestFailed if the client is closed, or is meanwhile."""
        with self._lock:
            coming = None if self._ended else asyncio.run_coroutine_threadsafe(work, self._loop)
        if coming is None:
            work.close()
            raise _closed()
        try:
            return coming.result()
        except concurrent.futures.CancelledError:
            raise _closed() from None

    def end(self) -> None:
        with self._lock:
            if not self._ended:
                self._ended = True
                self._loop.call_soon_threadsafe(self._loop.stop)
        if threading.current_thread() is not self._thread:  # the garbage collector may come along in any thread
            self._thread.join(10)


def _closed() -> RequestFailed:
    return RequestFailed("the client is closed", "make a new one")


def _run(loop: asyncio.AbstractEventLoop, web: httpx.AsyncClient) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(web.aclose())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()


def _ended(task: asyncio.Task[None], reply: Growing) -> None:
    if reply.done:
        return
    if task.cancelled():
        reply.publish(Delta(finish="cancelled"))
        return
    error = task.exception()
    reply.fail(RequestFailed(f"the request failed: {error!r}", "this is a defect; please report it"))
