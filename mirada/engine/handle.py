"""What a caller holds of a request under way."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Iterator

from mirada.engine.scheduler import Scheduler
from mirada.engine.sequence import Sequence
from mirada.types import Delta, Output


class EngineHandle:
    """Implements ``types.Handle``. Iterating it or asking for its result drives the engine, for all requests at once."""

    def __init__(self, scheduler: Scheduler, sequence: Sequence) -> None:
        self._scheduler = scheduler
        self._sequence = sequence
        # Nobody can read the reply of a handle that is gone.
        weakref.finalize(self, scheduler.cancel, sequence).atexit = False

    @property
    def done(self) -> bool:
        return self._sequence.done

    def __iter__(self) -> Iterator[Delta]:
        """Every delta from the first on; raises the typed error of a request that failed."""
        sequence, at = self._sequence, 0
        while True:
            done = sequence.done  # read before the deltas: what is published before it is set is then seen below
            while at < len(sequence.deltas):
                at += 1
                if sequence.deltas[at - 1].finish == "error":
                    assert sequence.error is not None
                    raise sequence.error
                yield sequence.deltas[at - 1]
            if done:
                return
            self._scheduler.advance()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """The same without blocking the event loop; the steps are made in a thread."""
        deltas = iter(self)
        while (delta := await asyncio.to_thread(next, deltas, None)) is not None:
            yield delta

    def result(self) -> Output:
        """The whole reply, or an Output that carries the error."""
        while not self._sequence.done:
            self._scheduler.advance()
        return self._sequence.output()

    def cancel(self) -> None:
        """End it; what is there stays readable, with finish ``cancelled``. Nothing happens to one that has ended."""
        self._scheduler.cancel(self._sequence)
