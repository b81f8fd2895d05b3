"""The one thread that owns an engine, and what other threads may ask of it: to take a request, and to stop."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections import deque
from typing import Literal

import torch

from mirada.engine import memory
from mirada.engine.sequence import Sequence
from mirada.engine.sleep import asleep
from mirada.engine.step import Engine
from mirada.errors import MiradaError, NotAvailable, QueueFull, RequestFailed

State = Literal["ready", "asleep", "stalled", "died", "closed"]
_log = logging.getLogger(__name__)
PATIENCE = 30.0
"""Seconds that a step under way may take to end when the interpreter exits."""
TRIM = 10.0
"""Seconds of work after which memory that nobody uses is given back: some milliseconds each time."""
QUIET = 1.0
"""Seconds without work after which the same is done once."""


class EngineThread:
    """Gives ``engine`` a thread, begun by the first request. It lives until ``close``, or until this object and all handles
    that hold it are gone; it never keeps the interpreter alive. Every method may be called from any thread."""

    def __init__(self, engine: Engine) -> None:
        self._line = _Line(engine, engine.settings.max_waiting)
        weakref.finalize(self, self._line.stop).atexit = False

    @property
    def engine(self) -> Engine:
        """Raises EngineAsleep while there is none."""
        if self._line.engine is None:
            raise asleep()
        return self._line.engine

    @property
    def line(self) -> _Line:
        """Where others put requests: it refers to no ``EngineThread``."""
        return self._line

    def submit(self, sequence: Sequence) -> None:
        """Put a request in line; it fails with a typed error if that cannot be."""
        self._line.submit(sequence)

    def announce(self, sequence: Sequence) -> bool:
        """Keep a place for a request that is still prepared, which ``line.submit(.., announced=True)`` or ``line.retract``
        takes. False: it cannot be, and has failed."""
        return self._line.announce(sequence)

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Wait until no request is left; False if that takes longer than ``timeout`` seconds."""
        return self._line.wait_idle(timeout)

    def refuse(self, refusing: bool) -> None:
        """From now on requests that come fail with EngineAsleep, or no longer do. What was taken or announced goes on."""
        self._line.refusing = refusing

    def replace(self, engine: Engine | None) -> None:
        """Put ``engine`` in the place of the one that is there; None: none, until the next. While it refuses and is idle."""
        self._line.replace(engine)

    def state(self, stall_seconds: float) -> State:
        """Whether requests that come now would be answered; ``stalled``: the step under way takes longer than
        ``stall_seconds``. It waits for nobody."""
        return self._line.state(stall_seconds)

    def close(self) -> None:
        """End all requests with RequestFailed, and the thread. Waits for the step under way."""
        self._line.stop()
        self._line.join(None)

    def stats(self) -> dict[str, int]:
        """See ``Engine.stats``; nothing while there is no engine."""
        engine = self._line.engine
        return {} if engine is None else engine.stats() | {"waiting": self._line.num_waiting}


