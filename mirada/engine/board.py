"""Logits of a step, and what is largest in them.

B rows of logits, R rows of these that are concerned, V vocabulary, N blocks of a row that are looked into. Logits are float32
[B, V]. A vocabulary is long and what is wanted of it short, so one pass finds the largest of each block of ``BLOCK``
(``Board``), and all else looks into a few blocks; only what truly needs the whole distribution reads it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

BLOCK = 128
OFF = float("-inf")


class Board:
    """Logits [B, V] and the largest of each of their blocks [B, ceil(V / BLOCK)]."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.size = logits.shape[-1]

    @cached_property
    def maxima(self) -> Tensor:
        """[B, ceil(V / BLOCK)]."""
        logits = self.logits
        even = self.size - self.size % BLOCK
        maxima = logits[:, :even].unflatten(-1, (even // BLOCK, BLOCK)).amax(-1)
        if even < self.size:
            maxima = torch.cat((maxima, logits[:, even:].amax(-1, keepdim=True)), -1)
        return maxima

    def best(self) -> Tensor:
        """The largest logit of each row [B]; NaN where any is."""
        return self.maxima.amax(-1)

    def likely(self) -> Tensor:
        """The token of the largest logit of each row [B], of equal ones the lowest."""
        values, ids = self._look(torch.arange(len(self.logits), device=self.logits.device), self.maxima.argmax(-1)[:, None])
        return ids.gather(-1, values.argmax(-1, keepdim=True))[:, 0]

    def whole(self, rows: Sequence[int]) -> Tensor:
        """All logits of ``rows`` [R, V]; of a single row as they lie."""
        return self.logits[rows[0], None] if len(rows) == 1 else self.logits[list(rows)]

    def top(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` largest logits of ``rows`` [R] in falling order, and their tokens; both [R, count]."""
        if 2 * count * BLOCK >= self.size:
            values, ids = self.logits[rows].topk(count, -1)
            return values, ids
        # No more than ``count`` blocks can hold them, and those with the largest maxima do.
        values, ids = self._look(rows, self.maxima[rows].topk(count, -1).indices)
        values, at = values.topk(count, -1)
        return values, ids.gather(-1, at)

    def _look(self, rows: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """All logits of ``blocks`` [R, N] of ``rows`` and their tokens, both [R, N * BLOCK]; past the end stands -inf."""
        ids = (blocks[..., None] * BLOCK + torch.arange(BLOCK, device=blocks.device)).flatten(1)
        if self.size % BLOCK == 0:
            return self.logits[rows[:, None], ids], ids
        values = self.logits[rows[:, None], ids.clamp(max=self.size - 1)]
        return values.masked_fill_(ids >= self.size, OFF), ids
