"""Reasoning before an answer of a promised form: it is free, and the rules begin where it ends.

What opens and closes a block of reasoning is text (``prompt.parse`` reads it so), be it one control token or several plain
ones, so this looks at bytes. W words of 32 bits, one bit a token.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np

from mirada.engine.guide import Guide, allow
from mirada.prompt.format import Tags
from mirada.prompt.tokenizer import Tokenizer

BLANKS = 2
"""Tokens of white space that may stand between reasoning and answer."""


class Rules(Guide, Protocol):
    def allows(self, token: int) -> bool:
        """Whether ``token`` may come next."""
        ...


class Vocabulary:
    """A tokenizer's tokens as bytes: control tokens have none, and only ends (``eos``) are kept of them."""

    def __init__(self, tokenizer: Tokenizer, eos: Collection[int]) -> None:
        self.size = tokenizer.vocab_size
        self.eos = frozenset(token for token in eos if 0 <= token < self.size)
        self.control = dict(tokenizer.control)
        self._tokenizer = tokenizer
        self._tags = {token: text.encode() for text, token in self.control.items() if token not in self.eos}
        self._spelled = frozenset(self.control.values())
        self._holding: dict[bytes, list[int]] = {}
        self._allowed: dict[tuple[frozenset[int], bool], np.ndarray] = {}

    @cached_property
    def bytes(self) -> list[bytes]:
        """Of each token; none for control tokens, but for ends their names."""
        spell = self._tokenizer.decode_bytes
        return [b"" if t in self._spelled and t not in self.eos else spell((t,)) for t in range(self.size)]

    @cached_property
    def plain(self) -> np.ndarray:
        """int32 [W]: the tokens of plain text."""
        words = np.zeros(-(-self.size // 32), np.int32)
        allow(words, (t for t, data in enumerate(self.bytes) if data and t not in self._spelled and t not in self.eos))
        return words

    @cached_property
    def blanks(self) -> tuple[int, ...]:
        """The plain tokens of white space alone."""
        return tuple(t for t, data in enumerate(self.bytes) if data.isspace() and self.is_plain(t))

    def allowed(self, control: frozenset[int], end: bool) -> np.ndarray:
        """int32 [W]: the plain tokens with ``control``, and the ends too."""
        key = (control, end)
        if key not in self._allowed:
            words = self.plain.copy()
            allow(words, (*control, *(self.eos if end else ())))
            self._allowed[key] = words
        return self._allowed[key]

    def spell(self, token: int) -> bytes:
        """What a token adds to a reply's text, tags that are control tokens included."""
        return self._tags.get(token) or (self.bytes[token] if token < self.size and token not in self.eos else b"")

    def is_plain(self, token: int) -> bool:
        return 0 <= token < self.size and bool(self.plain[token // 32] >> (token % 32) & 1)

    def prefixes(self, text: bytes) -> list[int]:
        """Plain tokens with which ``text`` begins."""
        return [token for size in range(1, len(text) + 1) for token in self._by_bytes.get(text[:size], ())]

    def extending(self, text: bytes) -> list[int]:
        """Plain tokens that begin with ``text`` and go on."""
        at = bisect.bisect_right(self._sorted, text)
        found: list[int] = []
        while at < len(self._sorted) and self._sorted[at].startswith(text):
            found += self._by_bytes[self._sorted[at]]
            at += 1
        return found

    def holding(self, text: bytes) -> list[int]:
        """Plain tokens that hold ``text`` and more after it."""
        if text not in self._holding:
            self._holding[text] = [t for data in self._sorted if text in data[:-1] for t in self._by_bytes[data]]
        return self._holding[text]

    @cached_property
    def _by_bytes(self) -> dict[bytes, list[int]]:
        made: dict[bytes, list[int]] = {}
        for token, data in enumerate(self.bytes):
            if self.is_plain(token):
                made.setdefault(data, []).append(token)
        return made

    @cached_property
    def _sorted(self) -> list[bytes]:
        return sorted(self._by_bytes)


class AfterThought:
    """A Guide: blocks of reasoning, then what ``fresh()`` allows.

    Before a block or the answer opens, both are possible, and the tokens that keep either possible are allowed; with ``first``
    a block must come. Inside, all plain tokens are allowed, and the control token that closes it. A reply cannot end there.
    """

    def __init__(self, fresh: Callable[[], Rules], tags: Sequence[Tags], vocabulary: Vocabulary, first: bool = False) -> None:
        self._fresh, self._vocabulary = fresh, vocabulary
        self._tags = {tag.open.encode(): tag.close.encode() for tag in tags}
        self._ids = {text.encode(): token for text, token in vocabulary.control.items()}
        self._must = first
        self._close: bytes | None = None
        """What ends the block that is open."""
        self._answering = self._closed = False
        self._tail = b""
        self._begin()

    def mask(self, out: np.ndarray) -> None:
        if self._answering:
            self._rules.mask(out)
        elif self._close is not None:
            self._free(out, self._close)
        else:
            if self._alive and not self._must:
                self._rules.mask(out)
            self._add(out, self._openers())

    def accept(self, token: int) -> None:
        if self._answering:
            self._rules.accept(token)
        elif self._close is not None:
            self._think(self._vocabulary.spell(token), self._close)
        else:
            self._start(token)

    @property
    def finished(self) -> bool:
        return self._close is None and not self._must and self._alive and self._rules.finished

    def forced(self) -> Sequence[int]:
        return self._rules.forced() if self._answering else ()

    def _begin(self) -> None:
        """Nothing of a block or of the answer is there yet."""
        self._rules = self._fresh()
        self._alive = True
        self._seen = b""
        self._blanks = 0

    def _start(self, token: int) -> None:
        data = self._vocabulary.spell(token)
        seen = (self._seen + data).lstrip()
        if self._alive and not self._must and self._rules.allows(token):
            self._rules.accept(token)
        elif seen or token in self._vocabulary.eos:
            self._alive = False
        self._blanks += not seen
        self._seen = seen
        opened = next((tag for tag in self._tags if seen.startswith(tag)), None)
        if opened is not None:
            self._close, self._must = self._tags[opened], False
            self._tail = seen[len(opened) :]
        elif seen and not any(tag.startswith(seen) for tag in self._tags):
            if not self._alive:
                raise ValueError("the reply begins as neither reasoning nor answer may")
            self._answering = True

    def _think(self, data: bytes, close: bytes) -> None:
        seen = self._tail + data
        if close in seen:
            self._close = None
            self._begin()
            self._closed = True
        else:
            self._tail = seen[max(0, len(seen) - len(close) + 1) :]

    def _openers(self) -> list[int]:
        """Tokens that lead into a block, or stand before one."""
        spelled = [tag for tag in self._tags if tag not in self._ids]
        rest = [tag[len(self._seen) :] for tag in spelled if tag.startswith(self._seen)]
        found = [token for text in rest for token in (*self._vocabulary.prefixes(text), *self._vocabulary.extending(text))]
        found += [self._ids[tag] for tag in self._tags if not self._seen and tag in self._ids]
        if self._closed and not self._seen and self._blanks < BLANKS:
            found += self._vocabulary.blanks
        return found

    def _free(self, out: np.ndarray, close: bytes) -> None:
        """All plain tokens, but for those that close the block and go on with more than white space in one."""
        shared = min(len(out), len(self._vocabulary.plain))
        out[:shared] |= self._vocabulary.plain[:shared]
        pending = [size for size in range(1, min(len(close), len(self._tail) + 1)) if self._tail.endswith(close[:size])]
        for size, tokens in [
            (0, self._vocabulary.holding(close)),
            *((n, self._vocabulary.extending(close[n:])) for n in pending),
        ]:
            self._forbid(out, (t for t in tokens if (close[:size] + self._vocabulary.spell(t)).partition(close)[2].strip()))
        if close in self._ids:
            self._add(out, (self._ids[close],))

    @staticmethod
    def _add(out: np.ndarray, tokens: Iterable[int]) -> None:
        allow(out, [token for token in tokens if token < 32 * len(out)])

    @staticmethod
    def _forbid(out: np.ndarray, tokens: Iterable[int]) -> None:
        other = np.zeros_like(out)
        AfterThought._add(other, tokens)
        out &= ~other
