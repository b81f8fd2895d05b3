"""Processes that prepare large pictures and videos, so that a decoder that crashes, hangs or is slow harms one request alone.

Each worker is a fresh interpreter (nothing of the caller's program runs in it) that loads this room and no more, driven by a
thread of its own here. Descriptions go to and fro as JSON, never as pickles, for a decoder that was taken over must not be
able to run code here. Pixels come back as a file in memory that never has a name: it ends with the last process that holds it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mirada import config, errors
from mirada.errors import MediaTimeout, MiradaError, RequestFailed
from mirada.media import wire
from mirada.media.grid import Patches
from mirada.media.limits import FetchLimits
from mirada.media.rule import MediaRule
from mirada.types import Image, Video

PICTURE_SECONDS = 60.0
"""For decoding and resizing one picture; videos have ``FetchLimits.decode_seconds``."""
GRACE = 5.0
"""Seconds beyond the limit that a worker keeps by itself, before it is ended from here."""
START_SECONDS = 60.0
"""For a worker to start and load what it needs."""
ENDED = RequestFailed("the request was cancelled while its media were prepared", "send it again")

_BOOT = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); import json; sys.path[:] = json.loads(sys.argv[1]);"
    " from mirada.media.worker import main; main(int(sys.argv[2]))"
)


def default_workers() -> int:
    """One core stays with the engine; more than four only take memory."""
    return min(_cores() - 1, 4)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(eq=False)
class Job:
    """One picture or video on its way through a worker."""

    name: str
    """How messages call the medium."""
    head: dict[str, Any]
    body: bytes
    seconds: float
    state: _State
    patches: Patches | None = None
    times: dict[str, float] = field(default_factory=dict)
    error: MiradaError | None = None
    process: subprocess.Popen[bytes] | None = None
    """The worker that is at it."""
    tried: bool = False
    """A worker died over it."""
    done: threading.Event = field(default_factory=threading.Event)

    def result(self) -> Patches:
        """Waits for the patches, or raises why there are none."""
        self.done.wait()
        if self.error is not None:
            raise self.error
        assert self.patches is not None
        return self.patches

    def cancel(self) -> None:
        """Drop it from the line, or end the worker that is at it. Nothing happens to one that is done."""
        with self.state.changed:
            if self.done.is_set():
                return
            self.finish(error=RequestFailed(ENDED.problem, ENDED.fix))
            if self.process is not None:
                self.process.kill()
            elif self in self.state.line:
                self.state.line.remove(self)

    def finish(self, patches: Patches | None = None, error: MiradaError | None = None) -> None:
        """The first outcome counts."""
        with self.state.changed:
            if not self.done.is_set():
                self.patches, self.error = patches, error
                self.body = b""
                self.done.set()


class Cancel:
    """Ends all jobs of one request, those that come later too."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._lock = threading.Lock()
        self.wanted = False

    def add(self, job: Job) -> None:
        with self._lock:
            self._jobs.append(job)
            late = self.wanted
        if late:
            job.cancel()

    def now(self) -> None:
        with self._lock:
            self.wanted, jobs = True, list(self._jobs)
        for job in jobs:
            job.cancel()

    def check(self) -> None:
        """Raises RequestFailed if it is wanted."""
        if self.wanted:
            raise RequestFailed(ENDED.problem, ENDED.fix)


@dataclass(eq=False)
class _State:
    """What the pool and the threads of its workers share; the pool itself can so be let go while they wait."""

    changed: threading.Condition = field(default_factory=lambda: threading.Condition(threading.RLock()))
    line: deque[Job] = field(default_factory=deque)
    lanes: list[threading.Thread] = field(default_factory=list)
    processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    idle: int = 0
    num_lost: int = 0
    num_retried: int = 0
    resting: bool = False
    """Threads end when there is no work; others take their place when there is."""
    closed: bool = False

    def stop(self) -> None:
        """Have all end soon. It waits for nobody: the garbage collector may call it in a thread that holds ``changed``, which
        those that it would wait for need."""
        with self.changed:
            self.closed = True
            while self.line:
                self.line.popleft().finish(error=RequestFailed("the engine was closed", "open it again"))
            for process in self.processes:
                process.kill()
            self.changed.notify_all()

    def join(self) -> None:
        for lane in tuple(self.lanes):
            if lane is not threading.current_thread():
                lane.join()


class Pool:
    """At most ``workers`` processes, started when there is work for them; 0: none, everything is done by the caller.

    Safe to use from several threads. When a worker dies, whoever ended it, the one job that it was at is done once more by a
    fresh one; should that die too, the medium itself may be the cause, and the job fails. One that takes too long is not tried
    again.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = default_workers() if workers is None else workers
        self._state = _State()
        self._closer = weakref.finalize(self, self._state.stop)

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the workers that are alive."""
        with self._state.changed:
            return tuple(process.pid for process in self._state.processes)

    @property
    def num_lost(self) -> int:
        """Workers that died or had to be ended."""
        return self._state.num_lost

    @property
    def num_retried(self) -> int:
        """Jobs that were done once more, for their worker had died."""
        return self._state.num_retried

    def submit(
        self, part: Image | Video, content: bytes | Path, rule: MediaRule, limits: FetchLimits, cap: int | None, name: str
    ) -> Job | None:
        """Put one medium in line: ``part`` (its source is not looked at) with its ``content``. None where it cannot be sent:
        no workers, or settings that have no form as text."""
        if self.workers < 1:
            return None
        try:
            head = wire.describe(part, content, rule, limits, cap, name)
        except TypeError:
            return None
        seconds = (limits.decode_seconds if isinstance(part, Video) else PICTURE_SECONDS) + GRACE
        job = Job(name, head, content if isinstance(content, bytes) else b"", seconds, self._state)
        state = self._state
        with state.changed:
            if state.closed:
                raise RequestFailed("the engine was closed", "open it again")
            state.line.append(job)
            if state.idle < len(state.line) and len(state.lanes) < self.workers:
                lane = threading.Thread(target=_drive, args=(state,), name="mirada-media", daemon=True)
                state.lanes.append(lane)
                lane.start()
            state.changed.notify()
        return job

    def rest(self) -> None:
        """End the workers, once they have done what there is; the next job starts fresh ones."""
        with self._state.changed:
            self._state.resting = True
            self._state.changed.notify_all()
        self._state.join()
        self._state.resting = False

    def close(self) -> None:
        """End the workers; what waits fails."""
        self._closer()
        self._state.join()


