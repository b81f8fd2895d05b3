"""Logits to tokens, vectorised over rows: what a request changes about its logits, which token it takes, and what it reports.

B rows of logits, R rows of these that are concerned, V vocabulary. Logits are float32 [B, V].
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mirada.engine import guide as guides
from mirada.engine.board import Board
from mirada.engine.draw import Choice, draw
from mirada.engine.guide import Guide
from mirada.errors import MiradaError, RequestFailed
from mirada.layers.largest import largest
from mirada.types import Logprob, Sampling

SMALLEST = 1e-30
"""Least repetition penalty; float32 holds its inverse."""
LARGEST = 1e30
"""Bound of logits after penalties and bias: beyond it all is certain or impossible, and their differences stay finite."""


class Tally:
    """What is done to single logits of one request, kept up to date token by token: repetition, presence and frequency
    penalty, bias, and that no end may come before ``min_tokens``. Work is per distinct token of the request, not per token of
    the vocabulary. ``ends``: the tokens that end the answer."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], ends: Collection[int] = ()) -> None:
        self._repetition = max(float(sampling.repetition_penalty), SMALLEST)
        self._presence = float(sampling.presence_penalty)
        self._frequency = float(sampling.frequency_penalty)
        self._bias = {
            int(token): min(max(float(bias), -LARGEST), LARGEST) for token, bias in (sampling.logit_bias or {}).items()
        }
        seen = np.unique(np.asarray(prompt, np.int64)).tolist() if self._repetition != 1 else []
        self._left = sampling.min_tokens
        """Tokens before an end may come."""
        self._ends = sorted(ends) if self._left else []
        first = list(dict.fromkeys([*seen, *self._bias, *self._ends]))
        self._counts: dict[int, int] = {}
        self._places = {token: place for place, token in enumerate(first)}
        size = max(64, 2 * len(first))
        self._ids, self._factors, self._shifts = np.zeros(size, np.int64), np.ones(size, np.float32), np.zeros(size, np.float32)
        self._ids[: len(first)] = first
        self._factors[: len(seen)] = self._repetition
        self._shifts[: len(first)] = [self._bias.get(token, 0.0) for token in first]
        for token in self._ends:
            self._shifts[self._places[token]] = -LARGEST

    @staticmethod
    def wanted(sampling: Sampling) -> bool:
        return bool(
            sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty or sampling.logit_bias
            or sampling.min_tokens
        )  # fmt: skip

    def note(self, token: int) -> None:
        """The answer has one more token."""
        self._left -= 1
        if self._left == 0:
            for end in self._ends:  # none of them is in the answer
                self._shifts[self._places[end]] = self._bias.get(end, 0.0)
        count = self._counts[token] = self._counts.get(token, 0) + 1
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids, self._factors, self._shifts = (
                np.concatenate((old, fresh(len(old), old.dtype)))
                for old, fresh in ((self._ids, np.zeros), (self._factors, np.ones), (self._shifts, np.zeros))
            )
        self._ids[place] = token
        self._factors[place] = self._repetition
        self._shifts[place] = self._bias.get(token, 0.0) - self._presence - self._frequency * count

    def edits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids, what to divide their logits by (multiply, if negative), and what to add then."""
        size = len(self._places)
        return self._ids[:size], self._factors[:size], self._shifts[:size]


class Chooser:
    """How one request chooses its tokens, and all that it must remember for that.

    ``pick`` only reads it, so a step may be done again; ``note`` moves it on.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int] = (), guide: Guide | None = None, ends: Collection[int] = ()
    ) -> None:
        self.sampling = sampling
        self.guide = guide
        self.tally = Tally(sampling, prompt, ends) if Tally.wanted(sampling) else None
        self.forced: deque[int] = deque()
        """Tokens that come next, whatever the logits say."""
        self._random = random.Random(sampling.seed)
        self._uniform: float | None = None
        if guide is not None:
            self._fast_forward(guide)

    @property
    def plain(self) -> bool:
        """Whether its next token is simply that of the largest logit, and nothing else is asked."""
        s = self.sampling
        return s.temperature == 0 and s.logprobs is None and self.tally is None and self.guide is None and not self.forced

    @property
    def edited(self) -> bool:
        return self.tally is not None or self.guide is not None

    @property
    def finished(self) -> bool:
        """Whether its guide says that nothing may follow. Raises RequestFailed if the guide fails."""
        guide = self.guide
        return guide is not None and bool(guides.asked(lambda: guide.finished))

    def choice(self) -> Choice:
        """One draw a token, whatever its batch mates do and however often a step is repeated: a seeded reply depends on
        nothing else."""
        s = self.sampling
        if s.temperature > 0 and self._uniform is None:
            self._uniform = self._random.random()
        return Choice(s.temperature, s.top_k, s.top_p, s.min_p, self._uniform or 0.0)

    def note(self, token: int) -> None:
        """``token`` was taken. Raises RequestFailed if the guide does not accept it."""
        self._uniform = None
        if self.forced:
            self.forced.popleft()
        if self.tally is not None:
            self.tally.note(token)
        if self.guide is not None:
            guide = self.guide
            guides.asked(lambda: guide.accept(token))
            if not self.forced:
                self._fast_forward(guide)

    def _fast_forward(self, guide: Guide) -> None:
        self.forced.extend(guides.asked(lambda: [int(token) for token in guide.forced()]))


