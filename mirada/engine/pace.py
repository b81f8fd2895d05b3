"""How much of a step goes to prompts and pictures while somebody waits for the next token: seconds, learnt as they pass.

A step costs something fixed (what decoding takes: the weights are read once whatever the step holds), and something for every
token of a prompt and every slice of a pass through a tower that it computes. Of the latter it gets so much as fits into the
seconds that are set, or into the fixed part where that is longer: what reads all weights once shall not do so for next to
nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mirada.models.slices import Work

SHARE = 0.3
"""Of a new measurement in a moving estimate."""
LEAP = 2.0
"""A measurement that is off by more than this factor is taken for this: a program that was held up once is not slow."""
FIRST_TOKENS = 64
"""What is computed at a time while nothing is known about its cost."""
FIRST_PRICES = {"products": 0.1, "pairs": 0.1, "numbers": 20.0}
"""Seconds of 10^9 of each kind of ``Work`` while nothing is known about it: those of a slow core, so that the first slice is
short rather than long."""
LEAST_PATCHES = 256
"""Of a pass, if there are so many: fewer rows make products slow."""
PROBE = 50
"""Steps with prompts in them after which one does without, to see what decoding takes by itself."""


class Estimate:
    """A moving mean of what one of something costs, in seconds; 0: not known."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def note(self, seconds: float) -> None:
        seconds = max(seconds, 1e-9)
        if self.seconds:
            seconds = min(max(seconds, self.seconds / LEAP), self.seconds * LEAP)
            seconds = self.seconds + SHARE * (seconds - self.seconds)
        self.seconds = seconds


class Pace:
    """``seconds`` that prompts and pictures may add to a step; None: no bound. For one thread."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds, self.clock = seconds, clock
        self.step, self.token = Estimate(), Estimate()
        """Of a step that only decodes, and of a token of a prompt."""
        self.prices = {kind: Estimate() for kind in FIRST_PRICES}
        """Of 10^9 of each kind of ``Work``."""
        self._since = PROBE
        """Steps with prompts in them since one only decoded."""
        self._spent = 0.0
        """By this step's encoding."""
        self._halved = True
        """Whether encoding left this step's other half to prompts; else what it has taken is not theirs too."""
        self._credit = 0.0
        """Seconds that encoding may take while others wait; below zero where it took more before."""

    @property
    def allowed(self) -> float:
        """Seconds of a step that are not decoding's."""
        return max(self.seconds or 0.0, self.step.seconds)

    def cost(self, work: Work) -> float:
        """Seconds that a slice takes, as far as is known."""
        parts = (_of(work, kind) * (price.seconds or FIRST_PRICES[kind]) for kind, price in self.prices.items())
        return sum(parts) * 1e-9

    def room(self, work: Work) -> float:
        """``slices.Room``: a slice may take what prompts and pictures have of a step."""
        return self.cost(work) / self.allowed

    def computed_slice(self, work: Work, seconds: float) -> None:
        """A slice took so long. One of several kinds says of each that it was so much quicker or slower than was thought."""
        by = seconds / self.cost(work)
        for kind, price in self.prices.items():
            if _of(work, kind):
                price.note(by * (price.seconds or FIRST_PRICES[kind]))

    def patches(self, patch: Work) -> int | None:
        """Of a pass, so many that a layer of it fits into a step, where ``patch`` is one in a layer; None: no bound."""
        return None if self.seconds is None else max(LEAST_PATCHES, int(1 / self.room(patch)))

    def begin(self) -> None:
        """A step."""
        self._spent, self._halved = 0.0, True

    def encoding(self, decoding: bool, prompts: bool) -> float | None:
        """Seconds that encoding may take of this step, where others decode or have prompts to compute; at most 0: none, for
        it took more before. None: no bound."""
        if self.seconds is None:
            return None
        self._halved = prompts
        if not decoding and not prompts:  # nobody is kept waiting, but somebody may come
            self._credit = 0.0
            return self.allowed
        part = self.allowed / 2 if prompts else self.allowed
        self._credit = min(self._credit + part, part)
        return self._credit

    def encoded(self, seconds: float) -> None:
        """Slices took ``seconds``."""
        self._spent += seconds
        self._credit -= seconds

    def prompt_tokens(self, counts: Sequence[int], decoding: bool) -> int | None:
        """How many tokens this step computes of prompts that have ``counts`` to compute; None: no bound. Where nobody decodes,
        as many as the shortest has, for nobody could be told anything sooner; and one alone delays nobody."""
        if self.seconds is None or (not decoding and len(counts) < 2):
            return None
        if self.token.seconds:
            least = self.allowed / 2 if self._halved else 0.0
            most = max(1, int(max(self.allowed - self._spent, least) / self.token.seconds))
        else:
            most = FIRST_TOKENS
        if not decoding:
            return max(most, min(counts))
        return 0 if self._since >= PROBE and most < sum(counts) else most

    def computed(self, prompt_tokens: int, seconds: float) -> None:
        """A forward took ``seconds``; without tokens of prompts it only decoded."""
        if prompt_tokens:
            self.token.note(max(seconds - self.step.seconds, seconds / 4) / prompt_tokens)
            self._since += 1
        else:
            self.step.note(seconds)
            self._since = 0


def _of(work: Work, kind: str) -> int:
    return getattr(work, kind)
