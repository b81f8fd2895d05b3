"""Logits to tokens, vectorised over rows; every row has its own settings and its own randomness.

B rows of logits, R rows of these that are concerned, V vocabulary, N the largest logits of a row that are needed. Logits are
float32 [B, V]. A vocabulary is long and what is wanted of it short, so one pass finds the largest of each block of ``BLOCK``
(``Board``), and all else looks into a few blocks; only what truly needs the whole distribution reads it again.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mirada.engine import guide as guides
from mirada.engine.guide import Guide
from mirada.errors import MiradaError, RequestFailed
from mirada.layers.largest import largest
from mirada.types import Logprob, Sampling

BLOCK = 128
OFF = float("-inf")
OFF_P = 2.0
"""A top-p that no rounding of a sum of probabilities can reach."""
COLDEST = 1e-20
"""A temperature below this is drawn as if it were this."""
SMALLEST = 1e-30
"""Least repetition penalty; float32 holds its inverse."""
LARGEST = 1e30
"""Bound of logits after penalties and bias: beyond it all is certain or impossible, and their differences stay finite."""
NUCLEUS = 256
"""Logits that top-p looks at first; most nuclei are smaller."""
BINS, FINE = 4096, 128.0
"""Bins by which a large nucleus is cut on a CPU, and bins per unit of the logits; the last one holds all that is below."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How one row chooses. ``uniform`` in [0, 1) is this row's draw of this step (unused when greedy)."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    uniform: float = 0.0

    @property
    def nucleus(self) -> bool:
        return self.top_p is not None and self.top_p < 1


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


def draw(board: Board, rows: Sequence[int], choices: Sequence[Choice]) -> Tensor:
    """Tokens [R] drawn after temperature, top-k, top-p and min-p, in that order, by each row's ``uniform``.

    The draw walks the probabilities in the order of the vocabulary, so it does not depend on how ties were sorted. top-p keeps
    the smallest set of most likely tokens whose probability (after top-k) reaches p; min-p keeps tokens at least ``min_p``
    times as likely as the most likely one; values tied with the last kept stay (Holtzman et al. 2020; Nguyen et al. 2024).
    """
    device = board.logits.device
    tokens = torch.empty(len(rows), dtype=torch.int64, device=device)
    narrow = [i for i, choice in enumerate(choices) if choice.top_k or choice.nucleus]
    wide = [i for i, choice in enumerate(choices) if not (choice.top_k or choice.nucleus)]
    for some in _portions(wide, device):
        tokens[some] = _draw_wide(board, [rows[i] for i in some], [choices[i] for i in some])
    count = max((choices[i].top_k + 1 if choices[i].top_k else NUCLEUS for i in narrow), default=0)  # pyright: ignore[reportOptionalOperand]
    while narrow:
        where = torch.tensor([rows[i] for i in narrow], device=device)
        drawn, whole = _draw_narrow(board, where, [choices[i] for i in narrow], min(count, board.size))
        tokens[narrow] = drawn
        # Where tokens beyond those looked at belong too (a flat distribution, or many ties), look at more: at all of them
        # where nothing bounds their number.
        narrow = [i for i, enough in zip(narrow, whole.tolist(), strict=True) if not enough]
        for some in _portions([i for i in narrow if not choices[i].top_k], device):
            tokens[some] = _draw_wide(board, [rows[i] for i in some], [choices[i] for i in some])
        narrow = [i for i in narrow if choices[i].top_k]
        count *= 8
    return tokens


def _draw_narrow(board: Board, rows: Tensor, choices: Sequence[Choice], count: int) -> tuple[Tensor, Tensor]:
    """Tokens [R] drawn among the ``count`` largest logits, and whether [R] these hold all that may be drawn."""
    values, ids = board.top(rows, count)
    scaled = _scaled(values, values[:, :1], choices)
    floor = torch.full_like(scaled[:, :1], OFF)
    if any(choice.top_k for choice in choices):
        last = torch.tensor([min(choice.top_k or count, count) for choice in choices], device=scaled.device)[:, None] - 1
        floor = torch.where(_column(floor, [bool(c.top_k) for c in choices], torch.bool), scaled.gather(-1, last), floor)
    weights = scaled.to(_exact(scaled)).exp().masked_fill_(scaled < floor, 0)
    if any(choice.nucleus for choice in choices):
        total = weights.sum(-1, keepdim=True)
        open_ = [i for i, choice in enumerate(choices) if choice.nucleus and not choice.top_k]
        for some in _portions(open_ if count < board.size else [], scaled.device):
            total[some] = _mass(board, rows[some].tolist(), values[some, :1], [choices[i] for i in some])
        wanted = _column(weights, [choice.top_p if choice.nucleus else OFF_P for choice in choices])
        num_kept = (weights.cumsum(-1) - weights < wanted * total).sum(-1, keepdim=True).clamp(min=1)
        floor = torch.maximum(floor, _where_nucleus(scaled.gather(-1, num_kept - 1), choices))
    if any(choice.min_p for choice in choices):
        floor = torch.maximum(floor, _column(floor, [choice.min_p or 0.0 for choice in choices]).log())
    weights.masked_fill_(scaled < floor, 0)
    # All that may be drawn was seen if the last one seen may not be (or is impossible, as a guide makes it).
    whole = (scaled[:, -1] < floor[:, 0]) | (scaled[:, -1] == OFF) | (count == board.size)
    ids, order = ids.sort(-1)
    found = _invert(weights.gather(-1, order), _column(weights, [choice.uniform for choice in choices]))
    return ids.gather(-1, found)[:, 0], whole