@dataclass(frozen=True, slots=True)
class Picked:
    """A token per row, a report where one was asked for, and by row the errors of requests that could not choose."""

    tokens: list[int]
    reports: list[Logprob | None]
    errors: dict[int, MiradaError] = field(default_factory=dict)


def pick(logits: Tensor, choosers: Sequence[Chooser | None]) -> Picked:
    """One token per row of ``logits``; a row without a chooser takes that of its largest logit."""
    board = Board(logits)
    tokens = _likely(board)
    errors: dict[int, MiradaError] = {row: _not_finite() for row, token in enumerate(tokens) if token < 0}
    if not errors and all(chooser is None or chooser.plain for chooser in choosers):
        return Picked(tokens, [None] * len(tokens))
    free = [(row, chooser) for row, chooser in enumerate(choosers) if chooser and row not in errors and not chooser.forced]
    hot = [row for row, chooser in free if chooser.sampling.temperature > 0 and not chooser.edited]
    edited = [row for row, chooser in free if chooser.edited]
    if hot:
        drawn = draw(board, hot, [_of(choosers, row).choice() for row in hot])
        _put(tokens, hot, drawn.tolist())
    if edited:
        found, failed = _pick_edited(logits[edited], [_of(choosers, row) for row in edited])
        _put(tokens, edited, found)
        errors.update((edited[index], error) for index, error in failed.items())
    for row, chooser in enumerate(choosers):
        if chooser and chooser.forced:
            tokens[row] = chooser.forced[0]
    return Picked(tokens, _reports(board, choosers, tokens, errors), errors)


def _likely(board: Board) -> list[int]:
    """Per row the token of its largest logit, -1 where that is not finite."""
    found = largest(board.logits)
    return board.likely().where(board.best().isfinite(), -1).tolist() if found is None else found


def _pick_edited(logits: Tensor, choosers: Sequence[Chooser]) -> tuple[list[int], dict[int, RequestFailed]]:
    """Tokens from ``logits`` [R, V], which are changed, after penalties, bias and guides; and errors by index."""
    tallied = [(index, chooser.tally) for index, chooser in enumerate(choosers) if chooser.tally is not None]
    if tallied:
        edit(logits, [index for index, _ in tallied], [tally for _, tally in tallied])
    guided = [(index, chooser.guide) for index, chooser in enumerate(choosers) if chooser.guide is not None]
    errors: dict[int, RequestFailed] = {}
    if guided:
        words, failed = guides.fill([guide for _, guide in guided], logits.shape[-1])
        errors = {guided[at][0]: error for at, error in failed.items()}
        good = [at for at in range(len(guided)) if at not in failed]
        _shut(logits, [guided[at][0] for at in good], words[good])
    board = Board(logits)
    tokens = board.likely().tolist()
    hot = [index for index, c in enumerate(choosers) if c.sampling.temperature > 0 and index not in errors]
    if hot:
        _put(tokens, hot, draw(board, hot, [choosers[index].choice() for index in hot]).tolist())
    return tokens, errors


