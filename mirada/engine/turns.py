"""Who goes first where a step has less to give than is wanted: tokens to compute, patches to encode."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from mirada.engine.sequence import Sequence


class Turns:
    """The request with the least left goes first, so that a short prompt does not wait behind a long one; but once others have
    had more than the oldest, the oldest does. So the oldest has half of what there is, and everyone is the oldest some day.

    What others have had more is counted up to ``most``, what a step gives: for longer than a step nobody is kept waiting by it.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.ahead = 0
        """What others have had more than the oldest, of late."""

    def order(self, sequences: Seq[Sequence]) -> list[Sequence]:
        """``sequences``, the oldest first, in the order in which this step serves them."""
        return sorted(sequences, key=lambda one: (not self.ahead or one is not sequences[0], one.left))

    def note(self, sequences: Seq[Sequence], given: Iterable[tuple[Sequence, int]]) -> None:
        """How much of this step each of ``sequences`` is given."""
        for sequence, count in given:
            self.ahead += -count if sequence is sequences[0] else count
        self.ahead = min(max(self.ahead, 0), self.most)
