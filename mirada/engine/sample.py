"""Logits to tokens: pure functions, vectorised over rows; every row has its own settings and its own randomness.

B rows, V vocabulary, N the longest sorted prefix that is needed. All in float32; logits [B, V].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mirada.types import Logprob

OFF = float("-inf")
OFF_P = 2.0
"""A top-p that no rounding of a sum of probabilities can reach."""
COLDEST = 1e-20
"""A temperature below this is drawn as if it were this."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How one row chooses. ``uniform`` in [0, 1) is this row's draw of this step (unused when greedy)."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    uniform: float = 0.0


def penalise(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Repetition penalty: logits of tokens in ``seen`` (bool [B, V]) are divided (positive) or multiplied by ``penalty`` [B].

    Source: Keskar et al. 2019 (CTRL), with the sign rule that the Hugging Face generator uses.
    """
    factor = penalty[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)


def choose(logits: Tensor, choices: Sequence[Choice]) -> list[int]:
    """One token per row [B]. Temperature 0 takes the largest logit, of equal ones the lowest id."""
    hot = [row for row, choice in enumerate(choices) if choice.temperature > 0]
    tokens = logits.argmax(-1)
    if hot:
        every = len(hot) == len(choices)
        drawn = draw(logits if every else logits[hot], [choices[row] for row in hot])
        if every:
            tokens = drawn
        else:
            tokens[torch.tensor(hot, device=tokens.device)] = drawn
    return tokens.tolist()


def draw(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Tokens [B] drawn after temperature, top-k, top-p and min-p, in that order, by each row's ``uniform``.

    The draw walks the probabilities in the order of the vocabulary, so it does not depend on how ties were sorted.
    """
    # The largest becomes 0 before the division, so that a tiny temperature cannot overflow into inf - inf.
    temperature = _column(logits, [max(choice.temperature, COLDEST) for choice in choices])
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    probabilities = keep(scaled, choices).softmax(-1)
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = probabilities.to(exact).cumsum(-1)
    goal = _column(cumulative, [choice.uniform for choice in choices]) * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, goal, right=True)[:, 0]
    # Rounding may carry the goal to the very end; the last token that has any probability is then meant.
    last = (cumulative < cumulative[:, -1:]).sum(-1)
    return torch.minimum(found, last)


def keep(scaled: Tensor, choices: Sequence[Choice]) -> Tensor:
    """``scaled`` logits [B, V] with all that top-k, top-p and min-p drop set to -inf. Values tied with the last kept stay.

    top-p keeps the smallest set of most likely tokens whose probability (after top-k) reaches p; min-p keeps tokens at
    least ``min_p`` times as likely as the most likely one (Holtzman et al. 2020; Nguyen et al. 2024).
    """
    if all(c.top_k is None and c.top_p is None and c.min_p is None for c in choices):
        return scaled
    vocabulary = scaled.shape[-1]
    floor = torch.full_like(scaled[:, :1], OFF)
    nuclei = [c.top_p is not None and c.top_p < 1 for c in choices]
    if any(nuclei) or any(c.top_k is not None for c in choices):
        counts = [min(c.top_k or vocabulary, vocabulary) for c in choices]
        needed = max(count if c.top_k or nucleus else 1 for c, count, nucleus in zip(choices, counts, nuclei, strict=True))
        ranked = scaled.topk(needed, -1).values
        last = torch.tensor(counts, device=scaled.device).clamp(max=needed)[:, None] - 1
        kth = ranked.gather(-1, last)
        floor = torch.where(_column(kth, [c.top_k is not None for c in choices], torch.bool), kth, floor)
        if any(nuclei):
            floor = torch.maximum(floor, _top_p_floor(ranked.masked_fill(ranked < floor, OFF), choices))
    if any(c.min_p for c in choices):
        relative = _column(scaled, [c.min_p or 0.0 for c in choices]).log()
        floor = torch.maximum(floor, scaled.amax(-1, keepdim=True) + relative)
    return scaled.masked_fill(scaled < floor, OFF)


def _top_p_floor(ranked: Tensor, choices: Sequence[Choice]) -> Tensor:
    """The smallest logit [B, 1] that top-p keeps, from logits in falling order [B, N]."""
    probabilities = ranked.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    wanted = _column(ranked, [OFF_P if c.top_p is None or c.top_p >= 1 else c.top_p for c in choices])
    num_kept = (before < wanted).sum(-1, keepdim=True).clamp(min=1)
    return ranked.gather(-1, num_kept - 1)


def logprobs(logits: Tensor, tokens: Sequence[int], num_top: Sequence[int]) -> list[Logprob]:
    """Per row the natural-log probability of ``tokens`` and of the ``num_top`` most likely, under the model's own
    distribution (``logits`` as the model gave them, before temperature, penalty and filters)."""
    normal = logits.log_softmax(-1)
    index = torch.tensor(tokens, device=logits.device)[:, None]
    chosen = normal.gather(-1, index)[:, 0].tolist()
    most = min(max(num_top), logits.shape[-1])
    values, ids = (side.tolist() for side in normal.topk(most, -1)) if most else ([()] * len(tokens), [()] * len(tokens))
    return [
        Logprob(token, own, tuple(zip(row_ids[:n], row_values[:n], strict=True)))
        for token, own, n, row_ids, row_values in zip(tokens, chosen, num_top, ids, values, strict=True)
    ]


def _column(like: Tensor, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device)[:, None]