def _drive(state: _State) -> None:
    """The thread of one worker: takes jobs from the line, one after another, and replaces the worker when it dies."""
    worker: _Worker | None = None
    try:
        while (job := _next(state)) is not None:
            worker = _do(state, worker, job)
            if worker is None and _is_again(state, job):
                worker = _do(state, None, job)
    finally:
        if worker is not None:
            worker.end()


def _do(state: _State, worker: _Worker | None, job: Job) -> _Worker | None:
    """Have ``worker`` (None: a fresh one) do ``job``; the one that may do the next. The job has then ended, unless its worker
    died and it may be tried once more."""
    try:
        if worker is None:
            worker = _Worker(state)
        worker.do(job)
        return worker
    except _Lost as lost:
        if not lost.died or job.tried:
            job.finish(error=lost.error)
        job.tried = True
    except Exception as error:  # a defect here must not leave a job that never ends
        job.finish(error=RequestFailed(f"sending {job.name} to a worker failed: {error!r}", "please report it"))
    if worker is not None:
        worker.end()
    return None


def _is_again(state: _State, job: Job) -> bool:
    """Whether a job whose worker is gone is to be done once more; counted."""
    with state.changed:
        if state.closed:
            job.finish(error=RequestFailed("the engine was closed", "open it again"))
        state.num_retried += not job.done.is_set()
        return not job.done.is_set()


def _next(state: _State) -> Job | None:
    with state.changed:
        state.idle += 1
        try:
            while not state.line and not state.closed and not state.resting:
                state.changed.wait()
            if state.closed or not state.line:
                state.lanes.remove(threading.current_thread())
                return None
            return state.line.popleft()
        finally:
            state.idle -= 1


class _Lost(Exception):
    """The worker is gone or out of step; ``error`` is for the request. ``died``: by itself, or by somebody else's hand."""

    def __init__(self, error: MiradaError, died: bool = False) -> None:
        super().__init__(str(error))
        self.error, self.died = error, died


class _Worker:
    """One process, and the socket to it."""

    def __init__(self, state: _State) -> None:
        self._state = state
        self._socket, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _BOOT, json.dumps(sys.path), str(theirs.fileno())],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
                    env=config.child_env(OMP_NUM_THREADS="1"),
                )  # fmt: skip
            except OSError as error:
                self._socket.close()
                fix = "check the limit on processes, or set workers=0"
                raise _Lost(RequestFailed(f"no process could be started to prepare media ({error})", fix)) from error
        with state.changed:
            state.processes.add(self._process)
            if state.closed:
                self._process.kill()
        self._fresh = True

    def do(self, job: Job) -> None:
        """Send ``job`` and wait for what comes of it. Raises _Lost."""
        with self._state.changed:
            if job.done.is_set():  # cancelled on the way here
                return
            job.process = self._process
        deadline = time.monotonic() + job.seconds + (START_SECONDS if self._fresh else 0.0)
        self._fresh = False
        try:
            wire.send(self._socket, job.head, job.body, deadline=deadline)
            head, pixels = wire.receive_pixels(self._socket, deadline)
        except TimeoutError:
            what = f"decoding {job.name} took more than {job.seconds - GRACE:g} seconds, and its worker was ended"
            fix = "give a shorter or smaller one, or raise FetchLimits.decode_seconds"
            raise _Lost(MediaTimeout(what, fix)) from None
        except (OSError, EOFError, ValueError) as error:
            # One that says what makes no sense may have been taken over by what it decodes: that is not let near another.
            raise _Lost(self._obituary(job, error), died=not isinstance(error, ValueError)) from error
        finally:
            with self._state.changed:
                job.process = None
        _take(job, head, pixels)

    def _obituary(self, job: Job, error: Exception) -> MiradaError:
        self.end(kill=isinstance(error, ValueError))
        code = self._process.returncode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        fix = "the file may be broken, or memory ran out: try it with mirada.media alone, or lower max_pixels"
        second = ", and so had the one before it" if job.tried else ""
        return RequestFailed(f"the process that prepared {job.name} died ({how}){second}", fix)

    def end(self, kill: bool = True) -> None:
        """Close the socket, on which the worker ends by itself, and see that it does."""
        self._socket.close()
        if kill:
            self._process.kill()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with self._state.changed:
            if self._process in self._state.processes:
                self._state.processes.discard(self._process)
                self._state.num_lost += not self._state.closed


def _take(job: Job, head: dict[str, Any], pixels: np.ndarray | None) -> None:
    job.times = {str(name): float(value) for name, value in head.get("times", {}).items()}
    if pixels is not None:
        job.finish(patches=wire.patches(head["patches"], pixels))
        return
    kind = getattr(errors, str(head.get("error")), None)
    known = isinstance(kind, type) and issubclass(kind, MiradaError)
    job.finish(error=(kind if known else RequestFailed)(str(head.get("problem")), str(head.get("fix"))))  # type: ignore[operator]
