"""The repetition guard: ends a reply that says one piece over and over.

A model that is caught in a loop leaves it almost never, and without a guard writes on to ``max_tokens``. The rule, for
``max_repeats`` k: the reply ends with at least ``LOOP_TOKENS`` k tokens, and with at least k copies, of one piece of at most
``MAX_PERIOD`` tokens. By exact tokens, so that what differs in a number or a name from line to line is no loop; by length
besides copies, so that what is short and said often is none: ruled and empty rows of a table, dots and dashes, the zeros of
a number, indentation. At the default of 16 a single token may come 511 times, a row of 8 tokens 63 times, a sentence of 20
tokens 25 times, a paragraph 15 times.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_PERIOD = 256
"""Tokens of the longest piece whose copies are noticed."""
LOOP_TOKENS = 32
"""Tokens that the copies must fill, per allowed copy."""
NEVER = 1 << 40
"""Copies that no reply comes to; more would pass the end of a machine word."""


def loop_length(period: int, max_repeats: int) -> int:
    """Tokens that the copies of a piece of ``period`` tokens fill when they become a loop."""
    return max(period, LOOP_TOKENS) * max_repeats


class LoopGuard:
    """Watches one growing reply. Nothing is done per token but one comparison: a check tells how many more tokens it takes
    at least until any piece can have been said too often, and the next check is made then. A check reads at most
    ``MAX_PERIOD * max_repeats`` tokens, and text without long repeats is checked every ``LOOP_TOKENS * (max_repeats - 1)``
    tokens.
    """

    def __init__(self, max_repeats: int) -> None:
        max_repeats = min(max_repeats, NEVER)
        periods = np.arange(1, MAX_PERIOD + 1)
        # A stretch of length L has period p when its last L - p tokens equal those p before them.
        self._needed = np.maximum(periods, LOOP_TOKENS) * max_repeats - periods
        self._window = int(loop_length(MAX_PERIOD, max_repeats))
        self._due = loop_length(1, max_repeats)

    def looping(self, tokens: Sequence[int]) -> bool:
        """Whether the reply, of which ``tokens`` is all so far, ends in a loop. To be asked after every token."""
        if len(tokens) < self._due:
            return False
        short = self._needed - self._matches(np.asarray(tokens[-self._window :]))
        # No match grows by more than one a token.
        self._due = len(tokens) + max(1, int(short.min()))
        return bool((short <= 0).any())

    def _matches(self, tail: np.ndarray) -> np.ndarray:
        """For each period p, how many tokens at the end equal the tokens p before them."""
        lengths = np.zeros(MAX_PERIOD, np.int64)
        before = tail[-2 : -MAX_PERIOD - 2 : -1]
        for period in np.flatnonzero(before == tail[-1]) + 1:
            different = np.flatnonzero(tail[period:] != tail[:-period])
            lengths[period - 1] = len(tail) - period - (different[-1] + 1 if len(different) else 0)
        return lengths
