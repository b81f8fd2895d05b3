"""Which drafts are worth their rows. A draft is checked in the step that computes the next token anyway, and each of its tokens
is one more row of that step. What a row costs depends on format, processor, threads, layout and what lies before it, so nothing
is assumed about it: it is learnt from the steps that are made (``StepCost``), as it is learnt how often lookups are right, of
this request and of all (``Foresight``). Drafts are sent where the tokens that they are expected to give, by the seconds of the
step, are more than without them; everything else is off, and costs a lookup per token.

Not calibrated when a model is loaded: a step of a large model takes a second, and another past, other threads or an adapter
make another figure. For the engine's thread alone. Seconds and tokens come from outside, so a test can make its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

from mirada.engine.ngram import INDEXED, NGramIndex
from mirada.engine.sequence import Sequence
from mirada.layers.moe import Experts
from mirada.layers.step import FEW_ROWS

MOST_ROWS = FEW_ROWS
"""Rows of a step within which drafts are weighed: beyond, steps of large models go another way."""
GAIN = 1.05
"""Tokens a second beside those without drafts from which on drafts are sent."""
SLOWER = 0.25
"""Share of a longer time that is believed at once; of a shorter one all is, for a neighbour only ever takes time."""
FIRST = 0.5
"""The same of a time that was never seen: the first step of its kind makes room and tables."""
STALE = 64
"""Steps after which a time that was not seen again is forgotten, and what was too dear may be tried once more."""
RECENT = 32
"""Lookups of a request whose outcomes count, about; of all requests a hundred times as many."""
TRUST = 4.0
"""Outcomes of a request that count as much as those of all together."""


class StepCost:
    """Seconds of a step by its rows: those that were seen, and straight lines between and beyond them.

    ``slope``: what each further row takes of the time of one, until two numbers of rows were seen. 0 for a dense model: weights
    are read once for all rows, so a first draft is tried, and tells. 1 for experts: every row may read others.
    """

    def __init__(self, slope: float = 0.0) -> None:
        self._slope = slope
        self._steps = 0
        self._seen: dict[int, tuple[float, int]] = {}
        """Rows -> seconds, and the step at which they were last seen."""

    def note(self, rows: int, seconds: float) -> None:
        """A step of ``rows`` took ``seconds``."""
        self._steps += 1
        known = rows in self._seen
        old = self._seen[rows][0] if known else self(rows) if self._seen else seconds
        self._seen[rows] = (min(seconds, old + (SLOWER if known else FIRST) * (seconds - old)), self._steps)
        for other in sorted(self._seen)[1:]:  # the fewest stay: they are what all others are beside
            if self._seen[other][1] <= self._steps - STALE:
                del self._seen[other]

    def __call__(self, rows: int) -> float:
        """Seconds of a step of ``rows``, or its cost beside one row where nothing was seen."""
        known = sorted(self._seen)
        if not known:
            return self._line(rows)
        # Fewer rows take no longer than more: what says otherwise was disturbed.
        times = list(accumulate((self._seen[at][0] for at in reversed(known)), min))[::-1]
        first, last = known[0], known[-1]
        if rows <= first or first == last:
            return times[0] * self._line(rows) / self._line(first)
        if rows >= last:
            return times[-1] + (rows - last) * (times[-1] - times[0]) / (last - first)
        above = next(i for i, at in enumerate(known) if at >= rows)
        low, high = known[above - 1], known[above]
        return times[above - 1] + (times[above] - times[above - 1]) * (rows - low) / (high - low)

    def _line(self, rows: int) -> float:
        return 1 + self._slope * (rows - 1)


class Foresight:
    """How often the next token is the one that was looked up: after one that was, and after one that was not. What copies
    goes on copying, so the two differ by far."""

    def __init__(self, memory: int, wider: Foresight | None = None) -> None:
        self._keep = 1 - 1 / memory
        self._wider = wider
        self._right, self._all = ([0.25, 0.8], [1.0, 1.0]) if wider is None else ([0.0, 0.0], [0.0, 0.0])

    def note(self, after: bool, right: bool) -> None:
        """A lookup was ``right`` or not, where the one before it was (``after``) or not."""
        self._right[after] = self._keep * self._right[after] + right
        self._all[after] = self._keep * self._all[after] + 1
        if self._wider is not None:
            self._wider.note(after, right)

    def chance(self, after: bool) -> float:
        """That the next one is right."""
        right, number = self._right[after], self._all[after]
        if self._wider is None:
            return right / number
        return (right + TRUST * self._wider.chance(after)) / (number + TRUST)


class Lookup(Protocol):
    """Where drafts come from (``ngram.NGramIndex``)."""

    def propose(self, count: int) -> list[int]: ...


@dataclass(eq=False)
class Drafter:
    """What is known of one request."""

    index: NGramIndex
    foresight: Foresight
    guess: list[int] = field(default_factory=list)
    """What was looked up to follow its last token, whether it was sent or not."""
    right: bool = False
    """Whether its last token was looked up."""

    @property
    def chances(self) -> list[float]:
        """That a draft up to each token of the guess is right."""
        first, further = self.foresight.chance(self.right), self.foresight.chance(True)
        return [first * further**i for i in range(len(self.guess))]


class Drafts:
    """Those of the running sequences of one engine."""

    def __init__(self, model: Any) -> None:
        slope = float(any(isinstance(module, Experts) for module in model.modules()))
        self.costs = {False: StepCost(slope), True: StepCost(slope)}
        """Of steps without and with an adapter, which go other ways."""
        self.foresight = Foresight(100 * RECENT)

    def propose(self, running: Seq[Sequence], longest: int, room: int) -> None:
        """Give drafts of at most ``longest`` tokens to those whose reply a draft cannot change, where it pays. ``room``: tokens
        of a step."""
        live = [sequence for sequence in running if not sequence.done]
        decoding = [sequence for sequence in live if sequence.left == 1 and _ready(sequence)]
        most = min(room, MOST_ROWS) - len(decoding)
        if not decoding or most <= 0 or not longest:
            return
        drafters = [(sequence, self._guess(sequence, longest)) for sequence in decoding if sequence.chooser.plain]
        rows = min(room, sum(map(_ready, live)))
        seconds = self._seconds(rows, any(sequence.lora is not None for sequence in live))
        counts = share([drafter.chances for _, drafter in drafters], len(decoding), most, seconds)
        for (sequence, drafter), count in zip(drafters, counts, strict=True):
            sequence.draft = drafter.guess[:count]

    def _guess(self, sequence: Sequence, longest: int) -> Drafter:
        """What is looked up to follow its tokens."""
        drafter = sequence.ngrams
        if drafter is None:
            index = NGramIndex(start=max(0, sequence.num_tokens - INDEXED))
            drafter = sequence.ngrams = Drafter(index, Foresight(RECENT, self.foresight))
        most = min(longest, sequence.limit - len(sequence.tokens) - 1)
        drafter.guess = self.lookup(sequence).propose(most) if most > 0 else []
        return drafter

    def lookup(self, sequence: Sequence) -> Lookup:
        """The index of its tokens, brought up to date."""
        index = sequence.ngrams.index
        index.extend(sequence.ids(index.end, sequence.num_tokens))
        return index

    def _seconds(self, rows: int, adapted: bool) -> Callable[[int], float]:
        """The cost of a step of ``rows`` with so many more. One that computes prompts too grows at most in proportion."""
        cost = self.costs[adapted]
        return (lambda more: cost(rows + more)) if rows <= MOST_ROWS else (lambda more: float(rows + more))

    def note(self, rows: int, seconds: float, adapted: bool = False) -> None:
        """A step of ``rows``, all of them of sequences that decode, took ``seconds``."""
        if rows <= MOST_ROWS:
            self.costs[adapted].note(rows, seconds)

    def learn(self, sequence: Sequence, tokens: Iterable[int]) -> None:
        """``tokens`` follow those that ``sequence`` has: was that looked up?"""
        drafter: Drafter | None = sequence.ngrams
        if drafter is None:
            return
        guess, drafter.guess = drafter.guess, []
        drafter.right = drafter.right and bool(guess)
        for token, said in zip(tokens, guess, strict=False):
            drafter.foresight.note(drafter.right, token == said)
            drafter.right = token == said


def _ready(sequence: Sequence) -> int:
    """Its tokens that the next step may compute: those before what waits for features."""
    waits = None if sequence.features is None else sequence.features.waits
    return max(0, (sequence.num_tokens if waits is None else waits) - sequence.computed)


def share(chances: Seq[Seq[float]], decoding: int, most: int, seconds: Callable[[int], float]) -> list[int]:
    """How many tokens of its draft each request sends. ``chances``: for each, those that its draft up to each token is right,
    falling; ``decoding``: tokens that the step gives anyway; ``most``: rows that may be added; ``seconds`` of so many more."""
    counts = [0] * len(chances)
    rows = sorted(((chance, -i) for i, one in enumerate(chances) for chance in one), reverse=True)[:most]
    gains = accumulate((chance for chance, _ in rows), initial=float(decoding))
    speeds = [gain / seconds(more) for more, gain in enumerate(gains)]
    best = max(range(len(speeds)), key=speeds.__getitem__)
    if speeds[best] >= GAIN * speeds[0]:
        for _, i in rows[:best]:
            counts[-i] += 1
    return counts
