"""The engine: all requests of one model, moved forward a step at a time. ``engine.thread`` gives it a thread."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import torch

from mirada.engine.chunk import Choice, Chunk
from mirada.engine.drafts import Drafts
from mirada.engine.features import Encoder, FeatureCache, Unit
from mirada.engine.memory import Budget
from mirada.engine.pace import Pace
from mirada.engine.runner import Runner
from mirada.engine.scheduler import KNOBS, PrefixCache, Scheduler, describe
from mirada.engine.sequence import Sequence
from mirada.engine.settings import EngineSettings
from mirada.errors import MiradaError, OutOfMemory, RequestFailed
from mirada.media.grid import GridRule

AHEAD = 2
"""Steps by which encoding may run ahead of the tokens that need it."""


class Engine:
    """Owns the sequences, the cache and the model. For one thread."""

    def __init__(
        self,
        runner: Runner,
        rule: GridRule,
        settings: EngineSettings,
        prefix: PrefixCache | None = None,
        features: FeatureCache | None = None,
    ) -> None:
        self.runner, self.settings = runner, settings
        self.scheduler = Scheduler(runner.cache, Budget(runner.model, runner.cache, settings), settings, prefix)
        self.pace = Pace(settings.seconds(runner.device.type))
        self.encoder = Encoder(
            runner.model, rule, runner.device, runner.dtype, settings.step_patches, features, runner.adapters, self.pace
        )
        self.drafts = Drafts(runner.model)
        self._seconds: float | None = None
        self.num_steps = self.num_computed = self.num_generated = self.num_proposed = self.num_accepted = 0

    @property
    def idle(self) -> bool:
        return not self.scheduler.waiting and not self.scheduler.running

    def step(self) -> None:
        """Move every request forward: end, begin, choose what to do, encode, compute, choose tokens, tell."""
        self.num_steps += 1
        scheduler = self.scheduler
        self.pace.begin()
        scheduler.begin()
        self._reap()
        for sequence in scheduler.admit():
            self._alone(self._open, sequence)
        self.drafts.propose(scheduler.running, self.settings.speculate, self.settings.step_tokens)
        scheduler.make_room()
        self._each(self._encode, self._see())
        chunks = scheduler.plan(_waits, self.pace.prompt_tokens)
        for chunk, choice in self._each(self._compute, chunks):
            self._alone(lambda s, chunk=chunk, choice=choice: self._publish(chunk, choice), chunk.sequence)
        self._reap()

    def _reap(self) -> None:
        self.scheduler.reap()
        self.encoder.tidy()

    def _open(self, sequence: Sequence) -> None:
        self.scheduler.restore(sequence)
        sequence.features = self.encoder.open(sequence)
        self.runner.begin(sequence)

    def _see(self) -> list[tuple[Sequence, Unit]]:
        """What to encode in this step, and for how long (``_seconds``): nothing where others are to go on first."""
        seeing = self.encoder.recall(self.scheduler.running)
        self._seconds = None
        if seeing and self.encoder.sliced:
            decoding, prompts = self.scheduler.ready(_waits)
            self._seconds = self.pace.encoding(bool(decoding), any(count > 0 for count in prompts.values()))
        if self._seconds is not None and self._seconds <= 0:
            return []
        return self.encoder.choose(seeing, AHEAD * self.settings.step_tokens)

    def _encode(self, units: Seq[tuple[Sequence, Unit]]) -> list[tuple[tuple[Sequence, Unit], None]]:
        seconds, self._seconds = self._seconds, None  # what fails is made again in one piece
        began = self.pace.clock()
        self.encoder.run(list(units), seconds)
        took = self.pace.clock() - began
        self.pace.encoded(took)
        for sequence in {sequence for sequence, _ in units}:
            sequence.spent("encode", took)
        return [(unit, None) for unit in units]

    def _compute(self, chunks: Seq[Chunk]) -> list[tuple[Chunk, Choice]]:
        began = self.pace.clock()
        choices = self.runner.run(chunks)
        seconds = self.pace.clock() - began
        if self.settings.speculate and all(chunk.rows == chunk.count for chunk in chunks):
            adapted = any(chunk.sequence.lora is not None for chunk in chunks)
            self.drafts.note(sum(chunk.count for chunk in chunks), seconds, adapted)
        prompts = 0
        for chunk in chunks:
            decodes = chunk.sequence.left == 1 and chunk.sequence.tokens
            prompts += 0 if decodes else chunk.count
            chunk.sequence.spent("decode" if decodes else "prefill", seconds)
        self.pace.computed(prompts, seconds)
        return list(zip(chunks, choices, strict=True))

    def _publish(self, chunk: Chunk, choice: Choice) -> None:
        """Take note of what was computed, and hand the new tokens on."""
        sequence, tokens = chunk.sequence, choice.tokens
        self.drafts.learn(sequence, tokens)
        self.num_computed += chunk.count
        self.num_proposed += len(sequence.draft)
        sequence.computed += chunk.count - len(sequence.draft)
        sequence.draft = []
        if choice.error is not None:
            raise choice.error
        if sequence.features is not None:
            sequence.features.skip(sequence.computed)
        if tokens and not sequence.tokens:
            self.scheduler.share(sequence)
        for index, (token, report) in enumerate(zip(tokens, choice.reports, strict=True)):
            if index:  # the token before this one was in the draft, so it is computed too
                sequence.computed += 1
                self.num_accepted += 1
            sequence.chooser.note(token)
            sequence.append(token, report, self.runner.is_end(sequence, token))
            self.num_generated += 1
            if sequence.done or sequence.chooser.forced:  # what the draft says next does not follow
                return

    def _alone(self, work: Callable[[Sequence], None], sequence: Sequence) -> None:
        """Do ``work`` for one sequence; if it fails, that one fails."""
        try:
            work(sequence)
        except BaseException as error:
            if not sequence.done:
                sequence.fail(_typed(error, sequence))

    def _each(self, work: Callable[[Seq[Any]], list[tuple[Any, Any]]], items: Seq[Any]) -> list[tuple[Any, Any]]:
        """``work`` on all ``items`` (units or chunks) at once; if it fails for several, on those of one sequence at a time,
        so that only those whose own work fails end. Of items that were not done, nothing is returned."""
        if not items:
            return []
        owners = {_owner(item): None for item in items}
        try:
            return work(items)
        except BaseException as error:
            if len(owners) == 1:
                sequence = _owner(items[0])
                if not sequence.done:
                    sequence.fail(_typed(error, sequence))
                return []
        return [done for owner in owners for done in self._each(work, [item for item in items if _owner(item) is owner])]

    def close(self, error: MiradaError) -> None:
        """End all requests with ``error``."""
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            if not sequence.done:
                sequence.fail(error)
        self._reap()

    def fail(self, error: BaseException) -> None:
        """A defect in the engine itself: what runs and what is first in line ends, and the rest goes on."""
        for sequence in (*self.scheduler.running, *list(self.scheduler.waiting)[:1]):
            if not sequence.done:
                sequence.fail(_typed(error, sequence))
        self._reap()

    def stats(self) -> dict[str, int]:
        """Counts, of now and since the start. Any thread may ask."""
        return {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "kv_bytes": self.runner.cache.bytes_held,
            "steps": self.num_steps,
            "computed_tokens": self.num_computed,
            "generated_tokens": self.num_generated,
            "encoded_patches": self.encoder.num_patches,
            "preemptions": self.scheduler.preemptions,
            "proposed_tokens": self.num_proposed,
            "accepted_tokens": self.num_accepted,
        }


def _owner(item: Any) -> Sequence:
    return item.sequence if isinstance(item, Chunk) else item[0]


def _waits(sequence: Sequence) -> int | None:
    """The first token that must wait for features."""
    return None if sequence.features is None else sequence.features.waits


def _typed(error: BaseException, sequence: Sequence) -> MiradaError:
    """The error that a caller sees."""
    if isinstance(error, MiradaError):
        return error.with_traceback(None)  # frames would keep tensors alive for as long as the reply
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return OutOfMemory(f"memory ran out in the middle of {describe(sequence)}", KNOBS, unit="bytes")
    made = RequestFailed(f"the engine was stopped by {error!r}", "this is a defect, please report it")
    made.add_note("".join(traceback.format_exception(error)))
    return made
