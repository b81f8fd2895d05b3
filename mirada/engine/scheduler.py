"""Who runs when: the waiting line, admission by bytes, preemption, and what each step computes. Knows no model.

Requests are admitted in order, and when memory is out the one that was admitted last gives way and goes back to the head of
the line. Those that are admitted share a step's tokens by ``Turns``. So the oldest always moves on, and every request's turn
comes.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Protocol
from weakref import WeakKeyDictionary

from mirada.engine import memory
from mirada.engine.chunk import Chunk
from mirada.engine.memory import Budget
from mirada.engine.sequence import Sequence
from mirada.engine.settings import EngineSettings
from mirada.engine.turns import Turns
from mirada.errors import OutOfMemory, RequestFailed
from mirada.layers.cache import Cache

ROOM_TO_GROW = 64
"""Tokens beyond its prompt that a request must have room for when it is admitted, so that it is not preempted at once."""
KNOBS = (
    "shorten the prompt, lower max_tokens or max_pixels (or fps for a video), raise the engine's cache_bytes if it is set,"
    " lower what its caches may take (prefix_cache_bytes, prepared_bytes ...), or load the model in a quantised mode"
)

_log = logging.getLogger(__name__)


class PrefixCache(Protocol):
    """Keys and values of the beginnings of earlier requests."""

    def begin(self) -> None:
        """A step begins."""
        ...

    def match(self, sequence: Sequence) -> tuple[int, Callable[[int], None]]:
        """How many of its first tokens are there (fewer than it has), and what copies them into a slot of the cache."""
        ...

    def offer(self, sequence: Sequence) -> None:
        """The slot of ``sequence`` holds its first ``computed`` tokens; keep of them what is worth it."""
        ...

    def leader(self, sequence: Sequence, running: Iterable[Sequence]) -> tuple[Sequence, int] | None:
        """Who of ``running`` computes much of the beginning of ``sequence`` that is not kept yet, and before which token it
        ends."""
        ...


class Scheduler:
    """Owns the line, the running sequences and the slots of the cache. For one thread."""

    def __init__(self, cache: Cache, budget: Budget, settings: EngineSettings, prefix: PrefixCache | None = None) -> None:
        self.cache, self.budget, self.settings, self.prefix = cache, budget, settings, prefix
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """The longest running first."""
        # A step has at least one token for each.
        self.slots = list(range(min(settings.max_running, settings.step_tokens)))
        self.turns = Turns(settings.step_tokens)
        self.preemptions = 0
        self._leaders: WeakKeyDictionary[Sequence, tuple[Sequence, int]] = WeakKeyDictionary()
        """Of those in line: who computes their beginning, and how far that goes."""

    def enter(self, sequence: Sequence) -> None:
        """Put a request in line by when it arrived: behind what came before it, ahead of what came later and was ready sooner.
        What was preempted stays at the head."""
        at = len(self.waiting)
        while at and self.waiting[at - 1].born > sequence.born and not self.waiting[at - 1].preemptions:
            at -= 1
        self.waiting.insert(at, sequence)

    def reap(self) -> None:
        """Let go of all that has ended or was cancelled."""
        for sequence in (*self.running, *self.waiting):
            if sequence.cancelled and not sequence.done:
                _cancel(sequence)
        for sequence in [s for s in self.running if s.done]:
            self.leave(sequence)
        if any(s.done for s in self.waiting):
            self.waiting = deque(s for s in self.waiting if not s.done)

    def begin(self) -> None:
        """A step begins."""
        if self.prefix is not None:
            self.prefix.begin()

    def admit(self) -> list[Sequence]:
        """Give slots to waiting requests, in order, while there is room; one that could not run even alone fails. Whose
        beginning another is just computing is left in line until it can be taken from there, and those behind may pass."""
        fresh: list[Sequence] = []
        behind: list[Sequence] = []
        while self.waiting and self.slots:
            sequence = self.waiting[0]
            if self._follows(sequence):
                behind.append(self.waiting.popleft())
                continue
            error = self._impossible(sequence)
            if error is not None:
                self.waiting.popleft().fail(error)
                continue
            left = sequence.limit - len(sequence.tokens)
            asked = sequence.num_tokens + min(left, ROOM_TO_GROW)
            if self.running and self._needed(asked) > self.budget.total((*self.running, sequence)):
                break
            self.waiting.popleft()
            self._enter(sequence)
            fresh.append(sequence)
        self.waiting.extendleft(reversed(behind))
        return fresh

    def _follows(self, sequence: Sequence) -> bool:
        """Whether it is to wait for what another computes of its beginning, which is sooner there than computed twice. Who is
        waited for runs, and so moves on; if it goes, another leads, or the first in line does."""
        if self.prefix is None:
            return False
        leader, end = self._leaders.get(sequence, (None, 0))
        if leader is None or leader.done or leader.slot < 0:
            self._leaders.pop(sequence, None)
            try:
                found = self.prefix.leader(sequence, self.running)
            except Exception:
                _log.exception("it could not be seen whether a request begins as another does")
                return False
            if found is None:
                return False
            self._leaders[sequence] = leader, end = found
        if leader.computed < end:
            return True
        del self._leaders[sequence]
        self.share(leader)
        return False

    def _impossible(self, sequence: Sequence) -> OutOfMemory | None:
        """The error of a request that will not fit even when all others have ended."""
        needed, most = self.budget.alone(sequence), self.settings.cache_bytes
        try:
            if most is not None:
                memory.require(needed, most, f"the cache of {describe(sequence)}", KNOBS)
            if not self.running:  # else nobody knows yet what will be free then
                passing = self.budget.passing((sequence,))
                memory.require(needed + passing, self.budget.free((sequence,)) + passing, describe(sequence), KNOBS)
        except OutOfMemory as error:
            return error
        return None

    def _enter(self, sequence: Sequence) -> None:
        sequence.slot = self.slots.pop()
        self.cache.allocate(sequence.slot)
        self.running.append(sequence)
        sequence.spent("queue", time.perf_counter() - sequence.queued)

    def restore(self, sequence: Sequence) -> None:
        """Take from the prefix cache what earlier requests computed of one that was just admitted."""
        if self.prefix is not None:
            sequence.computed, restore = self.prefix.match(sequence)
            restore(sequence.slot)
            if sequence.cached is None:  # not what it finds of itself after it was preempted
                sequence.cached = sequence.computed

    def share(self, sequence: Sequence) -> None:
        """Offer what is computed of a running sequence to others. Its reply is the same whether that can be kept or not."""
        if self.prefix is None or sequence.error is not None:
            return
        try:
            self.prefix.offer(sequence)
        except Exception:
            _log.exception("the beginning of a request could not be kept for later ones")

    def leave(self, sequence: Sequence) -> None:
        """Take its slot from a sequence, and offer what is there to later ones."""
        self.running.remove(sequence)
        try:
            self.share(sequence)
        finally:
            self.cache.free(sequence.slot)
            self.slots.append(sequence.slot)
            sequence.slot, sequence.computed, sequence.room, sequence.features, sequence.draft = -1, 0, 0, None, []

    def make_room(self) -> None:
        """Preempt the youngest until the others can compute all their tokens. What it has generated is kept, and computed
        again as if it were prompt when it is admitted anew. Drafts go first: nothing is lost with them."""
        if all(_end(s) <= s.room for s in self.running):
            return
        self._shrink(self._needed(), self.budget.total(self.running))
        for sequence in self.running:
            sequence.room = self.cache.capacity(_end(sequence))

    def _shrink(self, needed: int, total: int) -> None:
        for sequence in reversed(self.running):
            if needed > total and sequence.draft:
                sequence.draft = []
                needed = self._needed()
        while needed > total and len(self.running) > 1:
            self._preempt(self.running[-1])
            needed = self._needed()
        if needed > total:
            self._give_up(self.running[0], needed, total)

    def _preempt(self, sequence: Sequence) -> None:
        self.leave(sequence)
        self.preemptions += 1
        sequence.preemptions += 1
        sequence.queued = time.perf_counter()
        self.waiting.appendleft(sequence)

    def _give_up(self, sequence: Sequence, needed: int, total: int) -> None:
        """It is alone and memory that was free when it was admitted has gone."""
        what = describe(sequence)
        sequence.fail(
            OutOfMemory(
                f"memory ran out in the middle of {what}: its cache needs {memory.say(needed)}, and"
                f" {memory.say(max(total, 0))} is available",
                KNOBS, needed=needed, available=max(total, 0), unit="bytes",
            )
        )  # fmt: skip
        self.leave(sequence)

    def _needed(self, more: int = 0) -> int:
        """Bytes of cache that the running sequences take until all their tokens are computed, with another of ``more``.
        They grow one after another, so of what growth takes in passing only the most counts."""
        cache = self.cache
        growth = [(cache.growth_bytes(s.slot, _end(s)), _end(s)) for s in self.running] + [(cache.bytes_for(more), more)]
        passing = max(cache.passing_bytes(tokens) if size else 0 for size, tokens in growth)
        return cache.bytes_held + sum(size for size, _ in growth) + passing

    def ready(self, waits: Callable[[Sequence], int | None]) -> tuple[list[Sequence], dict[Sequence, int]]:
        """Who decodes, and of the others how many tokens could be computed now: as far as ``waits`` (the first token that waits
        for pictures; None: none does) lets them."""
        decoding: list[Sequence] = []
        prompts: dict[Sequence, int] = {}
        for sequence in self.running:
            if sequence.done:
                continue
            end = waits(sequence)
            if sequence.left == 1 and end is None:
                decoding.append(sequence)
            else:
                prompts[sequence] = (sequence.num_tokens if end is None else end) - sequence.computed
        return decoding, prompts

    def plan(
        self,
        waits: Callable[[Sequence], int | None],
        share: Callable[[Seq[int], bool], int | None] = lambda counts, decoding: None,
    ) -> list[Chunk]:
        """What to compute now, within ``step_tokens``: the next token of all that decode, then prompts in turn, of which
        ``share`` (of how many tokens each has ready, and whether others decode) says how many tokens they get together."""
        decoding, prompts = self.ready(waits)
        chunks = [Chunk(s, 1 + len(s.draft)) for s in decoding]
        room = self.settings.step_tokens - sum(chunk.count for chunk in chunks)
        counts = [count for count in prompts.values() if count > 0]
        if counts and (most := share(counts, bool(decoding))) is not None:
            room = min(room, most)
        for sequence in self.turns.order(list(prompts)):
            count = min(room, prompts[sequence])
            if count > 0:
                chunks.append(Chunk(sequence, count))
                room -= count
        self.turns.note(list(prompts), [(chunk.sequence, chunk.count) for chunk in chunks[len(decoding) :]])
        return chunks


def _cancel(sequence: Sequence) -> None:
    """End it, whatever comes of its last words: a step that fails ends all that run."""
    try:
        sequence.cancel()
    except Exception as error:
        _log.exception("what there was of a cancelled reply could not be read")
        sequence.fail(RequestFailed(f"ending the reply failed: {error!r}", "this is a defect, please report it"))


def _end(sequence: Sequence) -> int:
    """Tokens that its cache holds once all there are have been computed."""
    return sequence.num_tokens + len(sequence.draft)


def describe(sequence: Sequence) -> str:
    visual = sum(span.num_tokens for span in sequence.prompt.spans)
    seen = f", {visual} of them visual," if visual else ""
    return f"a request of {len(sequence.prompt.tokens)} prompt tokens{seen} and up to {sequence.limit} new ones"
