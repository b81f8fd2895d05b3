"""What a caller holds of a request under way, whoever answers it: an engine, a server, a script or a log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from mirada.errors import MiradaError, ReplyTimeout
from mirada.types import Delta, Message, Output, Text, ToolCall, Usage, joined_calls

Listener = Callable[[bool], None]
"""Called by whoever makes a reply when it has news; the flag says that they were the last."""
_log = logging.getLogger(__name__)


class Reply(Protocol):
    """A reply that grows. Its maker appends to ``deltas`` and calls the listeners; it sets ``done`` last of all."""

    deltas: list[Delta]
    error: MiradaError | None
    cancelled: bool
    """Somebody wants it ended."""
    stop: Callable[[], None] | None
    """Called when it is cancelled; in any thread, also by the garbage collector."""
    done: bool
    usage: Usage
    """What is known of it so far."""
    listeners: list[Listener]

    def listen(self, listener: Listener) -> None:
        """Have ``listener`` called at every delta from now on; at once if there is none to come. Any thread may."""
        ...

    def output(self) -> Output: ...


class ReplyHandle:
    """Implements ``types.Handle``. The reply comes on its own; nothing is lost if nobody reads.

    ``owner`` is what must live for the reply to come. A handle that is gone, with all its iterators, ends its request.
    """

    def __init__(self, reply: Reply, owner: Any = None) -> None:
        self._reply = reply
        self._owner = owner
        # Not the reply itself: one that failed may hold its error, that the frames it passed, and those this handle, for ever.
        weakref.finalize(self, _let_go, weakref.ref(reply)).atexit = False

    def __repr__(self) -> str:
        reply, state = self._reply, "running"
        if reply.done:
            state = type(reply.error).__name__ if reply.error is not None else str(reply.deltas[-1].finish)
        return f"<ReplyHandle {state}, {sum(len(delta.tokens) for delta in tuple(reply.deltas))} tokens>"

    @property
    def done(self) -> bool:
        return self._reply.done

    @property
    def usage(self) -> Usage:
        """What the prompt uses, from when the first piece is there on; that of the answer is counted at its end."""
        return self._reply.usage

    def __iter__(self) -> Iterator[Delta]:
        """Every delta from the first on; raises the typed error of a request that failed."""
        news = threading.Event()
        at = 0
        with self._listening(lambda done: news.set()):
            while True:
                news.clear()
                done = self._reply.done  # read before the deltas: what is published before it is set is then seen below
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
                done = self._reply.done
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
            if not self._reply.done:
                await news.wait()
        return self._reply.output()

    def result(self, timeout: float | None = None) -> Output:
        """The whole reply, or an Output that carries the error. Raises ReplyTimeout if it is not there after ``timeout``
        seconds; the request goes on."""
        news = threading.Event()
        with self._listening(lambda done: news.set() if done else None):
            if not self._reply.done and not news.wait(timeout):
                raise ReplyTimeout(f"the reply is not there after {timeout} s", "wait longer, or cancel the request")
        return self._reply.output()

    def cancel(self) -> None:
        """End it as soon as may be; what is there stays readable, with finish ``cancelled``. Nothing happens to one
        that has ended."""
        _cancel(self._reply)

    def when_done(self, call: Any) -> None:
        """Have ``call()`` called once when the request has ended, in its maker's thread or, if it has ended, in this one."""
        self._reply.listen(_Once(call))

    def _since(self, at: int) -> Iterator[Delta]:
        for delta in self._reply.deltas[at:]:
            if delta.finish == "error":
                assert self._reply.error is not None
                raise self._reply.error
            yield delta

    @contextlib.contextmanager
    def _listening(self, listener: Listener) -> Iterator[None]:
        self._reply.listen(listener)
        try:
            yield
        finally:
            self._reply.listeners.remove(listener)


