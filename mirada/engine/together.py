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


def follow(sequence: Sequence, line: Line, fill: Callable[[Sequence, Prepared], None], outcome: Outcome) -> None:
    """Put ``sequence``, which ``line`` was told to expect, into it with what its leader made; or end it as its leader ended."""
    error = outcome if isinstance(outcome, MiradaError) else None
    if isinstance(outcome, Prepared) and not sequence.cancelled:
        try:
            fill(sequence, outcome)
        except MiradaError as failure:
            error = failure
        except BaseException as failure:  # of this one alone: the others go on
            error = RequestFailed(f"preparing the request failed: {failure!r}", "this is a defect, please report it")
    if error is None and not sequence.cancelled:
        line.submit(sequence, announced=True)
        return
    line.retract()
    if sequence.cancelled or error is None:
        sequence.cancel()
    else:
        sequence.fail(error.with_traceback(None))
