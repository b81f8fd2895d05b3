"""Tokens drawn from logits after temperature, top-k, top-p and min-p; every row has its own settings and its own randomness.

R rows that are drawn for, V vocabulary, N the largest logits of a row that are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mirada.engine.board import BLOCK, OFF, Board

OFF_P = 2.0
"""A top-p that no rounding of a sum of probabilities can reach."""
COLDEST = 1e-20
"""A temperature below this is drawn as if it were this."""
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


def _column(like: Tensor, values: Sequence[float | None], dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device)[:, None]
