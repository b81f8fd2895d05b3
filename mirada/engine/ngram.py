"""Speculative decoding by prompt lookup: what followed the last few tokens when they stood there before is proposed to follow
them again. The model checks a draft in one step, so replies that copy (a document, code, the question) take fewer steps.

Source of the idea: prompt lookup decoding (A. Saxena 2023, ``apoorvumang/prompt-lookup-decoding``); written anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LONGEST = 4
"""Tokens that are looked up at most; a longer match is a better sign."""
SHORTEST = 2
"""Fewer prove too little: a wrong draft costs rows of a step."""
INDEXED = 16384
"""Tokens of a prompt, counted from its end, that the engine looks up: about 10 MB per request."""


class NGramIndex:
    """Where each run of ``SHORTEST`` to ``LONGEST`` tokens stood last, kept up to date token by token at constant cost."""

    def __init__(self, tokens: Iterable[int] = (), start: int = 0) -> None:
        self._start = start
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        """Run of tokens -> index of the token that followed it the last time (the time before, for the run at the end)."""
        self.extend(tokens)

    @property
    def end(self) -> int:
        """Where the next token stands, if the first stood at ``start``."""
        return self._start + len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        # Runs are entered when their follower arrives, so that the run at the end finds the time before.
        end = len(self._tokens)
        for size in range(SHORTEST, min(LONGEST, end) + 1):
            self._after[tuple(self._tokens[end - size :])] = end
        self._tokens.append(token)

    def propose(self, count: int) -> list[int]:
        """Up to ``count`` tokens that followed the longest known run at the end, the last time that it stood there.

        Where that was so near that the end is reached, what is proposed goes on as if it were there already: a period.
        """
        end = len(self._tokens)
        for size in range(min(LONGEST, end), SHORTEST - 1, -1):
            start = self._after.get(tuple(self._tokens[end - size :]))
            if start is not None:
                period = end - start
                return [self._tokens[start + i % period] for i in range(count)]
        return []


def propose(tokens: Sequence[int], count: int) -> list[int]:
    """``NGramIndex(tokens).propose(count)``, for once."""
    return NGramIndex(tokens).propose(count)


def accept(draft: Sequence[int], chosen: Sequence[int]) -> int:
    """How many tokens of ``draft`` are right: the longest beginning that equals ``chosen``, the greedy choice at each place.

    All that greedy decoding would have chosen step by step (Leviathan et al. 2022, arXiv 2211.17192, at temperature 0).
    """
    right = 0
    while right < min(len(draft), len(chosen)) and draft[right] == chosen[right]:
        right += 1
    return right
