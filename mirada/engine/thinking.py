"""The thinking budget: counts the tokens of reasoning, and closes it when there have been enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Encode = Callable[[str], list[int]]


class Reading(Protocol):
    """What of a reply is read so far (``engine.sequence.Reply``)."""

    @property
    def reasoning(self) -> tuple[str, str] | None: ...


class ThinkingBudget:
    """Watches one reply. ``budget``: tokens of reasoning, over all its blocks (an analysis and a thought count together);
    None counts alone. ``encode`` makes tokens of a tag: the one control token where the vocabulary has it, else plain text.

    A token is one of reasoning if the reply is inside a block both before and after it: those that complete a tag are not,
    nor those that are written here. (Of a closing tag of several tokens that the model writes itself, all but the last are.)
    """

    def __init__(self, reply: Reading, budget: int | None, encode: Encode) -> None:
        self.num_tokens = 0
        self._reply, self._budget, self._encode = reply, budget, encode
        self._inside = False
        self._writing = 0
        """Tokens of a closing tag that are still to be taken."""

    def note(self) -> list[int]:
        """The reply has one more token; returns what must follow it now: the rest of the closing tag, or nothing."""
        was_inside, open_block = self._inside, self._reply.reasoning
        self._inside = open_block is not None
        if self._writing:
            self._writing -= 1
            return []
        if open_block is None:
            return []
        self.num_tokens += was_inside
        if self._budget is None or self.num_tokens < self._budget:
            return []
        tag, begun = open_block
        tokens = self._encode(tag)
        if len(tokens) > 1 and begun:
            tokens = self._encode(tag[len(begun) :])  # the model has begun to write it
        self._writing = len(tokens)
        return tokens
