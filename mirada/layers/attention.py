"""Attention over packed sequences, without masks.

T tokens of all sequences, H query heads, K key/value heads (H a multiple of K), d head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

CAUSAL_SLACK = 0.25
"""Causal sequences share a padded batch while the shorter lacks at most this share of the longer."""


def attend_packed(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], causal: bool, scale: float) -> Tensor:
    """softmax(q kᵀ · scale) v inside each of the consecutive segments ``lengths``: q [T, H, d], k and v [T, K, d] -> [T, H, d].

    Segments never see each other. Bidirectional ones are batched with others of exactly equal length; causal ones are
    padded on the right, where no real query looks. So no mask is ever built. Differentiable.
    """
    if q.shape[1] != k.shape[1]:
        share = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    if min(lengths) == max(lengths):
        shape = (len(lengths), lengths[0], *q.shape[1:])
        return _attend(q.reshape(shape), k.reshape(shape), v.reshape(shape), causal, scale).reshape(q.shape)
    pieces: list[Tensor | None] = [None] * len(lengths)
    parts = [x.split(list(lengths)) for x in (q, k, v)]
    for group in groups(lengths, CAUSAL_SLACK if causal else 0.0):
        batched = [pad_sequence([part[i] for i in group], batch_first=True) for part in parts]
        out = _attend(batched[0], batched[1], batched[2], causal, scale)
        for i, row in zip(group, out.unbind(0), strict=True):
            pieces[i] = row[: lengths[i]]
    return torch.cat([piece for piece in pieces if piece is not None])


def groups(lengths: Sequence[int], slack: float) -> list[list[int]]:
    """Indices of sequences that are batched together: the longest first, none shorter than its first by more than ``slack``."""
    made: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if made and lengths[i] >= (1 - slack) * lengths[made[-1][0]]:
            made[-1].append(i)
        else:
            made.append([i])
    return made


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """[B, L, H, d] -> [B, L, H, d]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)