class _Line:
    """What the thread shares with others. It refers to no ``EngineThread``, so that one can be collected."""

    def __init__(self, engine: Engine, most: int) -> None:
        self.engine: Engine | None = engine
        self.most = most
        self.refusing = False
        self._pid = os.getpid()
        self._fresh: deque[Sequence] = deque()
        lock = threading.RLock()
        self._news, self._resting = threading.Condition(lock), threading.Condition(lock)
        self._thread: threading.Thread | None = None
        self._busy = self._stopped = self._died = False
        self._announced = 0
        self._step_began: float | None = None
        """Of the step under way, by time.monotonic."""

    def state(self, stall_seconds: float) -> State:
        thread, began = self._thread, self._step_began
        if self._stopped:
            return "closed"
        if self._died or (thread is not None and not self._forked() and not thread.is_alive()):
            return "died"
        if self.refusing:
            return "asleep"
        return "stalled" if began is not None and time.monotonic() - began > stall_seconds else "ready"

    @property
    def num_waiting(self) -> int:
        engine = self.engine
        return len(self._fresh) + (len(engine.scheduler.waiting) if engine is not None else 0) + self._announced

    @property
    def _idle(self) -> bool:
        return self.engine is None or self.engine.idle

    def replace(self, engine: Engine | None) -> None:
        with self._news:
            assert self.refusing and self._idle and not self._fresh and not self._announced
            self.engine = engine

    def announce(self, sequence: Sequence) -> bool:
        if self._fails_forked(sequence):
            return False
        with self._news:
            error = self._refusal() or self._start()
            if error is None:
                self._announced += 1
        if error is not None:
            sequence.fail(error)
        return error is None

    def retract(self) -> None:
        with self._news:
            self._announced -= 1
            self._resting.notify_all()

    def _fails_forked(self, sequence: Sequence) -> bool:
        if self._forked():  # the lock may have been copied while it was held
            sequence.fail(
                NotAvailable(
                    "this engine has its thread in the process that this one was forked from",
                    "open the model in the process that uses it, or start processes with 'spawn'",
                )
            )
            return True
        return False

    def submit(self, sequence: Sequence, announced: bool = False) -> None:
        if self._fails_forked(sequence):
            return
        with self._news:
            self._announced -= announced
            error = self._refusal(announced) or self._start()
            if error is None:
                sequence.queued = time.perf_counter()
                self._fresh.append(sequence)
                self._news.notify()
        if error is not None:
            sequence.fail(error)

    def _refusal(self, announced: bool = False) -> MiradaError | None:
        """Why a request is not taken. One that was announced has its place, whoever was put back in line meanwhile."""
        if self._stopped:
            return RequestFailed("the engine is closed", "open the model again")
        if self._died:
            return RequestFailed("the engine's thread has died, and its log says of what", "open the model again")
        if announced:
            return None
        if self.refusing:
            return asleep()
        if self.num_waiting >= self.most:
            return QueueFull(
                f"{self.num_waiting} requests are waiting",
                "send it again later, or raise the engine's max_waiting",
                needed=self.num_waiting + 1,
                available=self.most,
                unit="requests",
            )
        return None

    def _forked(self) -> bool:
        """Whether this process has a copy of the state, and the thread stayed behind."""
        return self._thread is not None and os.getpid() != self._pid

    def _start(self) -> MiradaError | None:
        """Begin the thread, if there is none yet; why that cannot be."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="mirada-engine", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the next request tries again
                return RequestFailed(f"the engine's thread cannot begin ({error})", "end other threads, or raise their limit")
            self._pid, self._thread = os.getpid(), thread
            _RUNNING.add(self)
        return None

    def stop(self) -> None:
        """Have the thread end after the step under way. It may be called by the garbage collector, so it takes no lock that
        its own thread could hold half-way: the condition's is one that may be taken again."""
        self._stopped = True
        if self._thread is not None and not self._forked():
            with self._news:
                self._news.notify_all()

    def join(self, timeout: float | None) -> None:
        if self._thread is not None and not self._forked() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def wait_idle(self, timeout: float | None) -> bool:
        if self._thread is None or self._forked():
            return True
        with self._news:
            return self._resting.wait_for(lambda: not self._busy and not self._fresh and not self._announced, timeout)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # outside of every step: those who wait would wait for ever
            self._died = True
            _log.critical("the thread of an engine died", exc_info=error)
        self._end()

    def _work(self) -> None:
        trimmed, worked = time.monotonic(), False
        with torch.inference_mode():
            while self._take(QUIET if worked else None):
                worked = not self._idle
                if worked:
                    self._step()
                if not worked or time.monotonic() - trimmed > TRIM:
                    memory.trim()
                    trimmed = time.monotonic()

    def _step(self) -> None:
        assert self.engine is not None
        self._step_began = time.monotonic()
        try:
            self.engine.step()
        except BaseException as error:  # there is nobody above to tell; the requests are told
            self.engine.fail(error)
        finally:
            self._step_began = None

    def _take(self, patience: float | None) -> bool:
        """Wait for something to do, for ``patience`` seconds at most, and move new requests into the engine's line; False when
        the thread is to end."""
        with self._news:
            while not self._stopped and not self._fresh and self._idle:
                self._busy = False
                self._resting.notify_all()
                if not self._news.wait(patience):
                    return not self._stopped
            self._busy = True
            while self._fresh and self.engine is not None:
                self.engine.scheduler.enter(self._fresh[0])
                self._fresh.popleft()  # now it is known there: should that fail, it is not lost
            return not self._stopped

    def _end(self) -> None:
        how = "the thread of the engine died" if self._died else "the engine was closed"
        error = RequestFailed(how, "open the model again")
        try:
            with self._news:  # whoever comes later is refused
                left = [self._fresh.popleft() for _ in range(len(self._fresh))]
            for sequence in left:
                if not sequence.done:
                    sequence.fail(error)
            if self.engine is not None:
                self.engine.close(error)
        finally:
            with self._news:
                self._busy = False
                self._resting.notify_all()


_RUNNING: weakref.WeakSet[_Line] = weakref.WeakSet()


def _stop_all() -> None:
    """Threads that are inside torch while the interpreter is taken down crash it."""
    lines = list(_RUNNING)
    for line in lines:
        line.stop()
    for line in lines:
        line.join(PATIENCE)


atexit.register(_stop_all)