def _shut(logits: Tensor, rows: list[int], words: np.ndarray) -> None:
    if len(rows) == len(logits):
        guides.shut(logits, words)
    elif rows:
        part = logits[rows]
        guides.shut(part, words)
        logits[rows] = part


def edit(logits: Tensor, rows: Sequence[int], tallies: Sequence[Tally]) -> None:
    """Apply ``tallies`` to their ``rows`` of ``logits``, in place: divide (where negative: multiply) by the repetition
    penalty, then subtract presence and frequency penalty and add the bias.

    Sources: Keskar et al. 2019 (CTRL), with the sign rule of the Hugging Face generator; OpenAI's API reference.
    """
    ids, factors, shifts = (np.concatenate(parts) for parts in zip(*(tally.edits() for tally in tallies), strict=True))
    device = logits.device
    where = (
        torch.from_numpy(np.repeat(np.asarray(rows), [len(tally.edits()[0]) for tally in tallies])).to(device),
        torch.from_numpy(ids).to(device),
    )
    old, factor = logits[where], torch.from_numpy(factors).to(device)
    made = torch.where(old > 0, old / factor, old * factor) + torch.from_numpy(shifts).to(device)
    logits[where] = made.clamp_(-LARGEST, LARGEST)


def logprobs(board: Board, rows: Sequence[int], tokens: Sequence[int], num_top: Sequence[int]) -> list[Logprob]:
    """For each of ``rows`` the natural-log probability of its token and of the ``num_top`` most likely ones, under the model's
    own distribution (logits as the model gave them, before temperature, penalties, guide and filters)."""
    where = torch.tensor(rows, device=board.logits.device)
    total = _normaliser(board, rows)
    chosen = (board.logits[where, torch.tensor(tokens, device=where.device)] - total).tolist()
    most = min(max(num_top), board.size)
    values, ids = ([()] * len(rows),) * 2
    if most:
        values, ids = board.top(where, most)
        values, ids = (values - total[:, None]).tolist(), ids.tolist()
    return [
        Logprob(token, own, tuple(zip(row_ids[:n], row_values[:n], strict=True)))
        for token, own, n, row_ids, row_values in zip(tokens, chosen, num_top, ids, values, strict=True)
    ]


def _normaliser(board: Board, rows: Sequence[int]) -> Tensor:
    """log(sum(exp(logits))) [R], by way of one scratch row, so that no request copies a vocabulary."""
    best = board.best()[list(rows)]
    scratch = torch.empty_like(board.logits[0])
    sums = torch.empty_like(best)
    for index, row in enumerate(rows):
        torch.sum(torch.sub(board.logits[row], best[index], out=scratch).exp_(), -1, out=sums[index])
    return best + sums.log()


def _reports(
    board: Board, choosers: Sequence[Chooser | None], tokens: list[int], errors: dict[int, MiradaError]
) -> list[Logprob | None]:
    reports: list[Logprob | None] = [None] * len(choosers)
    asked = {row: c.sampling.logprobs for row, c in enumerate(choosers) if c and c.sampling.logprobs is not None}
    asked = {row: count for row, count in asked.items() if row not in errors and count is not None}
    if asked:
        made = logprobs(board, list(asked), [tokens[row] for row in asked], list(asked.values()))
        for row, report in zip(asked, made, strict=True):
            reports[row] = report
    return reports


def _of(choosers: Sequence[Chooser | None], row: int) -> Chooser:
    chooser = choosers[row]
    assert chooser is not None
    return chooser


def _put(into: list[int], rows: Sequence[int], tokens: Sequence[int]) -> None:
    for row, token in zip(rows, tokens, strict=True):
        into[row] = token


def _not_finite() -> RequestFailed:
    return RequestFailed("the model gave no finite logits", "check the weights, or use dtype='float32'")
