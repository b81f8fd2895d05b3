"""Several replies to one chat: what is fetched, decoded and rendered for the first of them serves all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from mirada.engine.sequence import Sequence
from mirada.errors import MiradaError, RequestFailed
from mirada.media.grid import Patches
from mirada.types import Prompt


@dataclass(frozen=True, slots=True)
class Prepared:
    """A chat that is ready to be answered."""

    prompt: Prompt
    media: Seq[Patches]
    notes: tuple[str, ...]


class Line(Protocol):
    """What is needed of the engine's line (``engine.thread``)."""

    def submit(self, sequence: Sequence, announced: bool = False) -> None: ...

    def retract(self) -> None: ...


Outcome = Prepared | MiradaError


@dataclass(eq=False)
class Together:
    """Give one to every ``VLM.submit`` of the same chat, salt and tools: the first leads, the others wait for what it makes,
    and share its fate if that fails. Safe between threads."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _led: bool = False
    _outcome: Outcome | None = None
    _waiting: list[Callable[[Outcome], None]] = field(default_factory=list)

    def lead(self) -> bool:
        """Whether the caller is the first, who prepares."""
        with self._lock:
            first, self._led = not self._led, True
        return first

    def settle(self, outcome: Outcome) -> None:
        """Tell all who wait, and who come later. The first outcome counts."""
        with self._lock:
            if self._outcome is not None:
                return
            self._outcome, waiting = outcome, list(self._waiting)
            self._waiting.clear()
        for call in waiting:
            call(outcome)

    def then(self, call: Callable[[Outcome], None]) -> None:
        """Have ``call`` called with the outcome, at once where it is there."""
        with self._lock:
            outcome = self._outcome
            if outcome is None:
                self._waiting.append(call)
        if outcome is not None:
            call(outcome)

    def leave(self, call: Callable[[Outcome], None]) -> bool:
        """Forget ``call``, whether it was still to be called."""
        with self._lock:
            waits = call in self._waiting
            if waits:
                self._waiting.remove(call)
        return waits


@dataclass(eq=False)
class Follower:
    """``sequence``, which ``line`` was told to expect, until its leader has made what it needs (``fill`` makes it whole with
    that), has failed, or ``leave`` is called."""

    sequence: Sequence
    line: Line
    fill: Callable[[Sequence, Prepared], None]
    together: Together

    def wait(self) -> None:
        self.together.then(self)

    def leave(self) -> None:
        """It was cancelled: end at once, unless it waits no more."""
        if self.together.leave(self):
            self._end(None)

    def __call__(self, outcome: Outcome) -> None:
        """Go into the line with what the leader made; or end as the leader ended."""
        sequence = self.sequence
        sequence.stop = None
        error = outcome if isinstance(outcome, MiradaError) else None
        if isinstance(outcome, Prepared) and not sequence.cancelled:
            try:
                self.fill(sequence, outcome)
            except MiradaError as failure:
                error = failure
            except BaseException as failure:  # of this one alone: the others go on
                error = RequestFailed(f"preparing the request failed: {failure!r}", "this is a defect, please report it")
        if error is None and not sequence.cancelled:
            self.line.submit(sequence, announced=True)
        else:
            self._end(error)

    def _end(self, error: MiradaError | None) -> None:
        """It will not come to the engine."""
        self.sequence.stop = None  # which refers to this
        self.line.retract()
        if self.sequence.cancelled or error is None:
            self.sequence.cancel()
        else:
            self.sequence.fail(error.with_traceback(None))
