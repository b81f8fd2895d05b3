"""Who runs when: admits waiting requests while memory lasts, and moves all running ones forward a step at a time.

There is no thread of its own: whoever waits for a reply drives the engine, for everybody. One step is done by one thread;
the others sleep until it has news.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from typing import Any

import torch

from mirada.engine import memory, runner
from mirada.engine.runner import Runner
from mirada.engine.sequence import Sequence
from mirada.errors import MiradaError, OutOfMemory, RequestFailed

MAX_RUNNING = 16
"""Sequences that decode together."""
KNOBS = "shorten the prompt, lower max_tokens or max_pixels (or fps for a video), or load the model in a quantised mode"


class Scheduler:
    """Owns the sequences of one runner. Every method may be called from any thread."""

    def __init__(self, runner: Runner, max_running: int = MAX_RUNNING) -> None:
        self._runner = runner
        self._max_running = max_running
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._slots = list(range(max_running))
        self._changed = threading.Condition()
        self._busy = False

    def submit(self, sequence: Sequence) -> None:
        """Put a request in line. Its memory is checked when its turn comes."""
        with self._changed:
            self._waiting.append(sequence)

    def advance(self) -> None:
        """Return after one step, made by this thread or, if another one is in the middle of a step, by that one."""
        with self._changed:
            if self._busy:
                self._changed.wait()
                return
            self._busy = True
        try:
            with torch.inference_mode():
                self._step()
        finally:
            self._rest()

    def cancel(self, sequence: Sequence) -> None:
        """End a request early, unless it has ended. Never waits: a step under way ends it when it is through."""
        if sequence.done:
            return
        sequence.cancelled = True
        with self._changed:
            if self._busy:
                return
            self._busy = True
        try:
            self._reap()
        finally:
            self._rest()

    def _rest(self) -> None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()

    def _step(self) -> None:
        self._reap()
        fresh = self._admit()
        if fresh:
            for group in _groups(fresh, runner.PREFILL_TOKENS):
                self._guarded(self._runner.prefill, group)
        elif self._running:
            self._guarded(self._runner.decode, self._running)
        self._reap()

    def _admit(self) -> list[Sequence]:
        """Waiting requests, in order, that there is room for now; one that could not run even alone fails."""
        fresh: list[Sequence] = []
        while self._waiting and len(self._running) < self._max_running:
            sequence = self._waiting[0]
            lasting, passing = footprint(self._runner, sequence)
            promised = sum(s.bytes_reserved for s in self._running) - self._runner.cache.bytes_held
            free = self._runner.free(promised + lasting) - promised - sum(footprint(self._runner, s)[1] for s in fresh)
            try:
                memory.require(lasting + passing, free, _describe(sequence), KNOBS)
            except OutOfMemory as error:
                if self._running:
                    break  # room comes back when another one ends
                self._waiting.popleft().fail(error)
                continue
            self._waiting.popleft()
            sequence.bytes_reserved = lasting
            sequence.slot = self._slots.pop()
            self._runner.cache.allocate(sequence.slot)
            self._runner.note_seen(sequence)
            self._running.append(sequence)
            fresh.append(sequence)
        return fresh

    def _guarded(self, work: Callable[[Seq[Sequence]], None], group: Seq[Sequence]) -> None:
        """Do ``work`` on ``group``; if it fails for one of several, the others go on without it."""
        try:
            work(group)
            return
        except BaseException as error:
            failure = _typed(error, group)
            if failure is None:
                fix = "this is a defect, please report it" if isinstance(error, Exception) else "send it again"
                for sequence in group:
                    sequence.fail(RequestFailed(f"the engine was stopped by {error!r}", fix))
                raise
        if len(group) == 1:
            group[0].fail(failure)
            return
        for sequence in group:
            self._guarded(work, [sequence])

    def _reap(self) -> None:
        """Let go of all that has ended or was cancelled."""
        for sequence in [s for s in (*self._running, *self._waiting) if s.cancelled and not s.done]:
            sequence.cancel()
        with self._changed:  # another thread may be putting one in line
            self._waiting = deque(s for s in self._waiting if not s.done)
        for sequence in [s for s in self._running if s.done]:
            self._running.remove(sequence)
            self._runner.cache.free(sequence.slot)
            self._slots.append(sequence.slot)


def footprint(runner: Runner, sequence: Sequence) -> tuple[int, int]:
    """Bytes that a request takes: for as long as it runs (its cache), and while it is encoded and prefilled (an estimate)."""
    text, vision = runner.model.config.text, runner.model.config.vision
    size, num_tokens = runner.dtype.itemsize, len(sequence.prompt.tokens)
    lasting = runner.cache.bytes_for(num_tokens + sequence.limit)
    # Per token: residual, normed, q, k, v, mixed and the two halves of the gated MLP with their product.
    wide = 4 * text.hidden_size + 3 * text.num_attention_heads * text.head_dim + 3 * text.intermediate_size
    passing = num_tokens * wide * size + 3 * 4 * text.vocab_size
    if sequence.media:
        num_patches = sum(len(patches.pixels) for patches in sequence.media)
        pixels = sum(patches.pixels.size for patches in sequence.media)
        features = sum(span.num_tokens for span in sequence.prompt.spans) * text.hidden_size * size
        passing += 8 * pixels + num_patches * size * (8 * vision.hidden_size + 2 * vision.intermediate_size) + features
    return lasting, passing


def _describe(sequence: Sequence) -> str:
    visual = sum(span.num_tokens for span in sequence.prompt.spans)
    seen = f", {visual} of them visual," if visual else ""
    return f"a request of {len(sequence.prompt.tokens)} prompt tokens{seen} and up to {sequence.limit} new ones"


def _typed(error: BaseException, group: Seq[Sequence]) -> MiradaError | None:
    """The error that a caller should see, or None for one that nobody foresaw."""
    if isinstance(error, MiradaError):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return OutOfMemory(f"memory ran out in the middle of {_describe(group[0])}", KNOBS, unit="bytes")
    return None


def _groups(sequences: list[Sequence], most: int) -> Iterator[list[Sequence]]:
    """Runs of sequences of at most ``most`` prompt tokens together."""
    group: list[Any] = []
    size = 0
    for sequence in sequences:
        if group and size + len(sequence.prompt.tokens) > most:
            yield group
            group, size = [], 0
        group.append(sequence)
        size += len(sequence.prompt.tokens)
    if group:
        yield group