class _Once:
    """A listener that calls on the first news that is the last."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._lock = threading.Lock()

    def __call__(self, done: bool) -> None:
        # ``listen`` and the maker may both come with the same news.
        if done and self._lock.acquire(blocking=False):
            self._call()


def _let_go(reply: weakref.ref[Reply]) -> None:
    """End a reply that nobody will read; one that is gone has no maker either."""
    if (found := reply()) is not None:
        _cancel(found)


def _cancel(reply: Reply) -> None:
    """A flag and no lock: the garbage collector may call this in any thread at any moment. Whoever makes the reply looks at
    the flag before its next step, or is told by ``stop``."""
    reply.cancelled = True
    if (stop := reply.stop) is not None:
        stop()


def tell(listeners: Iterable[Listener], done: bool) -> None:
    """Call all ``listeners``, also where one of them fails: whoever waits behind it would wait for ever."""
    for listener in tuple(listeners):
        try:
            listener(done)
        except BaseException:  # of whoever listens, and no failure of the reply
            _log.exception("a call at the news of a reply failed")


def _to(loop: asyncio.AbstractEventLoop, event: asyncio.Event, last: bool = False) -> Listener:
    """A listener that sets ``event`` in its ``loop``."""

    def listener(done: bool) -> None:
        if done or not last:
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits there any more
                loop.call_soon_threadsafe(event.set)

    return listener


@dataclass(eq=False)
class Growing:
    """A ``Reply`` for those who make one elsewhere than in the engine; one thread alone publishes."""

    deltas: list[Delta] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    metrics: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    logprobs: bool = False
    """Whether they were asked for."""
    error: MiradaError | None = None
    cancelled: bool = False
    stop: Callable[[], None] | None = None
    done: bool = False
    listeners: list[Listener] = field(default_factory=list)

    def listen(self, listener: Listener) -> None:
        self.listeners.append(listener)
        if self.done:
            listener(True)

    def publish(self, delta: Delta) -> None:
        """One more piece; with a ``finish`` it is the last."""
        self.deltas.append(delta)
        if delta.finish is not None:
            self.stop = None
            self.done = True  # last: whoever sees it may read all the rest
        tell(self.listeners, self.done)

    def fail(self, error: MiradaError) -> None:
        self.error = error
        self.publish(Delta(finish="error"))

    def output(self) -> Output:
        """The whole reply: the fold of the deltas, with what was used; or the error."""
        if self.error is not None:
            return Output(finish="error", error=self.error, metrics=dict(self.metrics), notes=self.notes)
        raw = "".join(delta.text for delta in self.deltas)
        made = fold(self.deltas, usage=self.usage, metrics=dict(self.metrics), raw=raw, logprobs=self.logprobs)
        return replace(made, notes=made.notes or self.notes)


def join(deltas: Iterable[Delta]) -> Delta:
    """Several pieces as one."""
    deltas = list(deltas)
    return Delta(
        text="".join(d.text for d in deltas),
        reasoning="".join(d.reasoning for d in deltas),
        tokens=tuple(token for d in deltas for token in d.tokens),
        logprobs=tuple(logprob for d in deltas for logprob in d.logprobs),
        tool_calls=joined_calls(call for d in deltas for call in d.tool_calls),
        finish=next((d.finish for d in reversed(deltas) if d.finish), None),
        annotations=tuple(annotation for d in deltas for annotation in d.annotations),
        stop_reason=next((d.stop_reason for d in reversed(deltas) if d.stop_reason is not None), None),
        notes=tuple(note for d in deltas for note in d.notes),
    )


def fold(
    deltas: Iterable[Delta],
    *,
    usage: Usage | None = None,
    metrics: dict[str, float] | None = None,
    raw: str = "",
    logprobs: bool = False,
) -> Output:
    """A stream as a whole reply."""
    whole = join(deltas)
    parts: list[Text | ToolCall] = [Text(whole.text)] if whole.text else []
    return Output(
        message=Message("assistant", [*parts, *whole.tool_calls], reasoning=whole.reasoning),
        tokens=whole.tokens,
        logprobs=whole.logprobs if logprobs else None,
        finish=whole.finish or "stop",
        usage=usage or Usage(),
        metrics=metrics or {},
        raw=raw,
        notes=whole.notes,
        annotations=whole.annotations,
        stop_reason=whole.stop_reason,
    )
