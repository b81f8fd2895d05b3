"""What may come next: a guide allows tokens step by step, and the engine chooses among them.

R rows that have a guide, V vocabulary, W words of 32 bits (W = ceil(V / 32)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from mirada.errors import RequestFailed

T = TypeVar("T")
WORD = 32
_INFINITY_BITS = -0x800000
"""float32 -inf, as the int32 of the same bits."""


class Guide(Protocol):
    """Rules of one reply, such as a grammar. It belongs to one request and is called by one thread at a time.

    The order of calls: ``forced``; if that is empty, ``mask``; ``accept`` with the token that was chosen, those that end the
    reply included; ``finished``. ``mask`` and ``forced`` may be called again before ``accept``, and must then say the same.
    Whatever it raises ends its request alone, with RequestFailed.
    """

    def mask(self, out: np.ndarray) -> None:
        """Set in ``out`` (int32 [W], all zero) bit ``t % 32`` of word ``t // 32`` for every token t that may come next: the
        layout that llguidance and xgrammar fill. V is what the model gives logits for, often more than a tokenizer has: what
        is beyond stays zero. A reply may end only where an end token is allowed."""
        ...

    def accept(self, token: int) -> None:
        """``token`` was chosen (one that ``mask`` allowed, one of ``forced``, or the close of a thinking budget)."""
        ...

    @property
    def finished(self) -> bool:
        """Whether the reply is complete and nothing may follow; it then ends without an end token."""
        ...

    def forced(self) -> Sequence[int]:
        """Tokens that must come next, one after the other; empty where there is a choice, or where it is not known."""
        ...


def allow(out: np.ndarray, tokens: Iterable[int]) -> None:
    """Set the bits of ``tokens`` in ``out`` (int32 [W])."""
    ids = np.fromiter(tokens, np.int64)
    np.bitwise_or.at(out.view(np.uint32), ids // WORD, np.uint32(1) << (ids % WORD).astype(np.uint32))


def fill(guides: Sequence[Guide], vocabulary: int) -> tuple[np.ndarray, dict[int, RequestFailed]]:
    """What each guide allows (int32 [R, W]), and by index the errors of those that raised or allow nothing at all."""
    words = np.zeros((len(guides), -(-vocabulary // WORD)), np.int32)
    errors: dict[int, RequestFailed] = {}
    for index, guide in enumerate(guides):
        try:
            asked(lambda guide=guide, index=index: guide.mask(words[index]))
        except RequestFailed as error:
            errors[index] = error
            continue
        if not _any(words[index], vocabulary):
            errors[index] = RequestFailed("the guide allows no token", "check that its rules can be met with this vocabulary")
    return words, errors


def shut(logits: Tensor, words: np.ndarray) -> None:
    """Add -inf to the logits [R, V], float32 and finite, of all tokens whose bit in ``words`` [R, W] is not set."""
    bits = torch.from_numpy(np.unpackbits(words.view(np.uint8), axis=-1, count=logits.shape[-1], bitorder="little"))
    # 0 where a token is allowed, else -inf: selecting by a mask would be many times slower on a CPU.
    logits += bits.to(logits.device).to(torch.int32).sub_(1).bitwise_and_(_INFINITY_BITS).view(torch.float32)


def asked(question: Callable[[], T]) -> T:
    """What a guide answers; whatever it raises becomes a RequestFailed."""
    try:
        return question()
    except Exception as error:
        raise RequestFailed(f"the guide of this request failed: {error!r}", "correct the guide, or leave it out") from error


def _any(words: np.ndarray, vocabulary: int) -> bool:
    """Whether any of the first ``vocabulary`` bits is set."""
    whole, rest = divmod(vocabulary, WORD)
    return bool(words[:whole].any() or (rest and int(words[whole]) & ((1 << rest) - 1)))