def _where_nucleus(floor: Tensor, choices: Sequence[Choice]) -> Tensor:
    if all(choice.nucleus for choice in choices):
        return floor
    return floor.masked_fill(_column(floor, [not choice.nucleus for choice in choices], torch.bool), OFF)


def nucleus_by_sort(scaled: Tensor, top_p: Sequence[float | None]) -> Tensor:
    """The least of ``scaled`` [R, V] (falling from 0) that is kept [R, 1]: those before it have less than ``top_p`` of all."""
    values = scaled.sort(-1, descending=True).values
    weights = values.to(_exact(values)).exp()
    running = weights.cumsum(-1)
    goal = _column(weights, top_p) * running[:, -1:]
    return values.gather(-1, (running - weights < goal).sum(-1, keepdim=True).clamp(min=1) - 1)


def nucleus_by_bins(scaled: Tensor, top_p: Sequence[float | None]) -> Tensor:
    """``nucleus_by_sort`` without sorting a vocabulary: of its bins, only the one in which the nucleus ends is."""
    floor = torch.empty_like(scaled[:, :1])
    for row, share, found in zip(scaled, top_p, floor, strict=True):
        weights = row.to(_exact(row)).exp()
        bins = (row * -FINE).clamp_(max=BINS - 1).int()  # by a power of two, so equal values and their order stay what they are
        sums = torch.bincount(bins, weights, BINS)
        running = sums.cumsum(0)
        goal = (share if share is not None else OFF_P) * running[-1]
        last = ((sums > 0) & (running - sums < goal)).nonzero()
        end = last[-1] if len(last) else torch.zeros_like(bins[:1])
        values = row[bins == end].sort(descending=True).values
        inside = values.to(_exact(values)).exp()
        before = (running - sums)[end.long()]
        kept = (before + inside.cumsum(0) - inside < goal).sum().clamp(min=1)
        found[0] = values[kept - 1]
    return floor


def _portions(items: list[int], device: torch.device) -> list[list[int]]:
    """What to read whole vocabularies of together: on a CPU one row at a time, whose intermediate values stay in its cache."""
    return [[item] for item in items] if device.type == "cpu" else [items] if items else []


def _mass(board: Board, rows: Sequence[int], best: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Sum [R, 1] of the unnormalised probabilities of the whole vocabulary, of which the most likely token has 1."""
    weights = _scaled(board.whole(rows), best, choices).exp_()
    return weights.sum(-1, keepdim=True, dtype=_exact(weights))


def _draw_wide(board: Board, rows: Sequence[int], choices: Sequence[Choice]) -> Tensor:
    """Tokens [R] drawn from the whole vocabulary: a block by the sums of the blocks, then a token inside it."""
    scaled = _scaled(board.whole(rows), board.maxima[list(rows)].amax(-1, keepdim=True), choices)
    if any(choice.nucleus for choice in choices):
        wanted = [choice.top_p if choice.nucleus else OFF_P for choice in choices]
        floor = nucleus_by_bins(scaled, wanted) if scaled.device.type == "cpu" else nucleus_by_sort(scaled, wanted)
        scaled.masked_fill_(scaled < _where_nucleus(floor, choices), OFF)
    weights = scaled.exp_()
    if any(choice.min_p for choice in choices):
        weights *= weights >= _column(weights, [choice.min_p or 0.0 for choice in choices])
    if rest := -board.size % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, rest))
    blocks = weights.unflatten(-1, (-1, BLOCK))
    exact = _exact(weights)
    sums = blocks.sum(-1).to(exact)
    uniform = _column(sums, [choice.uniform for choice in choices])
    block = _invert(sums, uniform)
    # What is left of the goal when the block begins, as a share of the block.
    running = sums.cumsum(-1)
    before = (running - sums).gather(-1, block)
    # Rounding must not carry it below nothing, where even an impossible token stands.
    share = ((uniform * running[:, -1:] - before) / sums.gather(-1, block)).clamp_(min=0)
    inside = blocks.gather(-2, block[..., None].expand(-1, -1, BLOCK))[:, 0].to(exact)
    return (block * BLOCK + _invert(inside, share))[:, 0]


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Where [R, 1] the running sum of ``weights`` [R, N] first exceeds the share ``uniform`` [R, 1] of the whole."""
    running = weights.cumsum(-1)
    found = torch.searchsorted(running, uniform * running[:, -1:], right=True)
    # Rounding may carry the goal to the very end; the last one that has any weight is then meant.
    last = (running < running[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum(found, last)


def _scaled(logits: Tensor, best: Tensor, choices: Sequence[Choice]) -> Tensor:
    # The largest becomes 0 before the division, so that a tiny temperature cannot overflow into inf - inf.
    return (logits - best).div_(_column(logits, [max(choice.temperature, COLDEST) for choice in choices]))


def _exact(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64


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


def _column(like: Tensor, values: Sequence[float | None], dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device)[:, None]
